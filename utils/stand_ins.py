"""Stand-ins for dropped sub-blocks: a search whose result will be finished ought not to hold against a candidate what
the sub-blocks that stay will learn to make up for."""
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from utils.decoder import BlockInputs, Decoder

FITTED_ON = 16384                # tokens


class Moments:
    """Sums over tokens of a module's inputs x and outputs y, by channel."""

    def __init__(self):
        self.tokens, self.y, self.x, self.xx, self.xy = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        y = outputs.reshape(-1, outputs.shape[-1]).float()
        self.tokens += len(y)
        self.y = self.y + y.sum(0, dtype=torch.float64)
        if inputs.numel() == outputs.numel():
            x = inputs.reshape(y.shape).float()
            self.x = self.x + x.sum(0, dtype=torch.float64)
            self.xx = self.xx + x.square().sum(0, dtype=torch.float64)
            self.xy = self.xy + (x * y).sum(0, dtype=torch.float64)

    def affine(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(scale, shift) with the least squared error of scale * x + shift; without a scale where inputs are of another
        width than outputs."""
        mean = self.y / self.tokens
        if isinstance(self.x, float):
            return None, mean.to(dtype)
        mean_x = self.x / self.tokens
        variance = (self.xx / self.tokens - mean_x**2).clamp_min(0)
        covariance = self.xy / self.tokens - mean_x * mean
        scale = torch.where(variance > 1e-12 * mean_x**2, covariance / variance, 0)      # of what varies at all
        return scale.to(dtype), (mean - scale * mean_x).to(dtype)


@torch.no_grad()
def fit_stand_ins(decoder: Decoder, documents: Sequence[torch.Tensor], num_tokens: int = FITTED_ON) -> None:
    """Give every sub-block, for `SubBlock.drop(True, stand_in=True)`, the affine map of each channel of its input that
    comes nearest to its output in the uncompressed model, on the first documents, of `num_tokens` tokens in all or a
    document more; and none where the block is then no nearer to what it gave than it is with zeros, as where a norm
    follows. Every process does all of it, so that all have the same."""
    moments: dict[nn.Module, Moments] = {}

    def observe(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        moments.setdefault(module, Moments()).add(args[0] if args else kwargs["hidden_states"],
                                                  output if isinstance(output, torch.Tensor) else output[0])

    halves = [half for block in decoder.blocks for half in (block.attn, block.mlp) if not half.held]
    hooks = [module.register_forward_hook(observe, with_kwargs=True) for half in halves for module in half.modules]
    try:
        for _ in _run(decoder, documents, num_tokens):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    for half in halves:
        half.stand_ins = {module: moments[module].affine(decoder.dtype) for module in half.modules if module in moments}

    errors = {half: torch.zeros(2, dtype=torch.float64) for half in halves}      # with zeros, with stand-ins
    for index, inputs, before, after in _run(decoder, documents, num_tokens):
        block = decoder.blocks[index]
        for half in (half for half in (block.attn, block.mlp) if half in errors):
            for way in (0, 1):
                half.drop(True, stand_in=bool(way))
                found = decoder.run_block(index, before, inputs)
                errors[half][way] += (found.float() - after.float()).square().sum(dtype=torch.float64).cpu()
            half.drop(False)
    for half, (zeros, stand_ins) in errors.items():
        if stand_ins >= zeros:
            half.stand_ins = {}
    print(f"stand-ins for {sum(bool(half.stand_ins) for half in halves)} of {len(halves)} sub-blocks")


def _run(decoder: Decoder, documents: Sequence[torch.Tensor], num_tokens: int
         ) -> Iterator[tuple[int, BlockInputs, torch.Tensor, torch.Tensor]]:
    """(block, what the model passes to it, its input, its output) of one document after the other."""
    done = 0
    for document in documents:
        if done >= num_tokens:
            return
        done += len(document)
        inputs = decoder.block_inputs(document[None])
        hidden_states = inputs.hidden_states
        for index in range(len(decoder.blocks)):
            with torch.compiler.set_stance("force_eager"):
                before, hidden_states = hidden_states, decoder.run_block(index, hidden_states, inputs)
            yield index, inputs, before, hidden_states
