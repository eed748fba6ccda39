"""Dynamic programming over layer errors that are taken to add up, which the paper shows that they do not.

    python -m baselines.dp --model_name_or_path meta-llama/Meta-Llama-3-8B --quant_weights_path db --target_bitwidth 3
    python -m baselines.dp --model_name_or_path meta-llama/Meta-Llama-3-8B --sparse_weights_path db --errors kl

The error of a layer at a level is its relative output error ‖(W−Ŵ)X‖²/‖WX‖² from the database's manifest, or with
--errors kl the KL divergence from the uncompressed model when that layer alone is at that level. Of all levels that
meet the budget those with the least sum are found exactly. Writes dp-<errors>-<target>.txt, `layer.name: level` a line.
"""
import argparse
import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction

from database.levels import LevelSwitcher, open_database
from database.sensitivity import layer_errors, measure_alone
from database.store import Database
from utils.allocation import allocate, interpolate
from utils.configs import parse_level, write_level_config
from utils.errors import RunError, user_errors
from utils.files import check_writable, write_atomic
from utils.fitness import Fitness
from utils.flags import add_calibration_flags, add_model_flags, check_calibration_flags
from utils.inputs import decoder_of, documents_of, tokenizer_of
from utils.model import load_config
from utils.report import format_table

Errors = dict[str, dict[int, float]]     # layer -> level -> error


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_calibration_flags(parser, tokens=16384)
    budget = parser.add_argument_group("budget: one of the two databases and its targets")
    budget.add_argument("--sparse_weights_path", metavar="FOLDER", help="database of python -m database.sparsegpt")
    budget.add_argument("--target_sparsity", type=float, nargs="+", metavar="FRACTION",
                        help="share of weights pruned, exceeded by less than a step of one layer, e.g. 0.55 "
                             "(default: that of level 0, exactly)")
    budget.add_argument("--quant_weights_path", metavar="FOLDER", help="database of python -m database.gptq")
    budget.add_argument("--target_bitwidth", type=float, nargs="+", metavar="BITS",
                        help="average bits a weight, never exceeded, e.g. 2.25 2.5 3")
    budget.add_argument("--count_overhead", action="store_true", help="count the bits of scales and zeros too")
    errors = parser.add_argument_group("errors")
    errors.add_argument("--errors", choices=["manifest", "kl"], default="manifest",
                        help="the database's layer errors, or KL of each layer alone at each level, measured on the "
                             "calibration tokens (default: manifest, which needs no model and no tokens)")
    errors.add_argument("--measured_levels", type=parse_level, nargs="+", metavar="LEVEL",
                        help="of --errors kl: measure only these, or the outermost of a layer with fewer, and take "
                             "the others to follow the layer's error, e.g. -8 -4 0 4 8, or 2 3 for bits (default: all)")
    errors.add_argument("--level_cache_gb", type=float, default=0.0, metavar="GB",
                        help="packed levels kept on the device (default: 0, since each is used once a microbatch)")
    errors.add_argument("--seed", type=int, default=0, help="of the calibration tokens' choice (default: 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--save_dir", default="baseline_configs", metavar="FOLDER",
                        help="write the configurations and dp-<errors>.json there (default: baseline_configs)")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    if bool(args.sparse_weights_path) == bool(args.quant_weights_path):
        raise ValueError(f"--sparse_weights_path {args.sparse_weights_path}, --quant_weights_path "
                         f"{args.quant_weights_path}: give one of the two databases")
    if args.quant_weights_path and (not args.target_bitwidth or args.target_sparsity):
        raise ValueError("--quant_weights_path: its budget is --target_bitwidth, e.g. --target_bitwidth 2.5")
    if args.sparse_weights_path and (args.target_bitwidth or args.count_overhead):
        raise ValueError("--sparse_weights_path: its budget is --target_sparsity; --target_bitwidth and "
                         "--count_overhead are for quantization")
    for flag in ("target_sparsity", "target_bitwidth"):
        for value in getattr(args, flag) or ():
            if not 0 <= value < math.inf:
                raise ValueError(f"--{flag} {value}: an average of 0 or more is needed")
    if args.measured_levels and args.errors != "kl":
        raise ValueError(f"--measured_levels {' '.join(map(str, args.measured_levels))}: nothing is measured; add "
                         f"--errors kl or leave it out")
    if args.errors == "kl":
        check_calibration_flags(args)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def costs_of(database: Database, count_overhead: bool) -> list[dict[int, int]]:
    """level -> bits, or weights kept, of every layer."""
    if database.method == "sparsegpt":
        return [{level: database.kept(name, level) for level in database.levels(name)} for name in database.layers]
    return [{level: database.bits(name, level, count_overhead) for level in database.levels(name)}
            for name in database.layers]


def solve(database: Database, errors: Errors, target: float | None, count_overhead: bool = False) -> dict[str, int]:
    """Level by layer with the least sum of errors at a target: bits a weight, or a sparsity; None: that of level 0.

    Raises ValueError, naming the flag, for a target beyond what the levels allow.
    """
    sparse = database.method == "sparsegpt"
    costs = costs_of(database, count_overhead)
    weights = sum(math.prod(database.shape(name)) for name in database.layers)
    lowest, highest = (sum(pick(cost.values()) for cost in costs) for pick in (min, max))
    if target is None and not all(0 in cost for cost in costs):
        raise ValueError(f"--target_sparsity: {database.path} has layers without level 0, whose sparsity is what is "
                         f"taken where there is none; give one")
    if target is None:
        budget = sum(cost[0] for cost in costs)
    else:
        exact = Fraction(str(target))        # 0.55 as written, not the nearest binary number
        budget = math.floor(((1 - exact) if sparse else exact) * weights)
    if sparse and target is not None:        # a step is the same number of weights in every layer
        step = math.gcd(*(high - low for cost in costs for low, high in itertools.pairwise(sorted(cost.values()))))
        budget -= (budget - lowest) % step if step else 0
    if not lowest <= budget <= highest:
        ends = sorted((1 - cost / weights if sparse else cost / weights) for cost in (lowest, highest))
        raise ValueError(f"--target_{'sparsity' if sparse else 'bitwidth'} {target}: the database's levels allow "
                         f"averages from {ends[0]:.4g} to {ends[1]:.4g}; choose one between")
    levels = allocate([errors[name] for name in database.layers], costs, budget, exact=sparse)
    return dict(zip(database.layers, levels))


# ---- errors ----------------------------------------------------------------------------------------------------------


def manifest_errors(database: Database) -> Errors:
    """Relative output error of every layer at every level, as the database was built."""
    return {name: layer_errors(database, [name], database.levels(name)) for name in database.layers}


def levels_to_measure(levels: Sequence[int], grid: Sequence[int] | None) -> list[int]:
    """A layer's levels on the grid, points beyond its outermost levels moved there.

    Raises ValueError for fewer than two where the layer has more.
    """
    if grid is None:
        return list(levels)
    chosen = sorted({min(max(point, levels[0]), levels[-1]) for point in grid} & set(levels))
    if len(chosen) < min(2, len(levels)):
        raise ValueError(f"--measured_levels {' '.join(map(str, grid))}: {len(chosen)} of a layer's levels "
                         f"{' '.join(map(str, levels))}; give two or more")
    return chosen


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict:
    """Write the configurations of the flags; returns what dp-<errors>.json holds."""
    args = parse_arguments(argv)
    with user_errors():
        check_flags(args)
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        database = open_database(args, "sparse" if args.sparse_weights_path else "quant", config)
        check_writable(args.save_dir, "--save_dir")
        targets = args.target_sparsity or args.target_bitwidth or [None]
        errors = manifest_errors(database)
        solutions = [solve(database, errors, target, args.count_overhead) for target in targets]
        levels = {name: levels_to_measure(database.levels(name), args.measured_levels) for name in database.layers}
        if args.errors == "kl":              # only now: targets that cannot be met have been refused
            documents = documents_of(args, config, tokenizer_of(args))
            decoder = decoder_of(args)
            switcher = LevelSwitcher(decoder, database, args.level_cache_gb)

    if args.errors == "kl":
        fitness = Fitness(decoder, documents, switcher.set_block, microbatch_tokens=args.microbatch_tokens,
                          progress="uncompressed model on calibration data")
        measured = measure_alone(fitness, switcher, [[name] for name in levels], list(levels.values()))
        errors = {name: interpolate(divergences, errors[name]) for name, divergences in zip(levels, measured)}
        solutions = [solve(database, errors, target, args.count_overhead) for target in targets]

    costs = dict(zip(database.layers, costs_of(database, args.count_overhead)))
    weights = sum(math.prod(database.shape(name)) for name in database.layers)
    rows = []
    for target, solution in zip(targets, solutions):
        cost = sum(costs[name][level] for name, level in solution.items()) / weights
        achieved = 1 - cost if database.method == "sparsegpt" else cost
        file = f"dp-{args.errors}-{achieved if target is None else target:g}.txt"
        write_level_config(f"{args.save_dir}/{file}", solution)
        rows.append({"target": target, "achieved": achieved, "file": file,
                     "sum of errors": sum(errors[name][level] for name, level in solution.items())})
    result = {"model": args.model_name_or_path, "database": str(database.path), "errors": errors, "solutions": rows}
    write_atomic(f"{args.save_dir}/dp-{args.errors}.json", json.dumps(result) + "\n")
    print(format_table([list(rows[0]), *[[*row.values()] for row in rows]]))
    print(f"saved: {args.save_dir}")
    return result


if __name__ == "__main__":
    main()
