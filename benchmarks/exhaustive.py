"""Does the search find the optimum? On a model small enough to evaluate every candidate, compare the two.

    python benchmarks/exhaustive.py --model_name_or_path MODEL --calibration_data TEXT

Depth: every way to drop --drop_attn attentions and --drop_mlp MLPs. Bits: every way to give the blocks bitwidths of
--bitwidths with the middle one as the average. Sparsity: every way to give them levels of at most --max_level that add
up to 0. All candidates are measured on the whole calibration set; then each seed's search, selecting on that same set,
is compared with the best of them, and the distinct candidates it has evaluated are counted.
"""
import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])   # not this folder, whose database.py is another
import evo_drop
import evo_quant
import evo_unstructured
from utils import search
from utils.fitness import Fitness, mean_of
from utils.report import format_table


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="demo/model")
    parser.add_argument("--calibration_data", default="stdlib", help="dataset or local text")
    parser.add_argument("--calibration_tokens", type=int, default=4096)
    parser.add_argument("--calibration_sequence_length", type=int, default=256)
    parser.add_argument("--task", choices=["depth", "sparsity", "bits"], default="depth")
    parser.add_argument("--drop_attn", type=int, default=2)
    parser.add_argument("--drop_mlp", type=int, default=2)
    parser.add_argument("--bitwidths", type=int, nargs=3, default=[2, 3, 4], metavar=("LOW", "TARGET", "HIGH"))
    parser.add_argument("--quant_weights_path", help="of --task bits: a database with those bitwidths")
    parser.add_argument("--max_level", type=int, default=1)
    parser.add_argument("--sparse_weights_path", help="of --task sparsity: a database with those levels either way")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--offspring", type=int, default=5)
    parser.add_argument("--initially_generated", type=int, default=5)
    parser.add_argument("--init", choices=["uniform", "random", "measured"],
                        help="of the search (default: the search's)")
    parser.add_argument("--screen", type=int, default=1, help="of the search")
    parser.add_argument("--refine", type=int, default=0, help="of the search for depth or sparsity")
    return parser.parse_args(argv)


class RecordingFitness(Fitness):
    """The fitness walk, which also keeps the value of every candidate it has ever measured."""
    seen: dict = {}

    def sums(self, candidates, minibatch, kinds=("kl",)):
        sums = super().sums(candidates, minibatch, kinds)
        self.seen.update((tuple(candidate), mean_of(values, minibatch, kinds[0]))
                         for candidate, values in zip(candidates, sums[..., 0].T.tolist()))
        return sums

    def changes(self, candidates, minibatch, around):
        sums, changes = super().changes(candidates, minibatch, around)
        self.seen.update((tuple(candidate), mean_of(values, minibatch, "kl"))
                         for candidate, values in zip(candidates, sums.T.tolist()))
        return sums, changes


class ExhaustiveFitness(RecordingFitness):
    """Measures all candidates of the space first, on all documents; `everything` is set by `main`."""
    everything = None
    values: dict = {}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        candidates = self.everything(self.decoder)
        self.values.update(zip(candidates, (value for value, in Fitness.measure(self, candidates))))


def depth_candidates(decoder, drop_attn: int, drop_mlp: int) -> list[tuple]:
    blocks = range(len(decoder.blocks))
    return [tuple((i in attn, i in mlp) for i in blocks) for attn in itertools.combinations(blocks, drop_attn)
            for mlp in itertools.combinations(blocks, drop_mlp)]


def level_candidates(decoder, levels: Sequence[int], average: int) -> list[tuple]:
    """All allocations of a level a block with exactly that average (blocks are of equal size)."""
    widths = [len(block.layers) for block in decoder.blocks]
    return [tuple((level,) * width for level, width in zip(allocation, widths))
            for allocation in itertools.product(levels, repeat=len(widths))
            if sum(allocation) == average * len(widths)]


def main(argv: list[str] | None = None) -> int:
    """Prints a table; returns the number of seeds whose search found the optimum."""
    args = parse_arguments(argv)
    tokens = str(args.calibration_tokens)
    common = ["--model_name_or_path", args.model_name_or_path, "--calibration_data", args.calibration_data,
              "--calibration_tokens", tokens, "--calibration_sequence_length", str(args.calibration_sequence_length),
              "--survivors_per_selection", "1", "--tokens_per_selection", tokens, "--initial_tokens", tokens,
              "--no_eval", "--initially_generated", str(args.initially_generated), "--offspring", str(args.offspring)]
    if args.task == "depth":
        module, everything = evo_drop, lambda decoder: depth_candidates(decoder, args.drop_attn, args.drop_mlp)
        common += ["--drop_attn", str(args.drop_attn), "--drop_mlp", str(args.drop_mlp)]
    elif args.task == "sparsity":
        module = evo_unstructured
        everything = partial(level_candidates, levels=range(-args.max_level, args.max_level + 1), average=0)
        common += ["--sparse_weights_path", args.sparse_weights_path or "", "--max_level", str(args.max_level),
                   "--tie", "block", "--refine", str(args.refine)]
    else:
        module, everything = evo_quant, partial(level_candidates, levels=args.bitwidths, average=args.bitwidths[1])
        low, target, high = args.bitwidths
        common += ["--quant_weights_path", args.quant_weights_path or "", "--target_bitwidth", str(target),
                   "--tie", "block", "--bounds", f"*={low}:{high}"]

    options = ["--init", args.init] if args.init else []
    options += ["--screen", str(args.screen)]
    options += ["--refine", str(args.refine)] if args.task == "depth" else []

    ExhaustiveFitness.everything = staticmethod(everything)
    rows, found, fitness_class = [["seed", "optimum found", "candidates evaluated", "of", "KL found",
                                   "KL optimum"]], 0, search.Fitness
    try:
        search.Fitness = ExhaustiveFitness                   # in a run of its own: it leaves the model compressed
        with tempfile.TemporaryDirectory() as folder:
            module.main([*common, "--generations", "0", "--output_dir", folder])
        search.Fitness = RecordingFitness
        for seed in range(args.seeds):
            RecordingFitness.seen.clear()
            with tempfile.TemporaryDirectory() as folder:
                run = ["--seed", str(seed), "--generations", str(args.generations), "--output_dir", folder]
                module.main([*common, *options, *run])
            seen, values = RecordingFitness.seen, ExhaustiveFitness.values
            best_seen, best = min(seen.keys() & values, key=values.get), min(values, key=values.get)
            found += best_seen == best
            rows.append([seed, "yes" if best_seen == best else "no", len(seen), len(values), values[best_seen],
                         values[best]])
    finally:
        search.Fitness = fitness_class
    print(format_table(rows))
    print(f"optimum found in {found} of {args.seeds} seeds; at most {max(row[2] for row in rows[1:])} of {rows[1][3]} "
          f"candidates evaluated")
    return found


if __name__ == "__main__":
    main()
