"""All sparsity levels of every linear layer, by SparseGPT (arXiv 2301.00774) in one pass over the model.

    python -m database.sparsegpt --model_name_or_path meta-llama/Meta-Llama-3-8B --sparsity 0.7 --save_dir db/llama3-70
"""
import argparse

import torch

from database.build import add_build_flags, build, run
from database.packing import Packed, pack_sparse
from database.solver import inverse_factor, lazy_sweep, output_errors, prune_columns


def kept_weights(size: int, sparsity: float, num_levels: int, weights_diff: int) -> dict[int, int]:
    """Level -> number of weights kept in a layer of `size` weights.

    Level l prunes round(size * sparsity) + l * weights_diff weights, for l from -num_levels to num_levels as far as
    that lies in 0..size: a step is the same number of weights in every layer.
    """
    pruned = {level: round(size * sparsity) + level * weights_diff for level in range(-num_levels, num_levels + 1)}
    return {level: size - count for level, count in pruned.items() if 0 <= count <= size}


def default_weights_diff(sparsity: float, num_levels: int, hidden_size: int) -> int:
    """½ · min(s, 1−s) / num_levels · hidden_size² weights: half of what a square layer has room for."""
    return int(0.5 * min(sparsity, 1 - sparsity) / max(num_levels, 1) * hidden_size**2)


def prune(weight: torch.Tensor, hessian: torch.Tensor, kept: list[int], rel_damp: float = 1e-2, block_size: int = 128
          ) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Prune a layer to each number of `kept` weights, exactly, and update the weights that stay.

    weight: float32 (or float64) [out, in]; hessian: [in, in]. In each block of columns the weights with the smallest
    w² / U_jj² go (U: upper Cholesky factor of the inverse Hessian), over all rows and columns alike, and blocks share
    `kept` evenly. Returns the pruned weights and what was kept, bool, both transposed and stacked [in, levels * out];
    and the relative damping used.
    """
    rows, columns = weight.shape
    u, damping = inverse_factor(hessian, rel_damp)
    u = u.to(weight.dtype)
    w = weight.T.contiguous().repeat(1, len(kept))
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    for block, inner, err in lazy_sweep(w, u, block_size):
        if inner.start == block.start:
            d = u.diagonal()[block, None]
            for i, count in enumerate(kept):
                level = slice(i * rows, (i + 1) * rows)
                count = _share(count, block.stop, columns) - _share(count, block.start, columns)
                keep[block, level] = _largest((w[block, level] / d).square_(), count)
        prune_columns(w[inner], u[inner, inner], keep[inner], err)
    return w, keep, damping


def _share(kept: int, end: int, columns: int) -> int:
    """Weights kept in the first `end` columns: kept * end / columns rounded, so that the blocks add up to `kept`."""
    return (2 * kept * end + columns) // (2 * columns)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of exactly the `count` largest scores, which comparing with a threshold would not give where scores tie."""
    smallest = scores.flatten().topk(scores.numel() - count, largest=False, sorted=False).indices
    return torch.ones_like(scores, dtype=torch.bool).flatten().scatter_(0, smallest, False).view_as(scores)


def pack_levels(weight: torch.Tensor, hessian: torch.Tensor, kept: dict[int, int], pruned: torch.Tensor,
                keep: torch.Tensor) -> dict[int, tuple[Packed, dict]]:
    """level -> (packed tensors, manifest entry) of what `prune` returns; errors are those of the values as stored."""
    values = [level.to(values_dtype(weight.dtype, level)) for level in pruned.split(len(weight), dim=1)]
    errors = output_errors(weight.float().T.contiguous(), values, hessian)
    masks = keep.split(len(weight), dim=1)
    return {level: (pack_sparse(value.T.contiguous(), mask.T.contiguous()), {"kept": count, "error": error})
            for (level, count), value, mask, error in zip(kept.items(), values, masks, errors)}


def values_dtype(dtype: torch.dtype, values: torch.Tensor) -> torch.dtype:
    """16-bit dtype of kept values: the model's own; float16 for a float32 model; bfloat16 where float16 overflows."""
    overflows = values.abs().max() > torch.finfo(torch.float16).max
    return torch.bfloat16 if dtype == torch.bfloat16 or overflows else torch.float16


def solve_layer(name: str, weight: torch.Tensor, hessian: torch.Tensor, args: argparse.Namespace
                ) -> tuple[dict[int, tuple[Packed, dict]], float]:
    """level -> (packed tensors, manifest entry) of a layer, and the relative damping that was needed."""
    kept = kept_weights(weight.numel(), args.sparsity, args.num_levels, args.weights_diff)
    pruned, keep, damping = prune(weight.float(), hessian, list(kept.values()), args.rel_damp, args.block_size)
    return pack_levels(weight, hessian, kept, pruned, keep), damping


def resolve(args: argparse.Namespace, config) -> None:
    """The default --weights_diff, which depends on the model. Raises ValueError when there can be none."""
    if args.weights_diff is None:
        hidden_size = config.get_text_config(decoder=True).hidden_size
        args.weights_diff = default_weights_diff(args.sparsity, args.num_levels, hidden_size)
    if args.weights_diff < 1 and args.num_levels > 0:
        raise ValueError(f"--weights_diff: the default at --sparsity {args.sparsity:g} and --num_levels "
                         f"{args.num_levels} is no weight at all; give it, e.g. --weights_diff 1000000, or "
                         f"--num_levels 0")


def main(args: argparse.Namespace) -> None:
    if not 0 <= args.sparsity <= 1:
        raise ValueError(f"--sparsity {args.sparsity:g}: must be from 0 to 1, e.g. 0.7")
    if args.num_levels < 0:
        raise ValueError(f"--num_levels {args.num_levels}: must be 0 or more, e.g. 8")
    if args.weights_diff is not None and args.weights_diff < 1:
        raise ValueError(f"--weights_diff {args.weights_diff}: must be at least 1 weight, e.g. 1000000")
    build(args, "sparsegpt", "prunable_modules", solve_layer, resolve, 0 if args.propagate == "compressed" else None)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m database.sparsegpt", description=__doc__.split("\n")[0])
    add_build_flags(parser, "--prunable_modules")
    group = parser.add_argument_group("levels")
    group.add_argument("--sparsity", type=float, required=True, help="share of weights pruned at level 0, e.g. 0.7")
    group.add_argument("--num_levels", type=int, default=8, metavar="LEVELS",
                       help="below and above the target, as many as fit into a layer (default: 8)")
    group.add_argument("--weights_diff", type=int, metavar="WEIGHTS",
                       help="pruned from one level to the next in every layer, e.g. 1000000 "
                            "(default: ½ · min(s, 1-s) / num_levels · hidden_size²)")
    group.add_argument("--propagate", choices=["dense", "compressed"], default="dense",
                       help="weights that the next block's inputs come from: the model's own, as in the paper, or "
                            "those of level 0 (default: dense)")
    return parser


if __name__ == "__main__":
    run(make_parser(), main)
