"""Train a block's compressed weights together, so that it gives what the uncompressed block gave; or those of all
blocks, so that the model predicts what the uncompressed one predicts. What is trained of a weight: database/trained.py.
"""
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from database.trained import Weight
from utils import distributed
from utils.decoder import BlockInputs, Decoder
from utils.errors import RunError
from utils.experts import eager, inputs_seen
from utils.fitness import assemble, microbatches, storage_for
from utils.losses import log_probabilities, plain_kl

SMALLEST_SQUARE = 1e-12          # that an error is divided by
BETAS = (0.9, 0.95)              # of Adam: there are few steps
PARTS = 4                        # microbatches of a step, at least: so many processes can share it
ERROR_MICROBATCHES = 16          # on which layers' errors are measured
CHUNK = 1024                     # tokens whose logits are in memory at once


class Passed(NamedTuple):
    """What blocks pass on to the next one, of a microbatch."""
    hidden_states: torch.Tensor              # [rows, tokens, hidden]
    notes: dict                              # see BlockInputs.notes; empty but in models whose blocks read them


@dataclass
class Pass:
    """A microbatch's forward through all blocks, on which its backward is from the last to the first."""
    given: BlockInputs
    entering: list[Passed]                   # every block's
    gradient: torch.Tensor                   # of the loss, by what the blocks gone through were given
    of_notes: dict                           # the same of the notes among that, by their keys


class HiddenStates:
    """The calibration documents at the input of one block after another, in microbatches of `tokens` at most.

    Every process holds all of them and runs a share. states: what is passed of every microbatch, None before the first
    block.
    """

    def __init__(self, decoder: Decoder, documents: Sequence[torch.Tensor], tokens: int, device: torch.device,
                 own_ends: Callable = nullcontext, streams: int = 2):
        """own_ends(): a context in which embedding and head are those of what is trained, not of its teacher. streams:
        how often what is passed of all documents is in memory, besides what is being made."""
        self.own_ends = own_ends
        self.decoder, self.documents, self.device = decoder, documents, device
        # a microbatch's documents are not neighbours, which are often pieces of one text
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
        self.rows = microbatches([(i, len(documents[i])) for i in order], tokens, decoder.packed_rows)
        hidden_size = decoder.config.get_text_config(decoder=True).hidden_size
        needed = (streams + 1) * sum(map(len, documents)) * hidden_size * decoder.dtype.itemsize
        needed *= 1 + decoder.shares_notes
        self.storage = storage_for(needed, device, 1 / 4)

    def tokens(self, i: int) -> int:
        return sum(length for row in self.rows[i] for _, length in row)

    @torch.no_grad()
    def embedded(self) -> list[Passed]:
        """What the first block is given, of every microbatch."""
        return [Passed(self._given(i).hidden_states.to(self.storage), {}) for i in range(len(self.rows))]

    @torch.no_grad()
    def _given(self, i: int, states: list[Passed] | None = None) -> BlockInputs:
        """What the blocks are given for microbatch `i`, the next one of `states`."""
        input_ids, position_ids, _ = assemble(self.documents, self.rows[i])
        given = self.decoder.block_inputs(input_ids.to(self.device),
                                          None if position_ids is None else position_ids.to(self.device))
        if states is not None:
            given.hidden_states = states[i].hidden_states.to(self.device)
            if states[i].notes:
                given.leave({key: note.to(self.device) for key, note in states[i].notes.items()})
        return given

    @torch.no_grad()
    def run(self, states: list[Passed] | None, index: int) -> list[Passed]:
        """What block `index` as it is now passes on, of every microbatch."""
        return [self._share(i, self._run(states, index, i)) for i in range(len(self.rows))]

    def _run(self, states: list[Passed] | None, index: int, i: int) -> Passed | None:
        """Of microbatch `i`, where that is this process's."""
        if i % distributed.world_size() != distributed.rank():
            return None
        given = self._given(i, states)
        output = self._output(index, given.hidden_states, given)
        return Passed(output, self._notes(given))

    def _notes(self, given: BlockInputs) -> dict:
        return given.notes if self.decoder.shares_notes else {}

    def _share(self, i: int, passed: Passed | None) -> Passed:
        """What the process of microbatch `i` has, in every process and where it is kept."""
        def share(tensor: torch.Tensor | None) -> torch.Tensor:
            return distributed.broadcast(None if tensor is None else tensor.to(self.storage), owner, self.storage)

        owner, notes = i % distributed.world_size(), passed.notes if passed else {}
        keys = distributed.gather(list(notes))[owner] if self.decoder.shares_notes else ()
        return Passed(share(passed and passed.hidden_states), {key: share(notes.get(key)) for key in keys})

    def _output(self, index: int, hidden_states: torch.Tensor, given: BlockInputs,
                values: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Of a block whose parameters, by name within it, are `values`, or its own."""
        args, kwargs = given.calls[index]
        output = functional_call(self.decoder.blocks[index].module, dict(values or {}),
                                 (self.decoder.parted(hidden_states), *args), kwargs)
        return self.decoder.joined(output if isinstance(output, torch.Tensor) else output[0])

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, index: int, weights: Mapping[str, Weight], states: list[Passed] | None, targets: list[Passed],
              steps: int, batch_tokens: int, seed: int) -> tuple[float, float]:
        """Train `weights`, by their names within block `index`, until its outputs for `states` are near `targets`.

        A step takes microbatches of `batch_tokens` in all, drawn without replacement until all were seen. The loss is
        the mean over tokens of ‖output − target‖² / ‖target‖², which is how later blocks see it through their norms:
        first tokens can be thousands of times as large as others. The learning rate falls linearly to 0. Several
        processes compute the gradients of a step's microbatches side by side; they are added in order, so that all
        their numbers give the same weights.
        Returns the mean loss of the first and of the last tenth of the steps.
        """
        adam = self._adam(weights.values())
        rates = [group["lr"] for group in adam.param_groups]
        batches = self._batches(batch_tokens, torch.Generator().manual_seed(seed))
        losses = []
        for step in range(steps):
            for group, rate in zip(adam.param_groups, rates):
                group["lr"] = (1 - step / steps) * rate
            losses.append(self._backward(index, weights, states, targets, next(batches)))
            if losses == [0.0]:      # not compressed, and given what the uncompressed block was given
                break
            adam.step()
            adam.zero_grad()
        tenth = max(1, steps // 10)
        return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth

    @staticmethod
    def _adam(weights: Iterable[Weight]) -> torch.optim.Adam:
        return torch.optim.Adam([{"params": [tensor], "lr": rate} for weight in weights
                                 for tensor, rate in zip(weight.trained, weight.learning_rates)], betas=BETAS)

    def _batches(self, batch_tokens: int, generator: torch.Generator):
        """Lists of microbatches, without end."""
        batch, size = [], 0
        while True:
            for i in torch.randperm(len(self.rows), generator=generator).tolist():
                batch.append(i)
                size += self.tokens(i)
                if size >= batch_tokens:
                    yield batch
                    batch, size = [], 0

    def _backward(self, index: int, weights: Mapping[str, Weight], states: list[Passed] | None, targets: list[Passed],
                  batch: list[int]) -> float:
        """Leave a batch's gradients in what is trained; returns its loss."""
        with torch.enable_grad():
            values = [weight.value() for weight in weights.values()]
        leaves = {name: value.detach().to(self.decoder.dtype).requires_grad_() for name, value in zip(weights, values)}
        scale = self._scale(batch)

        def share(place: int) -> torch.Tensor:
            target = targets[batch[place]].hidden_states.to(self.device).float()
            given = self._given(batch[place], states)
            with torch.enable_grad():
                output = self._output(index, given.hidden_states, given, leaves)
                squares = (output.float() - target).square().sum(-1)
                # not yet divided by the number of numbers: half precision would underflow
                loss = (squares / target.square().mean(-1).clamp(min=SMALLEST_SQUARE)).sum()
                gradients = torch.autograd.grad(scale * loss, list(leaves.values()), allow_unused=True)
            return torch.cat([loss.detach()[None], loss.new_tensor([target.numel()]),
                              *_flat(gradients, values, scale)])

        summed = self._sum(len(batch), share)
        self._check(summed.sum().isfinite())
        loss, size = summed[:2]
        gradients = (summed[2:] / size).split([value.numel() for value in values])
        torch.autograd.backward(values, [gradient.view_as(value) for value, gradient in zip(values, gradients)])
        return float(loss / size)

    def _sum(self, count: int, share: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The sum of `share` of a batch's microbatches, by their places, each computed by the process whose turn it is
        and added in order: the same from any number of processes."""
        total, world = None, distributed.world_size()
        for first in range(0, count, world):
            own = share(first + distributed.rank()) if first + distributed.rank() < count else None
            for source in range(min(world, count - first)):
                part = distributed.broadcast(own, source, self.device)
                total = part if total is None else total.add_(part)
        return total

    def _check(self, finite: torch.Tensor) -> None:
        """Raises RunError unless `finite`."""
        if not finite:
            raise RunError(f"a gradient is beyond what {self.decoder.dtype} holds; use --dtype bfloat16 or float32, or "
                           f"a lower --learning_rate, in another --save_dir")

    def _scale(self, batch: list[int]) -> float:
        """What losses are multiplied by for their gradients, which add up over a microbatch's tokens, to be within half
        precision: a power of two, which changes no digit."""
        return 2.0 ** -(max(map(self.tokens, batch)).bit_length() // 2)

    # ---- training all blocks together --------------------------------------------------------------------------------

    def train_together(self, weights: Sequence[Mapping[str, Weight]], states: list[Passed] | None,
                       teacher: list[Passed], steps: int, batch_tokens: int, seed: int) -> Iterator[float]:
        """Train the weights of all blocks, by their names within each, until the model predicts what the uncompressed
        one does, whose last block's output is `teacher`; yields every step's loss, the KL divergence in nats a token.

        In memory are an input for every block and one block's gradients, since a block's forward is run again for its
        backward (gradient checkpointing). Steps and processes are as in `train`; the model has the trained weights.
        """
        adams = [self._adam(of_block.values()) if of_block else None for of_block in weights]
        rates = [[group["lr"] for group in adam.param_groups] if adam else [] for adam in adams]
        batches = self._batches(batch_tokens, torch.Generator().manual_seed(seed))

        @torch.no_grad()
        def update(index: int) -> None:
            if adams[index]:
                for group, rate in zip(adams[index].param_groups, rates[index]):
                    group["lr"] = (1 - step / steps) * rate
                adams[index].step()
                adams[index].zero_grad()
                parameters = dict(self.decoder.blocks[index].module.named_parameters())
                for name, weight in weights[index].items():
                    parameters[name].data.copy_(weight.value())

        for step in range(steps):
            yield self._backward_through(weights, states, teacher, next(batches), update)

    def _backward_through(self, weights: Sequence[Mapping[str, Weight]], states: list[Passed] | None,
                          teacher: list[Passed], batch: list[int],
                          ended: Callable[[int], None] = lambda index: None) -> float:
        """Leave a batch's gradients in what is trained; returns its loss. `ended` is called with the index of every
        block that has its own, from the last to the first."""
        scale = self._scale(batch)
        blocks = range(len(self.decoder.blocks))
        passes: dict[int, Pass] = {}             # of this process, by place
        losses = torch.zeros(len(batch), dtype=torch.float64)
        for place in range(distributed.rank(), len(batch), distributed.world_size()):
            given = self._given(batch[place], states)
            hidden_states, entering = given.hidden_states, []
            with torch.no_grad():
                for index in blocks:
                    entering.append(Passed(hidden_states, self._notes(given)))
                    hidden_states = self._output(index, hidden_states, given)
            losses[place], gradient = self._divergence(batch[place], hidden_states,
                                                       teacher[batch[place]].hidden_states.to(self.device), scale)
            passes[place] = Pass(given, entering, gradient, {})
        finite = torch.ones((), dtype=torch.bool, device=self.device)    # read once a step: reading waits for a GPU
        for index in reversed(blocks):
            with torch.enable_grad():
                values = [weight.value() for weight in weights[index].values()]
            leaves = {name: value.detach().to(self.decoder.dtype).requires_grad_()
                      for name, value in zip(weights[index], values)}

            def share(place: int, index: int = index, leaves: dict = leaves, values: list = values) -> torch.Tensor:
                gradients = self._backward_block(index, passes[place], leaves)
                return torch.cat([torch.zeros(1, device=self.device), *_flat(gradients, values, scale)])

            summed = self._sum(len(batch), share)
            finite &= summed.sum().isfinite()
            parts = (summed[1:] / self._predicted(batch)).split([value.numel() for value in values])
            torch.autograd.backward(values, [part.view_as(value) for part, value in zip(parts, values)])
            ended(index)
        self._check(finite)
        return float(distributed.merge_(losses).sum()) / self._predicted(batch)

    def _backward_block(self, index: int, one: Pass, leaves: Mapping[str, torch.Tensor]) -> list[torch.Tensor | None]:
        """Run a block's forward again and its backward. Returns the gradients of its parameters `leaves`; `one` then
        has those of what it was given, notes of earlier blocks included."""
        hidden_states, notes = one.entering.pop()
        hidden_states.requires_grad_()
        notes = {key: note.detach().requires_grad_() for key, note in notes.items()}
        if self.decoder.shares_notes:
            one.given.leave(notes)
        with torch.enable_grad():
            output = self._output(index, hidden_states, one.given, leaves)
        outputs, gradients = [output], [one.gradient]
        for key, note in self._notes(one.given).items():
            if note is not notes.get(key) and key in one.of_notes:       # this block has left it
                outputs.append(note)
                gradients.append(one.of_notes.pop(key))
        one.gradient, *found = torch.autograd.grad(outputs, [hidden_states, *leaves.values(), *notes.values()],
                                                   gradients, allow_unused=True)
        for (key, note), gradient in zip(notes.items(), found[len(leaves):]):
            if gradient is not None:
                one.of_notes[key] = one.of_notes.get(key, 0) + gradient
        return found[:len(leaves)]

    def _divergence(self, i: int, hidden_states: torch.Tensor, teacher: torch.Tensor, scale: float
                    ) -> tuple[float, torch.Tensor]:
        """(sum of the KL divergence over a microbatch's predicted tokens, its gradient [rows, tokens, hidden], times
        `scale`)."""
        *_, predicting = assemble(self.documents, self.rows[i])
        total, gradient = 0.0, torch.zeros_like(hidden_states).flatten(0, 1)
        for chunk in predicting.to(self.device).split(CHUNK):
            own, others = (states.flatten(0, 1)[chunk] for states in (hidden_states, teacher))
            log_p = log_probabilities(self.decoder.logits(others[None])[0])
            own.requires_grad_()
            with self.own_ends(), torch.enable_grad():
                log_q = log_probabilities(self.decoder.logits(own[None])[0])
                loss = plain_kl(log_p, log_p.exp(), log_q).sum()
                gradient[chunk] = torch.autograd.grad(scale * loss, own)[0]
            total += float(loss.detach())
        return total, gradient.view_as(hidden_states)

    def _predicted(self, batch: list[int]) -> int:
        return sum(length - 1 for i in batch for row in self.rows[i] for _, length in row)

    @torch.no_grad()
    def relative_errors(self, index: int, states: list[Passed] | None, alternatives: Mapping[str, torch.Tensor]
                        ) -> dict[str, float]:
        """Relative output error ‖(W−Ŵ)X‖² / ‖WX‖² of an alternative Ŵ [out, in] for some of the block's layers, by name
        within it; X: their inputs in the block as it is, in the first microbatches."""
        block = self.decoder.blocks[index]
        layers = {name: block.layers[f"{block.name}.{name}"] for name in alternatives}
        energies = {name: torch.zeros(2, dtype=torch.float64) for name in alternatives}      # of the error, of all

        def add(name: str, x: torch.Tensor) -> None:
            x, weight = x.flatten(0, -2).float(), layers[name].weight.float()
            delta = alternatives[name].to(x.device).float() - weight
            outputs = (x @ w.T for w in (delta, weight))
            energies[name] += torch.stack([y.square().sum(dtype=torch.float64) for y in outputs]).cpu()

        hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
                 for name, layer in layers.items() if isinstance(layer, nn.Module)]
        with eager(self.decoder.model), inputs_seen(layers, add):
            for i in range(min(len(self.rows), ERROR_MICROBATCHES)):
                given = self._given(i, states)
                self._output(index, given.hidden_states, given)
        for registered in hooks:
            registered.remove()
        return {name: float(error / whole) if whole else 0.0 for name, (error, whole) in energies.items()}


def _flat(gradients: Sequence[torch.Tensor | None], values: Sequence[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """Gradients of `values` that were multiplied by `scale`, as they are, float32."""
    return [torch.zeros_like(value).flatten() if gradient is None else gradient.float().flatten() / scale
            for value, gradient in zip(values, gradients)]
