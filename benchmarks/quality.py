"""Quality at equal budget on the demo model, several seeds: each search against what it must beat.

    python benchmarks/quality.py --out results/quality --jobs 2 --write_readme

Depth at 25% and 37.5%: best of 64 random candidates, and blocks ranked by every score of baselines/. Sparsity at 50, 60
and 70%: uniform, OWL. Bits at 2.25 and 2.5: best of 32 random allocations; at 3: uniform. Both: dynamic programming
over the database's layer errors, and over the KL divergence of each layer alone. Bits may move between layers of unlike
size (--group_rule none): in a small model, uniform can be the best that layers of one size can do among themselves; and
at 3 bits, where uniform is hard to beat, searches take three times as many generations. Each seed draws other
calibration text and another search; all are evaluated on the same held-out text. Finished parts are not run again.
"""
import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from benchmarks.finish import Bench
from benchmarks.programs import claim, group_size, sparsity_step, write_readme
from utils.report import format_table

DEPTH = ["--generations", 20, "--offspring", 24, "--tokens_per_selection", 1024, 8192,
         "--survivors_per_selection", 2, 1, "--initially_generated", 64, "--initial_tokens", 1024]
LEVELS = ["--offspring", 16, "--tokens_per_selection", 512, 2048, 4096, "--survivors_per_selection", 4, 2, 1,
          "--initial_tokens", 1024, "--calibration_tokens", 32768]
LEVELS_EVALUATION = 16384        # tokens
BASELINE_TOKENS = 8192           # of the calibration text
SCORES = {"cosine_similarity": "ShortGPT", "window_cosine_similarity": "window cosine",
          "norm_ratio": "weight subcloning", "perplexity": "Shortened Llama", "kl_div": "KL of blocks alone",
          "l2": "L2 of blocks alone"}
BUDGETS = {"depth": (0.25, 0.375), "sparsity": (0.5, 0.6, 0.7), "bits": (2.25, 2.5, 3)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--data", default="stdlib", help="calibration and evaluation text")
    parser.add_argument("--tasks", nargs="+", default=[*BUDGETS], choices=[*BUDGETS])
    parser.add_argument("--calibration_tokens", type=int, default=65536)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--eval_tokens", type=int, default=32768, help="for depth; sparsity and bits are evaluated on "
                                                                       f"{LEVELS_EVALUATION} at most")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="searches at once, one thread each")
    parser.add_argument("--write_readme", nargs="?", const="quality", metavar="NAME",
                        help="put the table between the <!-- NAME --> marks of benchmarks/README.md (default: quality)")
    return parser.parse_args()


class Quality(Bench):
    """Every method gives (what the search of a seed has left in summary.json, baseline -> what it has on the same
    text)."""

    def search(self, name: str, program: str, flags: list, seed: int, eval_tokens: int) -> dict:
        folder = self.once(f"{name}-{seed}", [
            program, *self.text, "--eval_datasets", self.args.data, "--eval_tokens", eval_tokens,
            "--eval_sequence_length", self.args.sequence_length, "--eval_every", 0, *flags, "--seed", seed])
        return json.loads((folder / "summary.json").read_text())

    def depth(self, share: float, seed: int) -> tuple[dict, dict[str, dict]]:
        summary = self.search(f"depth-{share}", "evo_drop.py", [*DEPTH, "--sparsity", share], seed,
                              self.args.eval_tokens)
        scores = self.once(f"scores-{share}", [
            "-m", "baselines.drop_scores", *self.text, "--calibration_tokens", BASELINE_TOKENS, "--scoring_method",
            *SCORES, "--sparsities", share])
        return summary, {name: self.evaluate(f"scores-{share}-{score}", [
            "--drop_config", scores / f"{score}-{share:g}.txt"]) for score, name in SCORES.items()}

    def sparsity(self, share: float, seed: int) -> tuple[dict, dict[str, dict]]:
        database = self.once(f"sparse-{share}", ["-m", "database.sparsegpt", *self.text, "--sparsity", share,
                                                 "--weights_diff", sparsity_step(self.args.model_name_or_path)])
        owl = self.once(f"owl-{share}", [
            "-m", "baselines.owl", *self.text, "--calibration_tokens", BASELINE_TOKENS, "--owl_m", 5, "--select_by",
            "kl", "--sparse_weights_path", database])
        summary, found = self.levels("sparse", "evo_unstructured.py", database, share, seed, [-8, -4, 0, 4, 8],
                                     ["--generations", 10])
        return summary, {"OWL": self.level(f"owl-{share}", "sparse", database, owl / "owl.txt")} | found

    def bits(self, target: float, seed: int) -> tuple[dict, dict[str, dict]]:
        database = self.once("quant", [
            "-m", "database.gptq", *self.text, "--bitwidth_options", 2, 3, 4, 5, 6, "--calibration_bitwidth", 3,
            "--group_size", group_size(self.args.model_name_or_path), "--perchannel"])
        return self.levels("quant", "evo_quant.py", database, target, seed, [2, 3, 4, 6], [
            "--target_bitwidth", target, "--group_rule", "none", "--generations", 30 if target == 3 else 10])

    def levels(self, kind: str, program: str, database: Path, target: float, seed: int, measured_levels: list,
               flags: list) -> tuple[dict, dict[str, dict]]:
        """The search and dynamic programming."""
        weights, name = [f"--{kind}_weights_path", database], f"{kind}-{target}"
        summary = self.search(name, program, [*LEVELS, *weights, *flags, "--configuration_name", f"{name}-{seed}.txt"],
                              seed, min(self.args.eval_tokens, LEVELS_EVALUATION))
        found = {}
        for errors, own in (("manifest", []), ("kl", ["--errors", "kl", "--measured_levels", *measured_levels])):
            folder = self.once(f"dp-{errors}-{name}", [
                "-m", "baselines.dp", *self.text, "--calibration_tokens", BASELINE_TOKENS // 8, *weights,
                "--target_bitwidth" if kind == "quant" else "--target_sparsity", target, *own])
            found[f"DP, {errors} errors"] = self.level(folder.name, kind, database,
                                                       folder / f"dp-{errors}-{target:g}.txt")
        return summary, found

    def level(self, name: str, kind: str, database: Path, configuration: Path) -> dict:
        return self.evaluate(name, [f"--{kind}_weights_path", database, f"--{kind}_config_path", configuration,
                                    "--eval_tokens", min(self.args.eval_tokens, LEVELS_EVALUATION)])


def rows_of(task: str, found: list[tuple[dict, dict[str, dict]]], data: str) -> list[list]:
    """A row for each baseline, and for what the searches of all seeds started from."""
    summaries = [summary["evaluation"] for summary, _ in found]
    start = next(name for name in summaries[0] if name not in ("dense", "search"))
    baselines = {"best of 64 random" if task.startswith("depth") else start: [s[start] for s in summaries]} | {
        name: [values[name] for _, values in found] for name in found[0][1]}
    kl, ppl = ([summary["search"][data][measure] for summary in summaries] for measure in ("kl", "ppl"))
    rows = []
    for name, values in baselines.items():
        below = sum(own < value[data]["kl"] for own, value in zip(kl, values))
        rows.append([task, name, statistics.median(value[data]["kl"] for value in values), statistics.median(kl),
                     f"{min(kl):.4f}–{max(kl):.4f}", f"{below} of {len(kl)}",
                     statistics.median(value[data]["ppl"] for value in values), statistics.median(ppl),
                     summaries[0]["dense"][data]["ppl"], f"{found[0][0]['tokens']:,}"])
    return rows


def main() -> None:
    args = parse_arguments()
    args.other_data = None
    claim(args.out.resolve(), args, ("model_name_or_path", "data", "calibration_tokens", "sequence_length",
                                     "eval_tokens"))
    bench = Quality(args)
    tasks = {{"depth": f"depth {budget:.1%}", "sparsity": f"sparsity {budget:.0%}", "bits": f"{budget} bits"}[task]:
             (getattr(bench, task), budget) for task in args.tasks for budget in BUDGETS[task]}
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {name: [pool.submit(method, budget, seed) for seed in range(args.seeds)]
                   for name, (method, budget) in tasks.items()}
    table = format_table([
        ["budget", "baseline", "baseline KL", "search KL, median", "range", "seeds below baseline", "baseline ppl",
         "search ppl, median", "dense ppl", "tokens searched"],
        *(row for name, runs in running.items() for row in rows_of(name, [run.result() for run in runs], args.data))])
    print(table)
    (args.out / "table.md").write_text(table + "\n")
    if args.write_readme:
        write_readme(args.write_readme, table)


if __name__ == "__main__":
    main()
