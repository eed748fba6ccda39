"""A real pretrained model end to end: baselines, the paper's way, the recommended one, finished, and exported.

    python benchmarks/real.py --data wikitext2:wiki.valid.txt --eval_data wikitext2:wiki.test.txt stdlib --write_readme

Two budgets a task unless others are given; ours and the paper's way spend about as many tokens, and few (SEARCH): all
is to end within three hours on two cores. Every seed draws other calibration text and another search; all are evaluated
on the same held-out text, and on text of another kind. What is finished is not run again: parts, budgets and seeds can
be added. The model is SmolLM2-135M-Instruct (benchmarks/real_model.py) unless --model_name_or_path is given.
"""
import argparse
import json
import math
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.finish import Bench
from benchmarks.programs import claim, group_size, run, write_readme
from database.levels import LevelSwitcher
from database.store import Database
from utils.configs import read_drop_config, read_level_config
from utils.data import evaluation_documents
from utils.files import write_atomic
from utils.fitness import Fitness
from utils.model import load_decoder, load_tokenizer
from utils.report import format_table
from utils.units import level_map

SEARCH = ["--offspring", 16, "--survivors_per_selection", 4, 2, 1, "--tokens_per_selection", 128, 512, 2048,
          "--no_eval"]
RANDOM = ["--initially_generated", 32, "--initial_tokens", 512]
PAPER = {"depth": [*RANDOM, "--generations", 6], "sparse": [*RANDOM, "--generations", 6],
         "quant": [*RANDOM, "--generations", 6]}
OURS = {"depth": ["--init", "measured", "--initial_tokens", 128, "--refine", 1, "--screen", 4, "--confirm_tokens", 4096,
                  "--generations", 3],
        "sparse": ["--init", "measured", "--initial_tokens", 64, "--screen", 4, "--generations", 5],
        "quant": ["--init", "measured", "--initial_tokens", 64, "--screen", 4, "--generations", 5]}
BASELINE_TOKENS = 4096
SCORES = {"cosine_similarity": "ShortGPT", "perplexity": "Shortened Llama"}
COLORS = {"uniform": "tab:gray", "the paper's way": "tab:orange", "recommended": "tab:blue",
          "recommended, finished": "tab:green", "DP over layer errors": "tab:purple", "OWL": "tab:brown",
          "ShortGPT": "tab:red", "Shortened Llama": "tab:pink"}
PROGRAMS = {"depth": "evo_drop.py", "sparse": "evo_unstructured.py", "quant": "evo_quant.py"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="default: fetch SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="stdlib", help="calibration text (default: stdlib)")
    parser.add_argument("--eval_data", nargs="+", default=["stdlib"], help="held-out text (default: stdlib)")
    parser.add_argument("--parts", nargs="+", default=["depth", "bits", "sparsity"],
                        choices=["depth", "bits", "sparsity"])
    parser.add_argument("--recommended_alone", action="store_true", help="leave out the paper's way")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25], help="of blocks dropped, for depth")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--bitwidths", type=float, nargs="+", default=[2.5, 3.0], help="averages, for bits")
    parser.add_argument("--dtype", default="auto", help="of all but evaluation, which is in float32 (default: the "
                                                        "model's own)")
    parser.add_argument("--calibration_tokens", type=int, default=16384)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--eval_tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--steps", type=int, default=50, help="of finish.py (default: 50)")
    parser.add_argument("--end_to_end_steps", type=int, default=0, help="of finish.py (default: 0)")
    parser.add_argument("--batch_size", type=int, default=4, help="of finish.py (default: 4)")
    parser.add_argument("--no_finish", action="store_true", help="finish and export nothing more")
    parser.add_argument("--out", type=Path, default=Path("results/real"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="at once, one thread each")
    parser.add_argument("--write_readme", nargs="?", const="real", metavar="NAME",
                        help="put the table between the <!-- NAME --> marks of benchmarks/README.md, and its picture "
                             "there, too (default: real)")
    return parser.parse_args()


class Real(Bench):
    """What is run once for each budget."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.text += ["--dtype", args.dtype]

    def database(self, kind: str, target: float) -> Path:
        if kind == "quant":
            return self.once("quant", [
                "-m", "database.gptq", *self.text, "--bitwidth_options", 2, 3, 4, 5, 6, "--calibration_bitwidth", 3,
                "--group_size", group_size(self.args.model_name_or_path), "--perchannel", "--mse"])
        return self.once(f"sparse-{target}", ["-m", "database.sparsegpt", *self.text, "--sparsity", target])

    def budget(self, kind: str, target: float) -> dict[str, dict]:
        """way -> {"files": configurations, "tokens", "seconds"}, of baselines one file, of searches one a seed."""
        few = ["--calibration_tokens", BASELINE_TOKENS]
        if kind == "depth":
            folder = self.once("-".join(["scores", *map(str, self.args.shares)]), [
                "-m", "baselines.drop_scores", *self.text, *few, "--scoring_method", *SCORES, "--sparsities",
                *self.args.shares])
            ways = {name: [folder / f"{score}-{target:g}.txt"] for score, name in SCORES.items()}
            own = ["--sparsity", target]
        else:
            folder = self.database(kind, target)
            own = [f"--{kind}_weights_path", folder]
            budget = ["--target_bitwidth" if kind == "quant" else "--target_sparsity", target]
            ways = {"uniform": [self.uniform(folder, int(target) if kind == "quant" else 0)]
                    } if kind == "sparse" or target == int(target) else {}
            if kind == "sparse":
                owl = self.once(f"owl-{target}", ["-m", "baselines.owl", *self.text, *few, "--owl_m", 5, "--owl_lambda",
                                                  0.05, 0.1, "--select_by", "kl", *own])
                ways["OWL"] = [owl / "owl.txt"]
            dp = self.once(f"dp-{kind}-{target}", ["-m", "baselines.dp", "--model_name_or_path",
                                                   self.args.model_name_or_path, *own, *budget])
            ways["DP over layer errors"] = [dp / f"dp-manifest-{target:g}.txt"]
            if kind == "quant":
                own += [*budget, "--group_rule", "none"]
        ways = {way: {"files": files} for way, files in ways.items()}
        for way, flags in (("the paper's way", PAPER), ("recommended", OURS))[self.args.recommended_alone:]:
            names = [f"{kind}-{target}-{way.split()[-1]}-{seed}" for seed in range(self.args.seeds)]
            folders = [self.once(name, [
                PROGRAMS[kind], *self.text, *SEARCH, *flags[kind], *own, "--seed", seed,
                *([] if kind == "depth" else ["--configuration_name", f"{name}.txt"])])
                for seed, name in enumerate(names)]
            summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
            ways[way] = {"files": [folder / ("layer_drop_config.txt" if kind == "depth" else f"{name}.txt")
                                   for folder, name in zip(folders, names)],
                         "tokens": statistics.median(summary["tokens"] for summary in summaries),
                         "seconds": statistics.median(summary["seconds"] for summary in summaries)}
        return ways

    def uniform(self, database: Path, level: int) -> Path:
        file = self.out / f"{database.name}-uniform-{level}.txt"
        if not file.exists():
            write_atomic(file, "".join(f"{name}: {level}\n" for name in Database.open(database).layers))
        return file

    def measure(self, kind: str, target: float, ways: dict[str, dict]) -> None:
        """Put {text: {"kl", "ppl"}} of every file into its way's "values"; all of a budget in one walk."""
        path = self.out / f"values-{kind}-{target}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        contents = {file: file.read_text() for way in ways.values() for file in way["files"]}
        missing = {text: file for file, text in contents.items() if text not in known}
        if missing:
            model = self.args.model_name_or_path
            with self.locks["loading"]:                  # transformers loads one model at a time
                decoder, tokenizer = load_decoder(model, "float32", "cpu"), load_tokenizer(model)
            if kind == "depth":
                def set_block(index: int, state: tuple[bool, bool]) -> None:
                    decoder.blocks[index].drop(*state)
                states = [tuple(read_drop_config(file)) for file in missing.values()]
            else:
                switcher = LevelSwitcher(decoder, Database.open(self.database(kind, target)), 1.0)
                set_block, states = switcher.set_block, [switcher.states(read_level_config(file))
                                                         for file in missing.values()]
            found = {text: {} for text in missing}
            fitness = {name: Fitness(decoder, evaluation_documents(name, tokenizer, self.args.eval_tokens,
                                                                   self.args.sequence_length), set_block)
                       for name in self.args.eval_data}              # all while the model is uncompressed
            for name, of_text in fitness.items():
                dense = of_text.teacher_perplexity()
                for text, (kl, ppl) in zip(missing, of_text.measure(states, kinds=("kl", "ppl"))):
                    found[text][name] = {"kl": kl, "ppl": ppl, "dense": dense}
            known |= found
            write_atomic(path, json.dumps(known))
        for way in ways.values():
            way["values"] = [known[contents[file]] for file in way["files"]]

    def finished(self, kind: str, target: float, ways: dict[str, dict]) -> None:
        """Add what finish.py makes of the recommended search's first seed, exported, and the export's size."""
        file, name = ways["recommended"]["files"][0], f"{kind}-{target}-finished"
        result = self.out / f"{name}.json"
        if self.args.no_finish and not result.exists():
            return
        flags = ["--drop_config", file] if kind == "depth" else [
            f"--{kind}_weights_path", self.database(kind, target), f"--{kind}_config_path", file]
        folder = self.finish(name, flags, 0)
        if kind == "depth":
            exported = folder
        else:
            exported = self.once(f"{name}-export", [
                "export.py", "--model_name_or_path", self.args.model_name_or_path, f"--{kind}_weights_path", folder,
                f"--{kind}_config_path", file, "--dtype", "float16"])
        if not result.exists():
            run(["eval_config.py", *self.model, "--eval_datasets", *self.args.eval_data, "--eval_tokens",
                 self.args.eval_tokens, "--eval_sequence_length", self.args.sequence_length, "--checkpoint", exported,
                 "--output", result], self.out / "logs" / f"eval-{name}.log")
        values = json.loads(result.read_text())
        ways["recommended, finished"] = {
            "files": [file], "seconds": float((self.out / f"{name}.seconds").read_text()),
            "values": [{text: {**value, "dense": values["dense"][text]["ppl"] if "dense" in values else None}
                        for text, value in values["compressed"].items()}],
            "bytes": sum(part.stat().st_size for part in exported.glob("*.safetensors"))}


def winners_map(bench: Real, kind: str, target: float, file: Path) -> tuple[list[list[float]], list[str]]:
    """([rows, blocks], rows): what is dropped, sparsity or bits, by kind of layer and depth."""
    if kind == "depth":
        return [list(half) for half in zip(*read_drop_config(file))], ["attention", "MLP"]
    database, levels = Database.open(bench.database(kind, target)), read_level_config(file)
    values = {name: level if kind == "quant" else 1 - database.kept(name, level) / math.prod(database.shape(name))
              for name, level in levels.items()}
    blocks: dict[str, list[str]] = {}
    for name in database.layers:
        blocks.setdefault(re.search(r"\.\d+\.", name).group(), []).append(name)
    return level_map([*blocks.values()], values)


def plot(bench: Real, results: dict[tuple[str, float], dict[str, dict]], text: str, path: Path) -> None:
    """A column a task: perplexity over the budget, by way, the uncompressed model as a line; below, what the
    recommended search chose at the one in the middle."""
    matplotlib.use("Agg")
    kinds = list(dict.fromkeys(kind for kind, _ in results))
    figure, axes = pyplot.subplots(2, len(kinds), figsize=(4.6 * len(kinds), 5.2), layout="constrained", squeeze=False,
                                   height_ratios=[3, 2])
    labels = {"depth": "share of sub-blocks dropped", "sparse": "sparsity", "quant": "bits a weight"}
    for (axis, picture), kind in zip(axes.T, kinds):
        targets = sorted(target for other, target in results if other == kind)
        for way in dict.fromkeys(way for target in targets for way in results[kind, target]):
            known = {target: results[kind, target][way]["values"] for target in targets if way in results[kind, target]}
            points = [(target, statistics.median(values[text]["ppl"] for values in seeds))
                      for target, seeds in known.items()]
            axis.plot(*zip(*points), marker="o", label=way, color=COLORS.get(way))
        axis.axhline(results[kind, targets[0]]["recommended"]["values"][0][text]["dense"], color="black", linewidth=0.8,
                     linestyle="--", label="uncompressed")
        axis.set(xlabel=labels[kind], ylabel="perplexity", xticks=targets, yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=7)
        middle = targets[len(targets) // 2]
        values, rows = winners_map(bench, kind, middle, results[kind, middle]["recommended"]["files"][0])
        image = picture.imshow(values, aspect="auto", interpolation="nearest")
        picture.set_yticks(range(len(rows)), [row.rpartition(".")[2] for row in rows], fontsize=7)
        picture.set(xlabel="block", title=f"recommended, {middle} {labels[kind]}")
        picture.title.set_fontsize(8)
        if kind != "depth":
            figure.colorbar(image, ax=picture)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    args = parse_arguments()
    args.out = args.out.resolve()
    claim(args.out, args, ("model_name_or_path", "data", "eval_data", "dtype", "calibration_tokens", "sequence_length",
                           "eval_tokens", "steps", "end_to_end_steps", "batch_size"))
    if args.model_name_or_path is None:
        folder = args.out / "SmolLM2-135M-Instruct"
        if not (folder / "tokenizer.json").exists():
            run([ROOT / "benchmarks" / "real_model.py", folder], args.out / "logs" / "model.log")
        args.model_name_or_path = str(folder)
    torch.set_num_threads(1)                         # a budget's evaluation, of which there are --jobs at once
    bench = Real(args)
    budgets = [(kind, target) for kind, part, targets in (
        ("depth", "depth", args.shares), ("quant", "bits", args.bitwidths), ("sparse", "sparsity", args.sparsities))
        if part in args.parts for target in targets]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(budgets, pool.map(lambda budget: bench.budget(*budget), budgets)))
        list(pool.map(lambda item: bench.measure(*item[0], item[1]), results.items()))
        list(pool.map(lambda item: bench.finished(*item[0], item[1]), results.items()))

    names = {"depth": "{:.1%} depth", "sparse": "{:.0%} sparsity", "quant": "{} bits"}
    labels = [name.partition(":")[0] for name in args.eval_data]
    columns = ("KL", "range", "ppl") if args.seeds > 1 else ("KL", "ppl")
    rows = [["budget", "configuration", *[f"{label} {column}" for label in labels for column in columns],
             "tokens", "minutes", "MB"]]
    for (kind, target), ways in results.items():
        for way, known in ways.items():
            row = [names[kind].format(target), way]
            for text in args.eval_data:
                kl = [values[text]["kl"] for values in known["values"]]
                span = [f"{min(kl):.4f}–{max(kl):.4f}" if len(kl) > 1 else None] if args.seeds > 1 else []
                row += [statistics.median(kl), *span,
                        statistics.median(values[text]["ppl"] for values in known["values"])]
            rows.append([*row, f"{known['tokens']:,.0f}" if "tokens" in known else None,
                         known["seconds"] / 60 if "seconds" in known else None,
                         f"{known['bytes'] / 1e6:.0f}" if "bytes" in known else None])
    table = format_table(rows)
    dense = next(iter(results.values()))["recommended"]["values"][0]
    table += "\n\nUncompressed: perplexity " + ", ".join(f"{dense[text]['dense']:.2f} ({label})"
                                                         for text, label in zip(args.eval_data, labels))
    print(table)
    (args.out / "table.md").write_text(table + "\n")
    plot(bench, results, args.eval_data[0], args.out / "real.png")
    if args.write_readme:
        picture = f"{args.write_readme}.png"
        plot(bench, results, args.eval_data[0], ROOT / "benchmarks" / picture)
        write_readme(args.write_readme, table + f"\n\n![Perplexity over budget, and what was chosen]({picture})")


if __name__ == "__main__":
    main()
