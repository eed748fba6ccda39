"""All bitwidths of every linear layer, by GPTQ (arXiv 2210.17323) in one pass over the model.

    python -m database.gptq --model_name_or_path meta-llama/Meta-Llama-3-8B --bitwidth_options 2 3 4 5 6 \\
        --calibration_bitwidth 3 --group_size 128 --perchannel --save_dir db/llama3-gptq
"""
import argparse

import torch

from database.build import add_build_flags, build, run
from database.packing import Packed, pack_quantized
from database.solver import inverse_factor, lazy_sweep, output_energy, quantize_columns, round_to_grid

SMALLEST_SCALE = 2.0**-24        # above zero in half precision
SHRINKS = [1 - step / 100 for step in range(80)]


def fit_grid(w: torch.Tensor, top: torch.Tensor, perchannel: bool = True, sym: bool = False, mse: bool = False,
             importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of the grids scale * (code - zero), code in 0..top, over some columns of a layer.

    w: [columns, levels or 1, out]; top: [levels, 1], 2**bits - 1. The grid spans minimum, maximum and zero of a row, or
    of all rows without `perchannel`; symmetric ones have their zero at 2**bits / 2. With `mse` the range is shrunk to
    where the squared rounding error, weighted by `importance` [columns], is least.
    Returns scale, already rounded to half precision, and zero, an integer: float32 [levels, out or 1].
    """
    over = (0,) if perchannel else (0, 2)
    low, high = (w.amin(over, keepdim=True)[0].clamp(max=0), w.amax(over, keepdim=True)[0].clamp(min=0))
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)

    def grid(shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = ((high - low) * shrink / top).half().float().clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max)
        zero = ((top + 1) / 2).expand_as(scale) if sym else (-low * shrink / scale).round().minimum(top)
        return scale, zero

    if not mse:
        return grid(1.0)
    scale, zero = grid(1.0)
    least = torch.full_like(scale, torch.inf)
    for shrink in SHRINKS:
        s, z = grid(shrink)
        error = (round_to_grid(w, s, z, top).sub_(z).mul_(s).sub_(w)).square_()
        error = (error * importance[:, None, None]).sum(over, keepdim=True)[0]
        better = error < least
        scale, zero, least = torch.where(better, s, scale), torch.where(better, z, zero), torch.where(better, error, least)
    return scale, zero


def quantize(weight: torch.Tensor, hessian: torch.Tensor, bitwidths: list[int], group_size: int | None = None,
             perchannel: bool = True, sym: bool = False, act_order: bool = False, mse: bool = False,
             rel_damp: float = 1e-2, block_size: int = 128
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Quantize a layer to each of `bitwidths`, making up for every column's error in the columns after it.

    weight: float32 [out, in]; hessian: [in, in]. Without groups there is one grid a row from the original weights; a
    group's grid comes from the updated weights when its first column is reached. `act_order` takes the columns in order
    of falling Hessian diagonal, with the groups' grids from the original weights; the result is in the given order.
    Returns codes uint8 and dequantized float32, both transposed and stacked [in, levels * out]; scales float16 and zeros
    uint8 [groups, levels, out or 1]; and the relative damping used.
    """
    (rows, columns), levels = weight.shape, len(bitwidths)
    top = torch.tensor([2.0**bits - 1 for bits in bitwidths], device=weight.device)[:, None]
    row_top = top.expand(levels, rows).flatten()
    size = min(group_size or columns, columns)
    order = torch.arange(columns, device=weight.device)
    group = order // size
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian, group = hessian[order][:, order], group[order]
    u, damping = inverse_factor(hessian, rel_damp)
    importance = u.diagonal().square().reciprocal()
    w = weight.T[order].repeat(1, levels)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)

    static = act_order or size == columns
    if static:
        original, natural = weight.T[:, None], torch.empty_like(importance).index_copy_(0, order, importance)
        grids = [fit_grid(original[i:i + size], top, perchannel, sym, mse, natural[i:i + size])
                 for i in range(0, columns, size)]
    else:
        grids = []
    for block, inner, err in lazy_sweep(w, u, block_size, None if static else size):
        if not static and inner.start % size == 0:
            reached = slice(inner.start, inner.start + size)
            grids.append(fit_grid(w[reached].view(-1, levels, rows), top, perchannel, sym, mse, importance[reached]))
        scale, zero = (torch.stack([grids[g][part] for g in group[inner]]).expand(-1, levels, rows).flatten(1)
                       for part in (0, 1))
        quantize_columns(w[inner], u[inner, inner], scale, zero, row_top, err, codes[inner])
    codes, w = (torch.empty_like(t).index_copy_(0, order, t) for t in (codes, w)) if act_order else (codes, w)
    scales, zeros = (torch.stack([grid[part] for grid in grids]) for part in (0, 1))
    return codes, w, scales.half(), zeros.to(torch.uint8), damping


def solve_layer(weight: torch.Tensor, hessian: torch.Tensor, args: argparse.Namespace
                ) -> tuple[dict[int, tuple[Packed, dict]], float]:
    """bitwidth -> (packed tensors, manifest entry) of a layer, and the relative damping that was needed."""
    w, rows = weight.float(), len(weight)
    codes, dequantized, scales, zeros, damping = quantize(
        w, hessian, args.bitwidth_options, args.group_size, args.perchannel, args.sym, args.act_order, args.mse,
        args.rel_damp, args.block_size)
    energy = output_energy(w.T, hessian)
    levels = {}
    for i, bits in enumerate(args.bitwidth_options):
        columns = slice(i * rows, (i + 1) * rows)
        packed = pack_quantized(codes[:, columns].T, scales[:, i].T.contiguous(), zeros[:, i].T.contiguous(), bits)
        error = output_energy(w.T - dequantized[:, columns], hessian)
        levels[bits] = packed, {"bits": bits * weight.numel(), "overhead_bits": 24 * packed["scales"].numel(),
                                "error": error / energy if energy else 0.0}
    return levels, damping


def resolve(args: argparse.Namespace, config) -> None:
    """Nothing depends on the model."""


def main(args: argparse.Namespace) -> None:
    args.bitwidth_options = sorted(set(args.bitwidth_options))
    words = " ".join(map(str, args.bitwidth_options))
    if not all(1 <= bits <= 8 for bits in args.bitwidth_options):
        raise ValueError(f"--bitwidth_options {words}: must be from 1 to 8, e.g. 2 3 4 5 6")
    if args.calibration_bitwidth not in args.bitwidth_options:
        raise ValueError(f"--calibration_bitwidth {args.calibration_bitwidth}: must be one of --bitwidth_options {words}")
    if args.group_size is not None and args.group_size < 1:
        raise ValueError(f"--group_size {args.group_size}: must be at least 1 column, e.g. 128; leave it out for one "
                         f"grid a row")
    build(args, "gptq", "quantizable_modules", solve_layer, resolve, args.calibration_bitwidth)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m database.gptq", description=__doc__.split("\n")[0])
    add_build_flags(parser, "--quantizable_modules")
    group = parser.add_argument_group("levels")
    group.add_argument("--bitwidth_options", type=int, nargs="+", default=[2, 3, 4, 5, 6], metavar="BITS",
                       help="from 1 to 8 (default: 2 3 4 5 6)")
    group.add_argument("--calibration_bitwidth", type=int, default=3, metavar="BITS",
                       help="one of the above, whose weights give the next block's inputs (default: 3, as in the paper)")
    group.add_argument("--group_size", type=int, metavar="COLUMNS",
                       help="inputs that share a scale, e.g. 128; the last group may be smaller (default: all of them)")
    group.add_argument("--perchannel", action="store_true", help="a grid for every output row, not one for all rows")
    group.add_argument("--sym", action="store_true", help="symmetric grids: zero at code 2^bits / 2")
    group.add_argument("--act_order", action="store_true",
                       help="columns by falling Hessian diagonal; weights are saved in their own order")
    group.add_argument("--mse", action="store_true",
                       help="shrink each grid's range to where the rounding error is least; helps at 2 and 3 bits")
    return parser


if __name__ == "__main__":
    run(make_parser(), main)
