"""Train a block's compressed weights together, so that it gives what the uncompressed block gave.

What is trained depends on how a weight is compressed, and never changes its size: of a quantized one the rounding of
every code and every scale (as in AutoRound, arXiv 2309.05516), of K-quants the rounding alone, of a sparse one the
values that are kept, of one that is neither all of it. Gradients pass through rounding unchanged.
"""
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from database.packing import Packed, pack_quantized, pack_sparse, unpack_bits
from formats.kquants import TYPES, decode, encode, grids
from utils import distributed
from utils.decoder import BlockInputs, Decoder
from utils.errors import RunError
from utils.experts import ExpertLayer, eager, inputs_seen
from utils.fitness import assemble, microbatches, storage_for
from utils.losses import log_probabilities, plain_kl

SMALLEST_SCALE = 2.0**-24        # above zero in half precision
SMALLEST_SQUARE = 1e-12          # that an error is divided by
CODE_EDGE = 0.48                 # of a step: where an unrounded code starts whose rounding is not the nearest
# learning rates of values in their root mean square, times the root of a layer's inputs: an output is a sum of as many
# changes, so the wider a model, the smaller they must be (measured: benchmarks/README.md)
SPARSE_RATE, DENSE_RATE = 0.45, 0.25
SCALE_RATE = 0.25                # learning rate of scales, relative, to that of codes, in steps of the grid
TOGETHER = 0.1                   # of the learning rates, where all blocks are trained together: of values and codes,
SCALES_TOGETHER = 2.0            # and of scales that are trained alone
BETAS = (0.9, 0.95)              # of Adam: there are few steps
PARTS = 4                        # microbatches of a step, at least: so many processes can share it
ERROR_MICROBATCHES = 16          # on which layers' errors are measured
CHUNK = 1024                     # tokens whose logits are in memory at once


# ---- weights that are trained ----------------------------------------------------------------------------------------


class QuantizedWeight:
    """A weight scale * (code - zero) of which the codes, unrounded, and the scales are trained. The zeros stay."""
    def __init__(self, weight: torch.Tensor, packed: Packed, bits: int, group_size: int, keep_codes: bool,
                 learning_rate: float = 0.02, together: bool = False):
        """weight: uncompressed [out, in]; packed: see `pack_quantized`. Training starts from `packed`'s grids and the
        codes nearest to `weight`, with `keep_codes` from its codes. learning_rate: in steps of a grid. `together`: the
        scales alone are trained, which takes little memory for all blocks."""
        self.bits, self.group_size, self.columns = bits, group_size, weight.shape[1]
        self.zeros, self.scales = packed["zeros"].float(), packed["scales"].float()
        spread = self._spread(self.scales)
        unrounded = torch.where(spread == 0, 0, weight.float() / spread)
        if keep_codes:
            steps = unpack_bits(packed["codes"], bits, weight.numel()).view(weight.shape) - self._spread(self.zeros)
            unrounded = unrounded.clamp(steps - CODE_EDGE, steps + CODE_EDGE)
        self.growth = torch.zeros_like(self.scales).requires_grad_()     # of the scales, relative
        # from the zero, in those of the grid
        if together:
            self.steps = unrounded.round().to(torch.int8 if bits < 8 else torch.int16)
            self.trained, self.learning_rates = [self.growth], [SCALES_TOGETHER * SCALE_RATE * learning_rate]
        else:
            self.steps = unrounded.requires_grad_()
            self.trained, self.learning_rates = [self.steps, self.growth], [learning_rate, SCALE_RATE * learning_rate]

    def value(self) -> torch.Tensor:
        """float32 [out, in], of which gradients pass to what is trained."""
        return self._spread(self._scales()) * (self._codes() - self._spread(self.zeros))

    @torch.no_grad()
    def packed(self) -> Packed:
        return pack_quantized(self._codes().to(torch.uint8), self._scales().half(), self.zeros.to(torch.uint8),
                              self.bits)

    def _codes(self) -> torch.Tensor:
        steps = self.steps.float()
        return (_straight_through(steps, steps.round()) + self._spread(self.zeros)).clamp(0, 2**self.bits - 1)

    def _scales(self) -> torch.Tensor:
        scales, signs = self.scales * (1 + self.growth), self.scales.sign()     # imported ones may be below zero
        return _straight_through(scales, (signs * scales.half().float()).clamp(min=SMALLEST_SCALE) * signs)

    def _spread(self, grids: torch.Tensor) -> torch.Tensor:
        """[out or 1, groups] to [out or 1, in or 1]."""
        return grids if grids.shape[1] == 1 else grids.repeat_interleave(self.group_size, dim=1)[:, :self.columns]


class BlockWeight:
    """A weight in blocks of GGUF's, of which the codes, unrounded, are trained. The grids stay."""
    def __init__(self, weight: torch.Tensor, packed: Packed, kind: str, keep_codes: bool, learning_rate: float = 0.02,
                 together: bool = False):
        """As for QuantizedWeight; kind: of the blocks, whose codes are trained `together`, too."""
        self.kind, self.parts = kind, decode(kind, packed["blocks"])
        scale, minimum = self._grids()
        unrounded = torch.where(scale == 0, 0, (weight.float() + minimum) / scale)
        if keep_codes:
            unrounded = unrounded.clamp(self.parts.codes - CODE_EDGE, self.parts.codes + CODE_EDGE)
        self.trained = [unrounded.requires_grad_()]
        self.learning_rates = [TOGETHER * learning_rate if together else learning_rate]

    def value(self) -> torch.Tensor:
        """float32 [out, in], of which gradients pass to what is trained."""
        scale, minimum = self._grids()
        return scale * self._codes() - minimum

    def _grids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Scale, minimum) of every weight."""
        scale, minimum = grids(self.kind, self.parts)
        return tuple(grid.repeat_interleave(TYPES[self.kind].group, 1) for grid in (scale, minimum))

    @torch.no_grad()
    def packed(self) -> Packed:
        return {"blocks": encode(self.kind, self.parts._replace(codes=self._codes().to(torch.uint8)))}

    def _codes(self) -> torch.Tensor:
        return _straight_through(self.trained[0], self.trained[0].round()).clamp(0, TYPES[self.kind].top)


class SparseWeight:
    """A weight of which the kept values are trained; what is pruned stays zero."""
    def __init__(self, packed: Packed, shape: tuple[int, int], learning_rate: float | None = None,
                 together: bool = False):
        """learning_rate: in root mean squares of the kept values, when blocks are not trained `together`."""
        self.keep = unpack_bits(packed["mask"], 1, shape[0] * shape[1]).bool().view(shape)
        self.dtype = packed["values"].dtype
        self.trained = [torch.zeros(shape, device=self.keep.device).masked_scatter_(
            self.keep, packed["values"].float()).requires_grad_()]
        self.learning_rates = [_value_rate(packed["values"], learning_rate, SPARSE_RATE / shape[1] ** 0.5, together)]

    def value(self) -> torch.Tensor:
        """float32 [out, in], of which gradients pass to what is kept."""
        return self.trained[0] * self.keep

    @torch.no_grad()
    def packed(self) -> Packed:
        return pack_sparse(self.trained[0].to(self.dtype), self.keep)


class DenseWeight:
    """A parameter of a block of which nothing is compressed: every value is trained."""
    def __init__(self, weight: torch.Tensor, learning_rate: float | None = None, together: bool = False):
        """learning_rate: in root mean squares of the weight, when blocks are not trained `together`."""
        self.trained = [weight.detach().float().clone().requires_grad_()]
        self.learning_rates = [_value_rate(weight, learning_rate, DENSE_RATE / weight.shape[-1] ** 0.5, together)]

    def value(self) -> torch.Tensor:
        return self.trained[0]


class ExpertsWeight:
    """A 3-D parameter of experts, of which every matrix is trained as it is compressed."""
    def __init__(self, layers: Mapping[str, ExpertLayer],
                 weights: Mapping[str, QuantizedWeight | BlockWeight | SparseWeight]):
        """layers: all that are in the parameter, by name; weights: of those that are trained."""
        self.weights = weights
        self.trained = [tensor for weight in weights.values() for tensor in weight.trained]
        self.learning_rates = [rate for weight in weights.values() for rate in weight.learning_rates]
        self._experts: dict[int, dict[str, ExpertLayer]] = {}
        for name, layer in layers.items():
            self._experts.setdefault(layer.expert, {})[name] = layer

    def value(self) -> torch.Tensor:
        """float32 like the parameter, of which gradients pass to what is trained."""
        return torch.stack([self._matrix(self._experts[expert]) for expert in sorted(self._experts)])

    def _matrix(self, layers: Mapping[str, ExpertLayer]) -> torch.Tensor:
        """Of one expert."""
        values = [self.weights[name].value() if name in self.weights else layer.weight.float()
                  for name, layer in layers.items()]
        rows = sum(layer.out_features for layer in layers.values())
        places = torch.cat([torch.arange(rows)[layer.outputs] for layer in layers.values()])
        matrix = torch.cat(values)[places.argsort().to(values[0].device)]
        return matrix.T if next(iter(layers.values())).transposed else matrix


Weight = QuantizedWeight | BlockWeight | SparseWeight | DenseWeight | ExpertsWeight


def _value_rate(values: torch.Tensor, learning_rate: float | None, default: float, together: bool) -> float:
    """Learning rate of values that are trained as they are; learning_rate, default: in their root mean square."""
    size = float(values.float().square().mean().sqrt()) if values.numel() else 0.0
    return (default if learning_rate is None else learning_rate) * size * (TOGETHER if together else 1)


def _flat(gradients: Sequence[torch.Tensor | None], values: Sequence[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """Gradients of `values` that were multiplied by `scale`, as they are, float32."""
    return [torch.zeros_like(value).flatten() if gradient is None else gradient.float().flatten() / scale
            for value, gradient in zip(values, gradients)]


def _straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return value + (rounded - value).detach()


# ---- the hidden states it is trained on ------------------------------------------------------------------------------


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
                 own_ends: Callable = nullcontext):
        """own_ends(): a context in which embedding and head are those of what is trained, not of its teacher."""
        self.own_ends = own_ends
        self.decoder, self.documents, self.device = decoder, documents, device
        self.rows = microbatches([(i, len(document)) for i, document in enumerate(documents)], tokens,
                                 decoder.packed_rows)
        hidden_size = decoder.config.get_text_config(decoder=True).hidden_size
        needed = 3 * sum(map(len, documents)) * hidden_size * decoder.dtype.itemsize     # two streams, one being made
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
        self._check(summed.isfinite().all())
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
            finite &= summed.isfinite().all()
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
