"""All bitwidths of every linear layer, by GPTQ (arXiv 2210.17323) in one pass over the model.

    python -m database.gptq --model_name_or_path meta-llama/Meta-Llama-3-8B --bitwidth_options 2 3 4 5 6 \\
        --calibration_bitwidth 3 --group_size 128 --perchannel --save_dir db/llama3-gptq
"""
import argparse

import torch

from database import kquant
from database.build import add_build_flags, build, run
from database.packing import Packed, pack_quantized
from database.solver import inverse_factor, lazy_sweep, output_errors, quantize_columns
from formats.kquants import K_QUANTS, level_of

SMALLEST_SCALE = 2.0**-24        # above zero in half precision
SHRINKS = [1 - step / 100 for step in range(80)]


def fit_grid(w: torch.Tensor, top: torch.Tensor, perchannel: bool = True, sym: bool = False, mse: bool = False,
             importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of the grids scale * (code - zero), code in 0..top, that some columns of a layer share.

    w: [columns, levels or 1, out]; top: [levels, 1], 2**bits - 1. The grid spans minimum, maximum and zero of a row, or
    of all rows without `perchannel`; symmetric ones have their zero at 2**bits / 2. With `mse` the range is shrunk to
    where the squared rounding error, weighted by `importance` [columns], is least.
    Returns scale, already rounded to half precision, and zero, an integer: [levels, out or 1] in w's dtype.
    """
    over = (0,) if perchannel else (0, 2)
    low, high = (w.amin(over, keepdim=True)[0].clamp(max=0), w.amax(over, keepdim=True)[0].clamp(min=0))
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)

    def grid(shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = ((high - low) * shrink / top).half().to(w.dtype).clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max)
        zero = ((top + 1) / 2).expand_as(scale) if sym else (-low * shrink / scale).round().minimum(top)
        return scale, zero

    if not mse:
        return grid(1.0)
    scale, zero = grid(1.0)
    least = torch.full_like(scale, torch.inf)
    for shrink in SHRINKS:
        s, z = grid(shrink)
        rounded = torch.div(w, s).round_().clamp_(-z, top - z).mul_(s)
        error = rounded.sub_(w).square_().mul_(importance[:, None, None]).sum(over, keepdim=True)[0]
        better = error < least
        scale, zero, least = (torch.where(better, new, old) for new, old in ((s, scale), (z, zero), (error, least)))
    return scale, zero


def quantize(weight: torch.Tensor, hessian: torch.Tensor, bitwidths: list[int], group_size: int | None = None,
             perchannel: bool = True, sym: bool = False, act_order: bool = False, mse: bool = False,
             rel_damp: float = 1e-2, block_size: int = 128
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Quantize a layer to each of `bitwidths`, making up for every column's error in the columns after it.

    weight: float32 (or float64) [out, in]; hessian: [in, in]. Without groups there is one grid a row from the original
    weights; a group's grid comes from the updated weights when its first column is reached. `act_order` takes the
    columns in order of falling Hessian diagonal, with the groups' grids from the original weights; the result is in the
    columns' own order. Returns codes uint8 and dequantized weights, both transposed and stacked [in, levels * out];
    scales float16 and zeros uint8 [groups, levels, out or 1]; and the relative damping used.
    """
    (rows, columns), levels = weight.shape, len(bitwidths)
    top = weight.new_tensor([2**bits - 1 for bits in bitwidths])[:, None]
    row_top = top.expand(levels, rows).flatten()
    size = min(group_size or columns, columns)
    order = torch.arange(columns, device=weight.device)
    group = order // size
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian, group = hessian[order][:, order], group[order]
    u, damping = inverse_factor(hessian, rel_damp)
    u = u.to(weight.dtype)
    importance = u.diagonal().square().reciprocal()
    w = weight.T[order].contiguous().repeat(1, levels)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)

    scales, zeros = w.new_empty(2, -(-columns // size), levels * rows).unbind()

    def set_grid(g: int, values: torch.Tensor, weights: torch.Tensor) -> None:
        for grids, part in zip((scales, zeros), fit_grid(values, top, perchannel, sym, mse, weights)):
            grids[g] = part.expand(levels, rows).flatten()

    static = act_order or size == columns
    if static:
        natural = torch.empty_like(importance).index_copy_(0, order, importance)
        for g, start in enumerate(range(0, columns, size)):
            set_grid(g, weight.T[start:start + size, None], natural[start:start + size])
    for _, inner, err in lazy_sweep(w, u, block_size, None if static else size):
        if not static and inner.start % size == 0:
            reached = slice(inner.start, inner.start + size)
            set_grid(inner.start // size, w[reached].view(-1, levels, rows), importance[reached])
        g = group[inner]
        quantize_columns(w[inner], u[inner, inner], scales[g], zeros[g], row_top, err, codes[inner])
    if act_order:
        codes, w = (torch.empty_like(t).index_copy_(0, order, t) for t in (codes, w))
    scales, zeros = (grids.view(-1, levels, rows)[:, :, :rows if perchannel else 1] for grids in (scales, zeros))
    return codes, w, scales.half(), zeros.to(torch.uint8), damping


def pack_levels(weight: torch.Tensor, hessian: torch.Tensor, bitwidths: list[int], codes: torch.Tensor,
                dequantized: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
                ) -> dict[int, tuple[Packed, dict]]:
    """bitwidth -> (packed tensors, manifest entry) of what `quantize` returns."""
    errors = output_errors(weight.float().T.contiguous(), dequantized.split(len(weight), dim=1), hessian)
    levels = {}
    for i, (bits, code, error) in enumerate(zip(bitwidths, codes.split(len(weight), dim=1), errors)):
        packed = pack_quantized(code.T.contiguous(), scales[:, i].T.contiguous(), zeros[:, i].T.contiguous(), bits)
        levels[bits] = packed, {"bits": bits * code.numel(), "overhead_bits": 24 * packed["scales"].numel(),
                                "error": error}
    return levels


def solve_layer(name: str, weight: torch.Tensor, hessian: torch.Tensor, args: argparse.Namespace
                ) -> tuple[dict[int, tuple[Packed, dict]], float]:
    """bitwidth -> (packed tensors, manifest entry) of a layer, and the relative damping that was needed."""
    *quantized, damping = quantize(weight.float(), hessian, args.bitwidth_options, args.group_size, args.perchannel,
                                   args.sym, args.act_order, args.mse, args.rel_damp, args.block_size)
    return pack_levels(weight, hessian, args.bitwidth_options, *quantized), damping


def resolve(args: argparse.Namespace, config) -> None:
    """Nothing depends on the model."""


def main(args: argparse.Namespace) -> None:
    args.bitwidth_options = sorted(set(args.bitwidth_options))
    words = " ".join(map(str, args.bitwidth_options))
    k_quant = args.grid == "k-quant"
    if k_quant and not set(args.bitwidth_options) <= set(K_QUANTS):
        raise ValueError(f"--bitwidth_options {words}: the K-quants are of {', '.join(map(str, K_QUANTS))} bits")
    for flag in ("group_size", "perchannel", "sym", "act_order", "mse") if k_quant else ():
        if getattr(args, flag):
            raise ValueError(f"--{flag}: K-quants have groups, rows and ranges of their own; leave it out with "
                             f"--grid k-quant")
    if not all(1 <= bits <= 8 for bits in args.bitwidth_options):
        raise ValueError(f"--bitwidth_options {words}: must be from 1 to 8, e.g. 2 3 4 5 6")
    if args.embedding_bitwidths and not set(args.embedding_bitwidths) <= set(K_QUANTS if k_quant else range(1, 9)):
        raise ValueError(f"--embedding_bitwidths {' '.join(map(str, args.embedding_bitwidths))}: must be "
                         f"{'K-quants, which are of ' + ', '.join(map(str, K_QUANTS)) if k_quant else 'from 1 to 8'} "
                         f"bits, e.g. 4 6 8")
    if args.calibration_bitwidth not in args.bitwidth_options:
        raise ValueError(f"--calibration_bitwidth {args.calibration_bitwidth}: must be one of --bitwidth_options "
                         f"{words}")
    if args.group_size is not None and args.group_size < 1:
        raise ValueError(f"--group_size {args.group_size}: must be at least 1 column, e.g. 128; leave it out for one "
                         f"grid a row")
    for flag, default in (("grid", "uniform"), ("embedding_bitwidths", None)):
        if getattr(args, flag) == default:           # databases of before there was a choice are the same
            delattr(args, flag)
    if k_quant:
        build(args, "gptq", "quantizable_modules", kquant.solve_layer, resolve,
              level_of(K_QUANTS[args.calibration_bitwidth]))
        return
    if not args.perchannel:
        print("without --perchannel all rows of a layer share their grid, which loses much at few bits; the paper has "
              "--group_size 128 --perchannel")
    build(args, "gptq", "quantizable_modules", solve_layer, resolve, args.calibration_bitwidth)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m database.gptq", description=__doc__.split("\n")[0])
    add_build_flags(parser, "--quantizable_modules")
    group = parser.add_argument_group("levels")
    group.add_argument("--grid", choices=["uniform", "k-quant"], default="uniform",
                       help="k-quant: the levels are llama.cpp's Q2_K to Q6_K and Q8_0, for export.py --format gguf, "
                            "called by their real bits: 2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5; rows that 256 does not "
                            "divide take the types that llama.cpp takes (default: uniform)")
    group.add_argument("--bitwidth_options", type=int, nargs="+", default=[2, 3, 4, 5, 6], metavar="BITS",
                       help="from 1 to 8 (default: 2 3 4 5 6)")
    group.add_argument("--embedding_bitwidths", type=int, nargs="+", metavar="BITS",
                       help="of the embedding and the head, e.g. 4 6 8: they are searched, too, and a small model's "
                            "file is small only with them; MLX and GGUF hold them (default: they stay as they are)")
    group.add_argument("--calibration_bitwidth", type=int, default=3, metavar="BITS",
                       help="one of the above; its weights give the next block's inputs (default: 3, as in the paper)")
    group.add_argument("--group_size", type=int, metavar="COLUMNS",
                       help="inputs that share a scale, e.g. 128; the last group may be smaller (default: all)")
    group.add_argument("--perchannel", action="store_true", help="a grid for every output row, not one for all rows")
    group.add_argument("--sym", action="store_true", help="symmetric grids: zero at code 2^bits / 2")
    group.add_argument("--act_order", action="store_true",
                       help="columns by falling Hessian diagonal; weights are saved in their own order")
    group.add_argument("--mse", action="store_true",
                       help="shrink each grid's range to where the rounding error is least; helps at 2 and 3 bits")
    return parser


if __name__ == "__main__":
    run(make_parser(), main)
