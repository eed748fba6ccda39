"""Levels on the grids of GGUF's K-quants by GPTQ: `python -m database.gptq --grid k-quant`.

A block's scales and minima are fitted, integers and all, when the sweep reaches its first column, to the weights as
they are then, and every column is rounded to the grid that llama.cpp decodes. What is stored are the file's own bytes.
"""
import argparse

import torch

from database.packing import Packed
from database.solver import inverse_factor, lazy_sweep, output_errors
from formats.kquants import K_QUANTS, TYPES, BlockType, Parts, encode, fitting, grids, level_of

TRIALS = 10                      # of a group's range, to either side of its plain one
ROUNDS = 3                       # in which a block's integers and its float16 are fitted in turn


class Fit:
    """The grids of some blocks of one type at which the rounding error is small.

    w: [rows, blocks, groups, columns]; importance: of a column's error, [blocks, groups, columns]. d and m: float32
    [rows, blocks, 1], as float16 has them; scales and minima: float32 [rows, blocks, groups], integers."""

    def __init__(self, form: BlockType, w: torch.Tensor, importance: torch.Tensor):
        self.form, self.w, self.importance = form, w, importance
        scale, minimum = self._symmetric_groups() if form.middle is not None else self._groups_with_minima()
        self.scales, self.minima = torch.ones_like(scale), torch.ones_like(scale)
        if form.scales is None:
            self.d, self.m = _half(scale), _half(-minimum)               # GGUF adds these minima
            return
        least, most = form.scales
        if form.middle is None:
            self.d = _half(scale.amax(-1, keepdim=True) / most)
        else:                                                            # the largest scale becomes the least integer
            largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
            self.d = _half(largest / least)
        self.m = _half(minimum.amax(-1, keepdim=True) / most)
        self.scales = _ratio(scale, self.d).round().clamp(least, most)
        self.minima = _ratio(minimum, self.m).round().clamp(0, most)
        for _ in range(ROUNDS):
            self._move_integers()
            self._refit_halves()

    def parts(self, codes: torch.Tensor) -> Parts:
        """Of the codes uint8 [rows, columns] that the sweep gave these blocks."""
        rows, has_integers = len(codes), self.form.scales is not None
        return Parts(codes, self.d.half().view(rows, -1),
                     self.scales.short().view(rows, -1) if has_integers else None,
                     self.m.half().view(rows, -1) if self.form.middle is None else None,
                     self.minima.short().view(rows, -1) if has_integers and self.form.middle is None else None)

    # ---- a group by itself: scale and minimum that need not be on any grid -------------------------------------------

    def _symmetric_groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        w, middle = self.w, self.form.middle
        largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))         # takes the side that has a code more
        best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
        for trial in range(-TRIALS, TRIALS + 1):
            steps = _ratio(w * -(middle + 0.1 * trial), largest).round_().clamp_(-middle, self.form.top - middle)
            scale = _ratio(self._sum(w * steps), self._sum(steps * steps))
            error = self._sum((scale * steps).sub_(w).square_())
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best[..., 0], torch.zeros_like(best[..., 0])

    def _groups_with_minima(self) -> tuple[torch.Tensor, torch.Tensor]:
        w, top = self.w, self.form.top
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True)
        best = torch.zeros_like(low), -low
        least, weights, total = torch.full_like(low, torch.inf), self._sum(torch.ones_like(w)), self._sum(w)
        for trial in range(-TRIALS, TRIALS + 1):
            steps = _ratio((w - low) * (top + 0.1 * trial), high - low).round_().clamp_(0, top)
            s, ss, ws = self._sum(steps), self._sum(steps * steps), self._sum(w * steps)
            scale = _ratio(weights * ws - total * s, weights * ss - s * s)
            minimum = _ratio(scale * s - total, weights)
            positive = minimum < 0                                       # there is no such minimum
            scale = torch.where(positive, _ratio(ws, ss), scale).clamp(min=0)
            minimum = minimum.clamp(min=0)
            error = self._sum((scale * steps).sub_(minimum).sub_(w).square_())
            best = tuple(torch.where(error < least, new, old) for new, old in zip((scale, minimum), best))
            least = torch.minimum(error, least)
        return best[0][..., 0], best[1][..., 0]

    # ---- a block: integers times a float16 ---------------------------------------------------------------------------

    def _move_integers(self) -> None:
        """Every group to the best of the scales and minima next to its own."""
        (least, most), before = self.form.scales, (self.scales, self.minima)
        best, smallest = before, torch.full_like(self.scales, torch.inf)
        for up in (0, -1, 1):
            for more in (0, -1, 1) if self.form.middle is None else (0,):
                scales, minima = (before[0] + up).clamp(least, most), (before[1] + more).clamp(0, most)
                error = self._sum(self._rounded(scales, minima)[0].sub_(self.w).square_())[..., 0]
                best = tuple(torch.where(error < smallest, new, old) for new, old in zip((scales, minima), best))
                smallest = torch.minimum(error, smallest)
        self.scales, self.minima = best

    def _refit_halves(self) -> None:
        """The two float16 of every block to where the squared error of the codes as they are is least, if it helps."""
        value, steps = self._rounded(self.scales, self.minima)
        before = self._of_blocks(self._sum(value.sub_(self.w).square_()))
        a, b = self.scales[..., None] * steps, self.minima[..., None].expand_as(steps)
        aa, wa = self._of_blocks(self._sum(a * a)), self._of_blocks(self._sum(self.w * a))
        if self.form.middle is not None:
            d, m = _ratio(wa, aa), self.m
        else:
            ab, bb, wb = (self._of_blocks(self._sum(x)) for x in (a * b, b * b, self.w * b))
            d, m = (_ratio(x, aa * bb - ab * ab) for x in (wa * bb - wb * ab, wa * ab - wb * aa))
        old = self.d, self.m
        self.d, self.m = _half(d), _half(m)
        after = self._of_blocks(self._sum(self._rounded(self.scales, self.minima)[0].sub_(self.w).square_()))
        better = after < before
        self.d, self.m = (torch.where(better, new, kept) for new, kept in zip((self.d, self.m), old))

    def _rounded(self, scales: torch.Tensor, minima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights on the grid nearest to `w`, their codes counted from the middle)."""
        scale, minimum = (self.d * scales)[..., None], (self.m * minima)[..., None]
        middle = self.form.middle or 0
        steps = _ratio(self.w + minimum, scale).round_().clamp_(-middle, self.form.top - middle)
        return (scale * steps).sub_(minimum), steps

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return (values * self.importance).sum(-1, keepdim=True)

    @staticmethod
    def _of_blocks(groups: torch.Tensor) -> torch.Tensor:
        """[rows, blocks, groups, 1] to their sums [rows, blocks, 1]."""
        return groups.sum(2)


def _half(values: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half().to(values.dtype)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The quotient, and 0 where it has none."""
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))


def quantize(weight: torch.Tensor, hessian: torch.Tensor, kinds: list[str], rel_damp: float = 1e-2,
             block_size: int = 128) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    """Quantize a layer to each of the types, which have one block size or divide the largest, making up for every
    column's error in the columns after it.

    weight: float32 [out, in], with `in` a multiple of that size; hessian: [in, in]. Returns each type's bytes, uint8
    [out, bytes a row]; the dequantized weights, transposed and stacked [in, types * out]; the relative damping used.
    """
    rows, forms = len(weight), [TYPES[kind] for kind in kinds]
    size = max(form.block for form in forms)
    u, damping = inverse_factor(hessian, rel_damp)
    u = u.to(weight.dtype)
    importance = u.diagonal().square().reciprocal()
    importance = importance / importance.mean()
    w = weight.T.contiguous().repeat(1, len(kinds))
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    top = torch.cat([w.new_full((rows,), form.top) for form in forms])
    fits: list[list[Fit]] = [[] for _ in kinds]
    for _, inner, err in lazy_sweep(w, u, block_size, size):
        offset = inner.start % size
        if offset == 0:
            reached, spread = slice(inner.start, inner.start + size), []
            for kind, form, found, part in zip(kinds, forms, fits, w[reached].split(rows, dim=1)):
                shape = (size // form.block, form.block // form.group, form.group)
                found.append(Fit(form, part.T.contiguous().view(rows, *shape), importance[reached].view(shape)))
                spread.append([grid.T.repeat_interleave(form.group, 0) for grid in
                               grids(kind, found[-1].parts(codes.new_empty(rows, 0)))])
            scale, minimum = (torch.cat(grid, dim=1) for grid in zip(*spread))
        here = slice(offset, offset + inner.stop - inner.start)
        round_columns(w[inner], u[inner, inner], scale[here], minimum[here], top, err, codes[inner])
    packed = []
    for kind, found, own in zip(kinds, fits, codes.T.split(rows)):
        parts = [fit.parts(part) for fit, part in zip(found, own.split(size, dim=1))]
        packed.append(encode(kind, Parts(*(None if field[0] is None else torch.cat(field, dim=1)
                                           for field in zip(*parts)))))
    return packed, w, damping


def round_columns(w: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, top: torch.Tensor,
                  err: torch.Tensor, codes: torch.Tensor) -> None:
    """Round to the grid scale * code - minimum, code in 0..top, column after column.

    w, err and codes (uint8) [n, rows] are written; u [n, n]; scale and minimum float32 [n, rows]; top float32 [rows].
    """
    divisor = torch.where(scale == 0, torch.inf, scale)      # such a group has one value, and code 0
    for j, (weight, code, e, d) in enumerate(zip(w, codes, err, u.diagonal())):
        column = torch.addmm(weight[None], u[:j, j:j + 1].T, err[:j], alpha=-1)[0]
        rounded = (column + minimum[j]).div_(divisor[j]).round_().clamp_(top.new_zeros(()), top)
        code.copy_(rounded)
        torch.sub(rounded.mul_(scale[j]), minimum[j], out=weight)
        torch.sub(column, weight, out=e).div_(d)


def solve_layer(name: str, weight: torch.Tensor, hessian: torch.Tensor, args: argparse.Namespace
                ) -> tuple[dict[float, tuple[Packed, dict]], float | None]:
    """bits a weight -> (packed tensors, manifest entry) of a layer, and the relative damping that was needed."""
    weight = weight.float()
    wanted = (fitting(K_QUANTS[bits], weight.shape[1]) for bits in args.bitwidth_options)
    kinds = sorted(dict.fromkeys(wanted), key=level_of)
    if kinds == ["F16"]:
        half = weight.half()
        packed, dequantized, damping = [half.view(torch.uint8)], half.float().T, None
    else:
        packed, dequantized, damping = quantize(weight, hessian, kinds, args.rel_damp, args.block_size)
    errors = output_errors(weight.T.contiguous(), dequantized.split(len(weight), dim=1), hessian)
    return {level_of(kind): ({"blocks": data}, {"bits": 8 * data.numel(), "overhead_bits": 0, "type": kind,
                                                "error": error})
            for kind, data, error in zip(kinds, packed, errors)}, damping
