"""OWL, outlier-weighed layer-wise sparsity (Yin et al., 2024, arXiv 2310.05175), as levels of a database.

    python -m baselines.owl --model_name_or_path meta-llama/Meta-Llama-3-8B --sparse_weights_path db --select_by kl

A block's share of outliers, weights with |W_ij| ‖X_j‖₂ above M times their mean over the block, decides how sparse it
is: the more, the less, over a range of 2 lambda about the database's sparsity. Each layer takes the level nearest to
its block's sparsity, such that exactly as many weights are kept as at level 0 everywhere. Writes owl-<lambda>-<M>.txt
for every point of the grid and, with --select_by, the one that does best on the calibration tokens as owl.txt.
"""
import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from database.levels import LevelSwitcher, open_database
from database.store import Database
from utils.allocation import allocate
from utils.configs import write_level_config
from utils.errors import RunError, user_errors
from utils.experts import Layer, eager, inputs_seen
from utils.files import check_writable, write_atomic
from utils.fitness import Fitness, default_microbatch_tokens
from utils.flags import add_calibration_flags, add_model_flags, check_calibration_flags
from utils.inputs import decoder_of, documents_of, tokenizer_of
from utils.model import load_config
from utils.report import format_table


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_calibration_flags(parser, tokens=524288)
    group = parser.add_argument_group("OWL")
    group.add_argument("--sparse_weights_path", required=True, metavar="FOLDER",
                       help="database built by python -m database.sparsegpt; its level 0 is the budget")
    group.add_argument("--owl_lambda", type=float, nargs="+", default=[0.02, 0.05, 0.08, 0.1, 0.2], metavar="SHARE",
                       help="half of the range of the blocks' sparsities (default: 0.02 0.05 0.08 0.1 0.2)")
    group.add_argument("--owl_m", type=float, nargs="+", default=[3, 5, 7, 10], metavar="M",
                       help="outliers are above M times the mean (default: 3 5 7 10)")
    group.add_argument("--select_by", choices=["kl", "ppl"],
                       help="choose the point of the grid with the lowest KL divergence or perplexity on the "
                            "calibration tokens (default: measure none)")
    group.add_argument("--level_cache_gb", type=float, default=24.0, metavar="GB",
                       help="packed levels kept on the device; the rest is read from disk (default: 24)")
    group.add_argument("--seed", type=int, default=0, help="of the calibration tokens' choice (default: 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--save_dir", default="baseline_configs", metavar="FOLDER",
                        help="write the configurations and owl.json there (default: baseline_configs)")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    check_calibration_flags(args)
    for flag in ("owl_lambda", "owl_m"):
        for value in getattr(args, flag):
            if not value > 0:
                raise ValueError(f"--{flag} {value:g}: must be above 0")


@contextmanager
def input_norms(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[dict[str, torch.Tensor]]:
    """layer -> ‖X_j‖₂, float32 [in], over all tokens that pass through it inside the context, in `model`."""
    squares = {name: torch.zeros(layer.in_features, device=layer.weight.device) for name, layer in layers.items()}

    def add(name: str, x: torch.Tensor) -> None:
        squares[name] += x.float().flatten(0, -2).square().sum(0)

    hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
             for name, layer in layers.items() if isinstance(layer, nn.Module)]
    norms: dict[str, torch.Tensor] = {}
    try:
        with eager(model), inputs_seen(layers, add):
            yield norms
    finally:
        for handle in hooks:
            handle.remove()
    norms.update({name: square.sqrt() for name, square in squares.items()})


def outlier_shares(weights: Sequence[torch.Tensor], norms: Sequence[torch.Tensor], multiples: Sequence[float]
                   ) -> list[float]:
    """Share of a block's weights with |W_ij| ‖X_j‖₂ above each multiple of the block's mean (OWL, equation 1).

    weights: [out, in] of every layer of the block; norms: float32 [in].
    """
    size = sum(weight.numel() for weight in weights)
    mean = sum((weight.float().abs().sum(0) @ norm).item() for weight, norm in zip(weights, norms)) / size
    above = [0] * len(multiples)
    for weight, norm in zip(weights, norms):
        scores = weight.float().abs() * norm
        above = [count + (scores > multiple * mean).sum().item() for count, multiple in zip(above, multiples)]
    return [count / size for count in above]


def block_sparsities(shares: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsity of every block: falling linearly with its share of outliers over a range of 2 `spread`, their mean,
    weighted by the blocks' `sizes` in weights, exactly `sparsity`."""
    low, high = min(shares), max(shares)
    above = [2 * spread * (share - low) / (high - low) if high > low else 0.0 for share in shares]
    mean = sum(size * value for size, value in zip(sizes, above)) / sum(sizes)
    return [sparsity + mean - value for value in above]


def nearest_levels(database: Database, sparsities: Mapping[str, float]) -> tuple[dict[str, int], int]:
    """The level of every layer, least squares in weights kept from its sparsity and in all as many as at level 0; and
    the number of layers whose sparsity lies beyond their levels."""
    kept = [{level: database.kept(name, level) for level in database.levels(name)} for name in sparsities]
    wanted = [(1 - sparsity) * math.prod(database.shape(name)) for name, sparsity in sparsities.items()]
    errors = [{level: (count - want) ** 2 for level, count in counts.items()} for counts, want in zip(kept, wanted)]
    levels = allocate(errors, kept, sum(counts[0] for counts in kept), exact=True)
    step = database.manifest["flags"]["weights_diff"]
    beyond = sum(not min(counts.values()) - step / 2 <= want <= max(counts.values()) + step / 2
                 for counts, want in zip(kept, wanted))
    return dict(zip(sparsities, levels)), beyond


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict:
    """Write the configurations of the flags; returns what owl.json holds."""
    args = parse_arguments(argv)
    with user_errors():
        check_flags(args)
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        database = open_database(args, "sparse", config)
        check_writable(args.save_dir, "--save_dir")
        documents = documents_of(args, config, tokenizer_of(args))
        decoder = decoder_of(args)
        switcher = LevelSwitcher(decoder, database, args.level_cache_gb)

    layers = {name: decoder.layers[name] for name in database.layers}
    tokens = args.microbatch_tokens or default_microbatch_tokens(decoder)    # which may try the model out
    while True:
        with input_norms(decoder.model, layers) as norms:       # the uncompressed model's pass over all documents
            fitness = Fitness(decoder, documents, switcher.set_block, microbatch_tokens=tokens,
                              progress="uncompressed model on calibration data")
        if fitness.microbatch_tokens == tokens:
            break
        tokens = fitness.microbatch_tokens       # memory ran out, so that norms have some inputs twice: once more
    blocks = [names for names in switcher.names if names]
    shares = [outlier_shares([layers[name].weight for name in names], [norms[name] for name in names], args.owl_m)
              for names in blocks]           # [blocks, multiples]
    sizes = [sum(layers[name].weight.numel() for name in names) for names in blocks]
    sparsity = 1 - sum(database.kept(name, 0) for name in database.layers) / sum(sizes)

    grid, configurations = [], []
    for m, of_blocks in zip(args.owl_m, zip(*shares)):
        for spread in args.owl_lambda:
            asked = block_sparsities(of_blocks, sizes, sparsity, spread)
            levels, beyond = nearest_levels(database, {name: block for names, block in zip(blocks, asked)
                                                       for name in names})
            given = [1 - sum(database.kept(name, levels[name]) for name in names) / size
                     for names, size in zip(blocks, sizes)]
            grid.append({"lambda": spread, "m": m, "file": f"owl-{spread:g}-{m:g}.txt", "asked": asked, "given": given,
                         "beyond": beyond})
            configurations.append(levels)
            write_level_config(f"{args.save_dir}/{grid[-1]['file']}", levels)

    result = {"model": args.model_name_or_path, "database": str(database.path), "sparsity": sparsity,
              "outliers": {f"{m:g}": of_blocks for m, of_blocks in zip(args.owl_m, zip(*shares))}, "grid": grid}
    if args.select_by:
        for point, levels in zip(grid, configurations):    # one by one: each takes other levels of nearly all layers
            [(point[args.select_by],)] = fitness.measure([switcher.states(levels)], kinds=(args.select_by,))
            print(f"lambda {point['lambda']:g}, M {point['m']:g}: {args.select_by} {point[args.select_by]:.5f}",
                  flush=True)
        best = min(range(len(grid)), key=lambda i: grid[i][args.select_by])
        write_level_config(f"{args.save_dir}/owl.txt", configurations[best])
        result["best"] = grid[best]["file"]
    write_atomic(f"{args.save_dir}/owl.json", json.dumps(result) + "\n")

    print(format_table([["lambda", "M", "block sparsity from", "to", "asked from", "to", "layers beyond",
                         args.select_by or ""],
                        *[[f"{point['lambda']:g}", f"{point['m']:g}",
                           *[f"{pick(point[key]):.2%}" for key in ("given", "asked") for pick in (min, max)],
                           point["beyond"], point.get(args.select_by, "")] for point in grid]]))
    if any(point["beyond"] for point in grid):
        print("layers beyond: asked for more than the database's levels reach; rebuild it with a larger --num_levels")
    print(f"saved: {args.save_dir}" + (f", best {result['best']} as owl.txt" if args.select_by else ""))
    return result


if __name__ == "__main__":
    main()
