"""Calibration pass: documents walk through the model block by block and leave a Hessian for every layer input."""
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from database.hidden_states import HiddenStates
from database.solver import spans
from utils import distributed
from utils.decoder import Decoder
from utils.errors import RunError
from utils.experts import ExpertLayer, Layer, eager, inputs_seen
from utils.fitness import Row, assemble, default_microbatch_tokens, microbatches, out_of_memory, storage_for

CHUNKS = 32                      # of the calibration tokens, dealt out to the processes; no more can share a pass
SLAB = 2**24                     # elements of a Hessian that travel at once
LEAST_TOKENS = 2                 # of an expert, for each of its inputs: with fewer, GPTQ and SparseGPT lose more on
                                 # other text than rounding to nearest and pruning by magnitude do
COLUMN = 2**20                   # operations in the time that solving a column takes however few its rows are


class Calibration:
    """A pass of all calibration documents through the blocks, which are at the input of block `position` together.

    Several processes have some chunks each. A Hessian is summed over every chunk, then over the chunks in their order,
    so that it is the same to the bit whatever the number of processes. Where memory does not suffice for a chunk, the
    same again with half as many tokens in a microbatch, from then on.
    """

    def __init__(self, decoder: Decoder, documents: list[torch.Tensor], device: torch.device,
                 microbatch_tokens: int | None = None, offload_activations: bool = False,
                 activations_dir: Path | None = None):
        """With `offload_activations` only the working microbatch is on `device`, as where that has no room for more.
        With `activations_dir` all others are in files there."""
        self.decoder, self.documents, self.device = decoder, documents, device
        whole = [(i, len(document)) for i, document in enumerate(documents)]
        self.microbatch_tokens = microbatch_tokens or default_microbatch_tokens(decoder)
        batches = microbatches(whole, self.microbatch_tokens, decoder.packed_rows)
        owners = distributed.shares([_tokens(rows) for rows in batches], CHUNKS)
        self.chunks = [[rows for rows, owner in zip(batches, owners) if owner == chunk]      # their microbatches
                       for chunk in sorted(set(owners))]
        width = decoder.config.get_text_config(decoder=True).hidden_size * decoder.dtype.itemsize
        own = sum(map(len, documents)) * width // min(distributed.world_size(), len(self.chunks))
        storage = (torch.device("cpu") if offload_activations or activations_dir
                   else storage_for(own, device, 1 / 2))
        self.hidden_states = HiddenStates([sum(map(_tokens, chunk)) for chunk in self.chunks], storage, device,
                                          max(map(_tokens, batches)), activations_dir)
        self.position = 0
        self._notes: dict[tuple, dict] = {}          # row -> what its blocks so far have left for later ones

    @torch.no_grad()
    def measure(self, layers: dict[str, Layer], advance: bool) -> dict[str, torch.Tensor | None]:
        """Run the block and return layer -> its Hessian, see `InputHessians`; `advance` as in `run`."""
        hessians = InputHessians(layers)
        try:
            with inputs_seen(layers, hessians.add):
                self.run(advance, hessians)
        finally:
            hessians.remove_hooks()
        return hessians.finish()

    @torch.no_grad()
    def run(self, advance: bool = True, hessians: "InputHessians | None" = None) -> None:
        """Run the block at `position` over all documents; `advance` makes its outputs the next block's inputs.

        Raises RunError where not even a single row fits into memory.
        """
        count = distributed.world_size()
        with eager(self.decoder.model):      # measured or not: with another kernel a build resumed here would differ
            for first in range(0, len(self.chunks), count):      # a chunk for every process at a time
                chunk = first + distributed.rank()
                if chunk < len(self.chunks):
                    self._run_chunk(chunk, advance, hessians)
                if hessians:
                    hessians.end_chunk()
        self.position += advance

    def _run_chunk(self, chunk: int, advance: bool, hessians: "InputHessians | None") -> None:
        while True:
            self.chunks[chunk] = [part for rows in self.chunks[chunk] for part in self._within_limit(rows)]
            done, failure = self._try_chunk(chunk, advance, hessians)
            if failure is None:
                return
            rows = self.chunks[chunk][done]
            if len(rows) == 1:
                raise RunError(f"out of memory with a single row of {_tokens(rows)} tokens ({failure}); use "
                               f"--cpu_offload_modules and --cpu_offload_activations, or a shorter "
                               f"--calibration_sequence_length in another --save_dir")
            self.hidden_states.abandon()
            if hessians:
                hessians.forget_chunk()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()         # outside of except and of what it was in: the block's tensors are gone
            self.microbatch_tokens = _tokens(rows) // 2
            print(f"out of memory: from now on at most {self.microbatch_tokens} tokens at once instead of "
                  f"{_tokens(rows)}", flush=True)

    def _notes_of(self, rows: list[Row]) -> dict:
        """What the blocks so far have left for later ones, of a microbatch: each row's put together."""
        kept = [self._notes[tuple(row)] for row in rows]
        return {key: torch.stack([of_row[key] for of_row in kept]).to(self.device) for key in kept[0]}

    def _keep_notes(self, rows: list[Row], notes: dict) -> None:
        for i, row in enumerate(rows):
            self._notes[tuple(row)] = {key: part[i].to(self.hidden_states.storage) for key, part in notes.items()}

    def _try_chunk(self, chunk: int, advance: bool, hessians: "InputHessians | None") -> tuple[int, str | None]:
        """Run the block over a chunk. Returns its microbatches that are done, and what was said where memory did not
        suffice for one more."""
        batches = self.chunks[chunk]
        done = start = 0
        try:
            for entering in self.hidden_states.arrivals(chunk, [(len(rows), _tokens(rows[:1])) for rows in batches]):
                # masks and rotary embeddings are made anew for every block: kept, they could outweigh the hidden states
                inputs = self.decoder.block_inputs(*assemble(self.documents, batches[done])[:2])
                if self.decoder.shares_notes and self.position:
                    inputs.leave(self._notes_of(batches[done]))
                output = self.decoder.run_block(self.position, inputs.hidden_states if entering is None else entering,
                                                inputs)
                if advance:
                    self.hidden_states.depart(start, output)
                    if self.decoder.shares_notes:
                        self._keep_notes(batches[done], inputs.notes)
                if hessians:
                    hessians.end_microbatch()
                start += _tokens(batches[done])
                done += 1
            if advance:
                self.hidden_states.advance(chunk)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if hessians:
                hessians.end_microbatch()
            return min(done, len(batches) - 1), (str(error) or type(error).__name__).splitlines()[0]
        return done, None

    def _within_limit(self, rows: list[Row]) -> list[list[Row]]:
        """A microbatch, or parts of it where it has more tokens than it may."""
        count = max(1, self.microbatch_tokens // _tokens(rows[:1]))
        return [rows[start:start + count] for start in range(0, len(rows), count)]


def _tokens(rows: list[Row]) -> int:
    return sum(length for row in rows for _, length in row)


class InputHessians:
    """XᵀX / tokens of every distinct input of some linear layers: q, k and v share theirs, so do gate and up.

    Each has an owner among the processes, the one that is to solve its layers: only there the sums come together.
    """

    def __init__(self, layers: dict[str, Layer]):
        """Layers that are modules report their inputs by themselves; those of experts are given to `add`."""
        self.layers = layers
        self.source: dict[str, str] = {}             # layer -> the layer that accumulates the Hessian of its input
        self.sums: dict[str, torch.Tensor] = {}      # of this process's chunk
        self.totals: dict[str, torch.Tensor] = {}    # of all chunks so far, where this process is the owner
        self.tokens: dict[str, int] = {}             # of all chunks so far
        self.owner: dict[str, int] = {}              # by accumulating layer, and by layer that has seen no token
        self._load = [0] * distributed.world_size()  # operations that solving what each process owns will take
        self._seen: dict[str, int] = {}              # tokens of this process's chunk
        self._inputs: dict[str, torch.Tensor] = {}   # of this microbatch
        self._hooks = [layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                       for name, layer in layers.items() if isinstance(layer, nn.Module)]

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def end_microbatch(self) -> None:
        self._inputs.clear()

    def forget_chunk(self) -> None:
        """Forget what this process's chunk has added so far."""
        for chunk in self.sums.values():
            chunk.zero_()
        self._seen.clear()

    def end_chunk(self) -> None:
        """Add all processes' sums, in the order of their chunks, to the owners' totals."""
        reports = distributed.gather((self.source, self._seen))
        for name in self.layers:
            sources = {source[name]: None for source, _ in reports if name in source}
            if len(sources) > 1:
                raise ValueError(_inconsistent(name, *sources))
            for source in sources:
                self.source[name] = source
        self._deal([name for name in self.layers if self.source.get(name) == name and name not in self.owner])
        for name, owner in self.owner.items():
            tokens = sum(seen.get(name, 0) for _, seen in reports)
            self.tokens[name] = self.tokens.get(name, 0) + tokens
            if tokens:
                self._add_up(name, owner)
        self._seen.clear()

    def finish(self) -> dict[str, torch.Tensor | None]:
        """Layer -> float32 [in, in], the same tensor for layers with the same input, None for one that saw no token, or
        of an expert's too few; of the layers that are this process's to solve.

        Raises ValueError naming the first layer whose input is not finite.
        """
        self._deal([name for name in self.layers if name not in self.source])
        own = [name for name in self.layers if self.owner[self.source.get(name, name)] == distributed.rank()]
        for name in own:
            if name in self.source and not torch.isfinite(self.totals[self.source[name]].diagonal()).all():
                raise ValueError(f"{name}: NaN or infinite values in its input; check the model, or use another "
                                 f"--dtype (bfloat16, float32)")
        self.sums.clear()
        hessians = {}
        for name, upper in self.totals.items():
            upper.triu_().div_(max(self.tokens[name], 1))
            hessians[name] = upper.add_(upper.triu(1).T)
            if isinstance(self.layers[name], ExpertLayer) and self.tokens[name] < LEAST_TOKENS * len(upper):
                del hessians[name]
        return {name: hessians.get(self.source.get(name)) for name in own}

    def _deal(self, names: list[str]) -> None:
        """Give each of some inputs to the process with the least to solve so far, the costliest first."""
        costs = {name: sum(((layer.out_features + layer.in_features) * layer.in_features + COLUMN) * layer.in_features
                           for other, layer in self.layers.items() if self.source.get(other, other) == name)
                 for name in names}
        for name in sorted(names, key=costs.get, reverse=True):
            self.owner[name] = min(range(len(self._load)), key=self._load.__getitem__)
            self._load[self.owner[name]] += costs[name]

    def _add_up(self, name: str, owner: int) -> None:
        layer = self.layers[name]
        if name not in self.sums:                    # no token here, but in another process
            self.sums[name] = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        chunk = self.sums[name]
        if owner == distributed.rank() and name not in self.totals:
            self.totals[name] = torch.zeros_like(chunk)
        for rows in spans(0, len(chunk), max(1, SLAB // len(chunk))):
            for part in distributed.collect(chunk[rows, rows.start:].contiguous(), owner):
                self.totals[name][rows, rows.start:] += part
        chunk.zero_()

    def _hook(self, name: str):
        return lambda module, args, kwargs: self.add(name, args[0] if args else kwargs["input"])

    def add(self, name: str, x: torch.Tensor) -> None:
        """Add a layer's input [..., in], which layers that share it are given as the same tensor."""
        if name not in self.source:
            self.source[name] = next((other for other, seen in self._inputs.items() if seen is x), name)
        source = self.source[name]
        if source != name:
            if self._inputs.get(source) is not x:
                raise ValueError(_inconsistent(name, source))
            return
        self._inputs[name] = x
        x = x.reshape(-1, x.shape[-1])
        if name not in self.sums:
            self.sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self._seen[name] = self._seen.get(name, 0) + len(x)
        add_outer_products(self.sums[name], x)


def _inconsistent(name: str, *sources: str) -> str:
    other = next(source for source in sources if source != name)
    return (f"{name}: shares its input with {other} in some calls only; leave one of them out with "
            f"--prunable_modules or --quantizable_modules")


def add_outer_products(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add xᵀx to the upper triangle of `hessian` (float32 [in, in]; what is below it is undefined), x [tokens, in].

    Half precision loses nothing on tensor cores, which multiply it exactly and add in float32: as it is where the
    device has such products, else in TF32, which holds it, at half the rate.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    if half and sums_half_precision_in_float32(x.device, x.dtype):
        for rows in spans(0, len(hessian), max(256, len(hessian) // 8)):
            upper = hessian[rows, rows.start:]
            torch.addmm(upper, x[:, rows].T, x[:, rows.start:], torch.float32, out=upper)
        return
    x = x.float()
    with _matmul_precision("tf32" if half else "ieee"):
        for rows in spans(0, len(hessian), max(256, len(hessian) // 8)):
            hessian[rows, rows.start:].addmm_(x[:, rows].T, x[:, rows.start:])


@cache
def sums_half_precision_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has products of half precision with sums in float32, found out by a sum beyond the former."""
    if device.type != "cuda":
        return False
    x, total = torch.full((4096, 16), 7.0, dtype=dtype, device=device), torch.ones(16, 32, device=device)[:, 16:]
    try:
        torch.addmm(total, x.T, x, torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        return False
    return bool((total == 4096 * 49 + 1).all())


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Of float32 matrix products on CUDA: "ieee" or "tf32"."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
