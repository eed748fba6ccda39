"""Do sub-blocks' harms add up? Candidates near a measured start: their KL divergence, and what the model of --refine
predicts for them, with pairs and without.

    python benchmarks/interactions.py --plot benchmarks/interactions.png

Every sub-block is dropped or restored alone in the start (evo_drop.py --init measured), which is all that the model
knows. Its predictions and the measurements are on the same text, so that they differ by the model alone. Candidates of
more than three times the start's divergence, which drop what nothing can do without, are left out.
"""
import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)          # not this folder, whose database.py is another
import matplotlib
from matplotlib import pyplot

import evo_drop
from utils import flags
from utils.interactions import quadratic
from utils.model import load_config
from utils.report import format_table
from utils.screening import AdditiveModel, rank_correlation
from utils.search import Search


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--data", default="stdlib", help="calibration text")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.375], help="of sub-blocks dropped")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=60, help="mutations of the start by up to 3 switches")
    parser.add_argument("--plot", type=Path, help="picture to write")
    return parser.parse_args()


def compare(args: argparse.Namespace, share: float, folder: str) -> dict[str, list[float]]:
    """Of every candidate what is predicted, with pairs and without, and what is measured."""
    of_search = evo_drop.parse_arguments([
        "--model_name_or_path", args.model_name_or_path, "--calibration_data", args.data, "--calibration_tokens",
        str(2 * args.tokens), "--calibration_sequence_length", str(args.sequence_length), "--initial_tokens",
        str(args.tokens // 2), "--tokens_per_selection", "2", str(args.tokens), "--init", "measured", "--no_eval",
        "--sparsity", str(share), "--output_dir", folder])
    flags.check_search_flags(of_search)
    search = Search("interactions", of_search, load_config(args.model_name_or_path), {})
    search.load()
    blocks = search.decoder.blocks
    space = evo_drop.build_space(of_search, [(block.attn.size, block.mlp.size) for block in blocks])
    search.prepare(lambda index, state: blocks[index].drop(*(state or (False, False))),
                   lambda candidate: space.states(candidate, len(blocks)), logged=lambda candidate: {})
    [start] = evo_drop.first_candidates(of_search, search, space, lambda candidates, tokens, minibatch: list(
        zip(search.measure(candidates, minibatch), candidates)))
    minibatch, rng = search.draw(args.tokens), random.Random(0)
    search.draw = lambda tokens: minibatch
    model = AdditiveModel(space.levels)
    evo_drop.measure_pairs(of_search, search, space, model, start, args.tokens)
    near = evo_drop.draw_distinct(lambda: evo_drop.mutate(space, [start], 3, rng), args.candidates, {start})
    before, *measured = search.measure([start, *near], minibatch)
    indices = model.columns.indices([start, *near])
    predicted = {name: quadratic(model.effects, pairs, indices)
                 for name, pairs in (("with pairs", model.pairs), ("sum of each alone", None))}
    kept = [i for i, value in enumerate(measured) if value < 3 * before]
    return {name: [values[i + 1] - values[0] + before for i in kept] for name, values in predicted.items()} | {
        "measured": [measured[i] for i in kept]}


def main() -> None:
    args = parse_arguments()
    rows = [["dropped", "model", "candidates", "rank correlation", "typical error"]]
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(1, len(args.shares), figsize=(4.5 * len(args.shares), 4), layout="constrained",
                                   squeeze=False)
    for axis, share in zip(axes[0], args.shares):
        with tempfile.TemporaryDirectory() as folder:
            found = compare(args, share, folder)
        measured = found.pop("measured")
        for (name, values), color in zip(found.items(), ("tab:blue", "tab:gray")):
            error = statistics.median(abs(a / b - 1) for a, b in zip(values, measured))
            rows.append([f"{share:.1%}", name, len(values), rank_correlation(values, measured), f"{error:.1%}"])
            axis.scatter(values, measured, s=12, color=color, label=f"{name}: {rows[-1][3]:.2f}")
        axis.axline((min(measured), min(measured)), slope=1, color="black", linewidth=0.5)
        axis.set(title=f"{share:.1%} dropped", xlabel="predicted KL", ylabel="measured KL")
        axis.legend(title="rank correlation", fontsize=8)
    print(format_table(rows))
    if args.plot:
        figure.savefig(args.plot, dpi=80)


if __name__ == "__main__":
    main()
