"""Held-out KL divergence over the tokens a search has spent: the paper's way against --init measured, --screen and
--refine.

    python benchmarks/search_quality.py --out results/search_quality --jobs 2 --write_readme

Three tasks at two budgets each, the demo model by default: 16 offspring, 4 of them on 1,024 tokens after 256, 2 and the
parent on 4,096. Every seed draws other calibration text; all are evaluated on the same held-out text, at shares of the
tokens that the paper's way spends in all. Those are counted as in the paper, candidates times tokens; of the others all
that are run, with the measurements that a start needs and without what is looked up. The others end after fewer
generations, and stay as they are from there on; of a longer run, the first ones are the same. Finished runs are not run
again, and --report makes table and picture from those there are.
"""
import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)          # not this folder, whose database.py is another
import matplotlib
import torch
from matplotlib import pyplot

from benchmarks.programs import claim, group_size, run, run_here, sparsity_step, write_readme
from database.levels import LevelSwitcher
from database.store import Database
from utils.configs import DROP_WORDS
from utils.data import evaluation_documents
from utils.files import write_atomic
from utils.fitness import Fitness
from utils.model import load_decoder, load_tokenizer
from utils.report import format_table

OFFSPRING, SURVIVORS = 16, (4, 2, 1)
PAPER, OURS = "paper's way", "ours"
SCREEN, REFINE, CONFIRM = ["--screen", 4], ["--refine", 2], ["--confirm_tokens"]      # without its number
# what helps beside a measured start
OWN = {"depth": [*SCREEN, *REFINE, *CONFIRM], "sparsity": [*SCREEN, "--refine", 4], "bits": SCREEN}
VARIANTS = {PAPER: ["--initially_generated", 32],
            OURS: ["--init", "measured"],                                  # and OWN
            "measured start alone": ["--init", "measured"],
            "start and screening": ["--init", "measured", *SCREEN],
            "start and refining": ["--init", "measured", *REFINE],
            "start, screening and refining": ["--init", "measured", *SCREEN, *REFINE],
            "start, refining and confirming": ["--init", "measured", *REFINE, *CONFIRM],
            "start and confirming": ["--init", "measured", *CONFIRM],
            "screening alone": ["--initially_generated", 32, *SCREEN]}
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)                # columns of the table
CURVE = (0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 1.0)
ENDS = (0.25, 0.5, 1.0)                             # of what the two are compared with


@dataclass
class Setting:
    task: str
    budget: float

    @property
    def name(self) -> str:
        return {"depth": f"depth {self.budget:.1%}", "sparsity": f"sparsity {self.budget:.0%}",
                "bits": f"{self.budget} bits"}[self.task]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--data", default="stdlib", help="calibration text (default: stdlib)")
    parser.add_argument("--eval_data", help="held-out text (default: of --data)")
    parser.add_argument("--tasks", nargs="+", default=["depth", "sparsity", "bits"],
                        choices=["depth", "sparsity", "bits"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.375], help="of blocks dropped, for depth")
    parser.add_argument("--bitwidths", type=float, nargs="+", default=[2.25, 2.5], help="averages, for bits")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--variants", nargs="+", default=[PAPER, OURS], choices=list(VARIANTS),
                        help="to run and to show beside the paper's way")
    parser.add_argument("--tokens_per_selection", type=int, nargs=3, default=[256, 1024, 4096])
    parser.add_argument("--measure_tokens", type=int, nargs=2, default=[512, 256], metavar=("DEPTH", "LEVELS"),
                        help="--initial_tokens of measured starts (default: such that one takes at most 5%% of what "
                             "the paper's way spends)")
    parser.add_argument("--calibration_tokens", type=int, nargs=2, default=[131072, 32768], metavar=("DEPTH", "LEVELS"),
                        help="for depth evo_drop.py's own: the best on fewer is not the best on other text")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--eval_tokens", type=int, nargs=2, default=[49152, 32768], metavar=("DEPTH", "LEVELS"),
                        help="for depth, where candidates differ little, a third of that misleads: a few documents "
                             "decide")
    parser.add_argument("--generations", type=int, nargs=3, default=[60, 30, 12], metavar=("PAPER", "DEPTH", "LEVELS"),
                        help="of the paper's way, and of the others")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/search_quality"))
    parser.add_argument("--jobs", type=int, default=1, help="searches at once, and evaluations, one thread each")
    parser.add_argument("--dtype", default="auto", help="of searches and evaluation")
    parser.add_argument("--compile", action="store_true", help="run searches with --compile")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--write_readme", nargs="?", const="better", metavar="NAME",
                        help="put the table, and as 'better' the picture, between the <!-- NAME --> marks of "
                             "benchmarks/README.md (default: better)")
    return parser.parse_args()


# ---- runs ------------------------------------------------------------------------------------------------------------


def workers(count: int) -> ProcessPoolExecutor:
    """Processes of one thread each, offline as programs.run's are, and where those are."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}      # which they inherit
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), os.chdir, (ROOT,))


def database_of(setting: Setting, out: Path) -> Path:
    return out / ("quant" if setting.task == "bits" else f"sparse-{setting.budget:g}")


def build(setting: Setting, args: argparse.Namespace) -> None:
    """The database of a setting; one that is finished is left as it is."""
    folder = database_of(setting, args.out)
    flags = ["--model_name_or_path", args.model_name_or_path, "--calibration_data", args.data,
             "--calibration_sequence_length", args.sequence_length, "--calibration_tokens", args.calibration_tokens[1],
             "--save_dir", folder]
    if setting.task == "bits":
        flags = ["-m", "database.gptq", *flags, "--bitwidth_options", 2, 3, 4, 5, 6, "--calibration_bitwidth", 3,
                 "--group_size", group_size(args.model_name_or_path), "--perchannel"]
    else:
        flags = ["-m", "database.sparsegpt", *flags, "--sparsity", setting.budget,
                 "--weights_diff", sparsity_step(args.model_name_or_path)]
    run(flags, args.out / "logs" / f"{folder.name}.log")


def folder_of(setting: Setting, variant: str, seed: int, out: Path) -> Path:
    return out / f"{setting.task}-{setting.budget:g}-{variant.replace(' ', '-').replace(chr(39), '')}-{seed}"


def generations_of(setting: Setting, variant: str, args: argparse.Namespace) -> int:
    paper, depth, levels = args.generations
    return paper if variant == PAPER else depth if setting.task == "depth" else levels


def lacks(task: str, flags: list) -> bool:
    """Whether the task's search lacks some of these flags; for depth it has --screen with --refine alone."""
    refined, screened = "--refine" in flags, "--screen" in flags
    return task == "bits" and refined or task == "depth" and screened and not refined


def search(setting: Setting, variant: str, seed: int, args: argparse.Namespace) -> None:
    folder = folder_of(setting, variant, seed, args.out)
    if (folder / "summary.json").exists() or lacks(setting.task, VARIANTS[variant]):
        return
    levels, tokens = setting.task != "depth", args.tokens_per_selection
    measured = "measured" in VARIANTS[variant]
    flags = ["--model_name_or_path", args.model_name_or_path, "--calibration_data", args.data,
             "--calibration_sequence_length", args.sequence_length,
             "--calibration_tokens", args.calibration_tokens[levels], "--dtype", args.dtype,
             "--offspring", OFFSPRING, "--survivors_per_selection", *SURVIVORS, "--tokens_per_selection", *tokens,
             "--initial_tokens", args.measure_tokens[levels] if measured else tokens[1], "--no_eval",
             "--generations", generations_of(setting, variant, args), "--seed", seed, "--output_dir", folder]
    if args.compile:
        flags += ["--compile"]
    for flag in [*VARIANTS[variant], *(OWN[setting.task] if variant == OURS else ())]:
        flags += [flag, 4 * tokens[-1]] if [flag] == CONFIRM else [flag]
    if setting.task == "depth":
        program, own = "evo_drop.py", ["--sparsity", setting.budget]
    else:
        own = ["--configuration_name", f"{folder.name}.txt"]
        if setting.task == "bits":
            program, own = "evo_quant.py", [*own, "--quant_weights_path", database_of(setting, args.out),
                                            "--target_bitwidth", setting.budget]
        else:
            program, own = "evo_unstructured.py", [*own, "--sparse_weights_path", database_of(setting, args.out)]
    run_here([program, *own, *flags], args.out / "logs" / f"{folder.name}.log")
    print(f"{folder.name} done", flush=True)


# ---- held-out evaluation ---------------------------------------------------------------------------------------------


def records(folder: Path, variant: str, generations: int, tokens_per_selection: Sequence[int]) -> list[dict]:
    """A run's log, up to the last of its generations; of the paper's way with the tokens that it asks for, whether they
    were looked up or run: candidates times tokens, the parent in the last step."""
    asked = sum(map(math.prod, zip((OFFSPRING, *SURVIVORS[:-1]), tokens_per_selection))
                ) + SURVIVORS[-1] * tokens_per_selection[-1]
    log = [record for line in (folder / "log.jsonl").read_text().splitlines()
           if (record := json.loads(line))["generation"] <= generations]
    if variant == PAPER:
        for record in log:
            record["tokens"] = log[0]["tokens"] + record["generation"] * asked
    return log


def candidate_at(log: list[dict], tokens: float) -> str | None:
    """The best candidate when a search had spent that many tokens, as the log writes it; None before the first."""
    known = [record for record in log if record["tokens"] <= tokens]
    return json.dumps(known[-1].get("levels") or known[-1]["dropped"]) if known else None


def heldout(setting: Setting, candidates: list[str], args: argparse.Namespace) -> dict[str, float]:
    """KL divergence, in nats a token, of candidates as the log writes them. Those evaluated before are kept in a
    file."""
    path = args.out / f"KL-{setting.task}-{setting.budget:g}.json"
    tokens = args.eval_tokens[setting.task != "depth"]
    data = args.eval_data or args.data
    text = [args.model_name_or_path, data, tokens, args.sequence_length, args.dtype]
    kept = json.loads(path.read_text()) if path.exists() else {}
    values = kept["KL"] if kept.get("text") == text else {}
    missing = sorted({candidate for candidate in candidates if candidate not in values})
    if missing:
        torch.set_num_threads(1)
        tokenizer = load_tokenizer(args.model_name_or_path, True, False)
        documents = evaluation_documents(data, tokenizer, tokens, args.sequence_length)
        decoder = load_decoder(args.model_name_or_path, args.dtype, "cpu", None, False)
        if setting.task == "depth":
            def set_block(index: int, state: tuple[bool, bool]) -> None:
                decoder.blocks[index].drop(*state)
            states = [tuple(DROP_WORDS[word] for word in json.loads(candidate).split()) for candidate in missing]
        else:
            switcher = LevelSwitcher(decoder, Database.open(database_of(setting, args.out)), 1.0)
            set_block, names = switcher.set_block, [name for block in switcher.names for name in block]
            states = [switcher.states(dict(zip(names, json.loads(candidate)))) for candidate in missing]
        fitness = Fitness(decoder, documents, set_block, progress=f"{setting.name}: uncompressed model")
        values |= zip(missing, (value for value, in fitness.measure(states)))
        write_atomic(path, json.dumps({"text": text, "KL": values}))
    return values


def curves(setting: Setting, args: argparse.Namespace) -> dict[str, list[dict[float, float]]]:
    """Variant -> of every seed that it and the paper's way have finished: share of the paper's tokens -> held-out KL.

    A curve begins with the share that its first candidate took."""
    logs = {variant: {seed: records(folder, variant, generations_of(setting, variant, args),
                                    args.tokens_per_selection)
                      for seed in range(args.seeds)
                      if ((folder := folder_of(setting, variant, seed, args.out)) / "summary.json").exists()}
            for variant in dict.fromkeys([PAPER, *args.variants])}
    found: dict[str, list[dict[float, str]]] = {}
    for variant, runs in logs.items():
        for seed in sorted(set(runs) & set(logs[PAPER])):
            total = logs[PAPER][seed][-1]["tokens"]
            first = runs[seed][0]["tokens"]
            shares = {PAPER: SHARES, OURS: CURVE}.get(variant, ENDS)
            points = {first / total: candidate_at(runs[seed], first)} | {
                share: candidate_at(runs[seed], share * total) for share in shares if share * total > first}
            found.setdefault(variant, []).append(points)
    values = heldout(setting, [c for runs in found.values() for points in runs for c in points.values()], args)
    return {variant: [{share: values[candidate] for share, candidate in points.items()} for points in runs]
            for variant, runs in found.items()}


# ---- table and picture -----------------------------------------------------------------------------------------------


def median_at(runs: list[dict[float, float]], share: float) -> float | None:
    """Median over seeds; None where a seed has no candidate yet."""
    known = [max((s for s in points if s <= share), default=None) for points in runs]
    return None if None in known else statistics.median(points[s] for points, s in zip(runs, known))


def share_to_reach(runs: list[dict[float, float]], goal: float) -> float | None:
    """The least share of tokens at which the median is at most `goal`, of those evaluated."""
    return next((share for share in sorted({s for points in runs for s in points})
                 if (value := median_at(runs, share)) is not None and value <= goal), None)


def table(results: dict[str, dict[str, list[dict[float, float]]]]) -> str:
    rows = [["budget", "search", "seeds", "start after", *[f"{share:.0%}" for share in SHARES], "range at 100%",
             "the paper's end after"]]
    for name, variants in results.items():
        goal = median_at(variants[PAPER], 1.0)
        for variant, runs in variants.items():
            ends = [points[max(points)] for points in runs]
            reached = share_to_reach(runs, goal)
            rows.append([name, variant, len(runs), f"{statistics.median(min(points) for points in runs):.1%}",
                         *[median_at(runs, share) for share in SHARES], f"{min(ends):.4f}–{max(ends):.4f}",
                         "not reached" if reached is None else f"{reached:.1%}"])
    return format_table(rows)


def plot(results: dict[str, dict[str, list[dict[float, float]]]], path: Path) -> None:
    """One panel a budget: median and range over the seeds, of the paper's way and of all of ours."""
    matplotlib.use("Agg")
    columns = -(-len(results) // 2)
    figure, axes = pyplot.subplots(2, columns, figsize=(3.4 * columns, 5.4), layout="constrained", squeeze=False)
    for axis, (name, variants) in zip(axes.T.flat, results.items()):
        for variant, color in ((PAPER, "tab:gray"), (OURS, "tab:blue")):
            runs = variants.get(variant, [])
            if not runs:
                continue
            shares = [share for share in sorted({s for points in runs for s in points}) if median_at(runs, share)]
            at = [[points[max(s for s in points if s <= share)] for points in runs] for share in shares]
            axis.plot(shares, [statistics.median(values) for values in at], color=color, marker=".", label=variant)
            axis.fill_between(shares, [min(values) for values in at], [max(values) for values in at], color=color,
                              alpha=0.2, linewidth=0)
        axis.set(title=name, xscale="log", xlabel="tokens, of what the paper's way spends", ylabel="held-out KL")
        axis.set_xticks([0.03, 0.1, 0.3, 1.0], ["3%", "10%", "30%", "100%"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    args = parse_arguments()
    args.out = args.out.resolve()
    claim(args.out, args, ("model_name_or_path", "data", "sequence_length", "calibration_tokens", "measure_tokens",
                           "tokens_per_selection", "generations", "dtype"))
    budgets = {"depth": args.shares, "sparsity": args.sparsities, "bits": args.bitwidths}
    settings = [Setting(task, budget) for task in args.tasks for budget in budgets[task]]
    began = time.time()
    if not args.report:
        databases = {database_of(setting, args.out): setting for setting in settings if setting.task != "depth"}
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(partial(build, args=args), databases.values()))
        with workers(args.jobs) as pool:
            list(pool.map(partial(search, args=args), *zip(*((setting, variant, seed) for seed in range(args.seeds)
                                                             for variant in args.variants for setting in settings))))
        print(f"databases and searches took {(time.time() - began) / 60:.1f} min", flush=True)
    with workers(args.jobs) as pool:
        found = pool.map(partial(curves, args=args), settings)
        results = {setting.name: of_variants for setting, of_variants in zip(settings, found) if of_variants}
    print(f"all took {(time.time() - began) / 60:.1f} min", flush=True)
    if not results:
        raise SystemExit(f"--variants {' '.join(args.variants)}: {args.out} has no finished run of the paper's way to "
                         f"compare with; add \"{PAPER}\"")
    text = table(results)
    print(text)
    (args.out / "table.md").write_text(text + "\n")
    plot(results, args.out / "search_quality.png")
    if args.write_readme:
        if args.write_readme == "better":
            plot(results, ROOT / "benchmarks" / "search_quality.png")
            text += "\n\n![Held-out KL over tokens, median and range](search_quality.png)"
        write_readme(args.write_readme, text)


if __name__ == "__main__":
    main()
