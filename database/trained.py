"""Weights that are trained as they are compressed: what of them changes, and what is stored of it.

That depends on how a weight is compressed, and never changes its size: of a quantized one the rounding of every code
and every scale (as in AutoRound, arXiv 2309.05516), of K-quants the rounding alone, of a sparse one the values that are
kept, of one that is neither all of it. Gradients pass through rounding unchanged.
"""
from collections.abc import Mapping

import torch

from database.gptq import SMALLEST_SCALE
from database.packing import Packed, pack_quantized, pack_sparse, unpack_bits
from formats.kquants import TYPES, decode, encode, grids
from utils.experts import ExpertLayer

CODE_EDGE = 0.48                 # of a step: where an unrounded code starts whose rounding is not the nearest
# learning rates of values in their root mean square, times the root of a layer's inputs: an output is a sum of as many
# changes, so the wider a model, the smaller they must be (measured: benchmarks/README.md)
SPARSE_RATE, DENSE_RATE = 0.45, 0.25
SCALE_RATE = 0.25                # learning rate of scales, relative, to that of codes, in steps of the grid
TOGETHER = 0.1                   # of the learning rates, where all blocks are trained together: of values and codes,
SCALES_TOGETHER = 2.0            # and of scales that are trained alone


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


def _straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return value + (rounded - value).detach()
