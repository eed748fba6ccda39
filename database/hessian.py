"""Calibration pass: documents walk through the model block by block and leave a Hessian for every layer input."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from database.solver import spans
from utils.fitness import assemble, default_microbatch_tokens, microbatches
from utils.model import BlockInputs, Decoder


class Calibration:
    """The hidden states of all calibration documents at the input of one block, `position`, after another."""

    def __init__(self, decoder: Decoder, documents: list[torch.Tensor], device: torch.device,
                 microbatch_tokens: int | None = None, offload_modules: bool = False,
                 offload_activations: bool = False):
        """With `offload_modules` the decoder lives on the CPU and only the working block is on `device`; with
        `offload_activations` only the working microbatch is."""
        self.decoder, self.documents, self.device = decoder, documents, device
        self.offload_modules = offload_modules
        self.storage = torch.device("cpu") if offload_activations else device
        whole = [(i, len(document)) for i, document in enumerate(documents)]
        self.rows = microbatches(whole, microbatch_tokens or default_microbatch_tokens(decoder), decoder.packed_rows)
        self.hidden_states: list[torch.Tensor | None] = [None] * len(self.rows)
        self.position = 0

    @contextmanager
    def working(self, index: int) -> Iterator[None]:
        """Keep a block on the device while it is measured, solved and run."""
        module = self.decoder.blocks[index].module
        module.to(self.device)
        yield
        if self.offload_modules:
            module.to("cpu")

    @torch.no_grad()
    def measure(self, layers: dict[str, nn.Linear], advance: bool) -> dict[str, torch.Tensor | None]:
        """Run the block and return layer -> its Hessian, see `InputHessians`; `advance` as in `run`."""
        hessians = InputHessians(layers)
        try:
            self.run(advance, hessians.new_microbatch)
        finally:
            hessians.remove_hooks()
        return hessians.finish()

    @torch.no_grad()
    def run(self, advance: bool = True, after_microbatch=lambda: None) -> None:
        """Run the block at `position` over all documents; `advance` makes its outputs the next block's inputs."""
        index = self.position
        for i, rows in enumerate(self.rows):
            # masks and rotary embeddings are made anew for every block: kept, they could outweigh the hidden states
            inputs = self._block_inputs(rows)
            entering = inputs.hidden_states if self.hidden_states[i] is None else self.hidden_states[i]
            leaving = self.decoder.run_block(index, entering.to(self.device), inputs)
            if advance:
                self.hidden_states[i] = leaving.to(self.storage)
            after_microbatch()
        self.position += advance

    def _block_inputs(self, rows: list) -> BlockInputs:
        """What the block at `position` is given besides hidden states, on the device."""
        input_ids, position_ids, _ = assemble(self.documents, rows)
        home = self.decoder.device
        inputs = self.decoder.block_inputs(input_ids.to(home), None if position_ids is None else position_ids.to(home))
        inputs.calls[self.position] = _to(inputs.calls[self.position], self.device)
        return inputs


class InputHessians:
    """XᵀX / tokens of every distinct input of some linear layers: q, k and v share theirs, so do gate and up."""

    def __init__(self, layers: dict[str, nn.Linear]):
        self.names = list(layers)
        self.source: dict[str, str] = {}             # layer -> the layer that accumulates the Hessian of its input
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._inputs: dict[str, torch.Tensor] = {}   # of this microbatch
        self._hooks = [layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                       for name, layer in layers.items()]

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def new_microbatch(self) -> None:
        self._inputs.clear()

    def finish(self) -> dict[str, torch.Tensor | None]:
        """Layer -> float32 [in, in], the same tensor for layers with the same input, None for one that saw no token.

        Raises ValueError naming the first layer whose input is not finite.
        """
        for name in self.names:
            if name in self.source and not torch.isfinite(self.sums[self.source[name]].diagonal()).all():
                raise ValueError(f"{name}: NaN or infinite values in its input; check the model, or use another "
                                 f"--dtype (bfloat16, float32)")
        hessians = {}
        for name, upper in self.sums.items():
            upper.triu_().div_(max(self.tokens[name], 1))
            hessians[name] = upper.add_(upper.triu(1).T)
        return {name: hessians.get(self.source.get(name)) for name in self.names}

    def _hook(self, name: str):
        def accumulate(module, args, kwargs):
            x = args[0] if args else kwargs["input"]
            if name not in self.source:
                self.source[name] = next((other for other, seen in self._inputs.items() if seen is x), name)
            source = self.source[name]
            if source != name:
                if self._inputs.get(source) is not x:
                    raise ValueError(f"{name}: shares its input with {source} in some calls only; leave one of them "
                                     f"out with --prunable_modules or --quantizable_modules")
                return
            self._inputs[name] = x
            x = x.reshape(-1, x.shape[-1])
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
                self.tokens[name] = 0
            self.tokens[name] += len(x)
            add_outer_products(self.sums[name], x)
        return accumulate


def add_outer_products(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add xᵀx to the upper triangle of `hessian` (float32 [in, in]; what is below it is undefined), x [tokens, in].

    Half precision is exact in TF32, so tensor cores lose nothing there: products and sums are float32.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    x = x.float()
    with _matmul_precision("tf32" if half else "ieee"):
        for rows in spans(0, len(hessian), max(256, len(hessian) // 8)):
            hessian[rows, rows.start:].addmm_(x[:, rows].T, x[:, rows.start:])


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Of float32 matrix products on CUDA: "ieee" or "tf32"."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _to(value, device: torch.device):
    """Tensors inside tuples, lists and dictionaries moved to `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    return value
