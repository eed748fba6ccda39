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
from benchmarks.programs import claim, run, sparsity_step, write_readme
from utils.report import format_table

DEPTH = ["--generations", "20", "--offspring", "24", "--tokens_per_selection", "1024", "8192",
         "--survivors_per_selection", "2", "1", "--initial_tokens", "1024"]
LEVELS_EVALUATION = ["--eval_tokens", "16384"]
LEVELS = ["--generations", "10", "--offspring", "16", "--tokens_per_selection", "512", "2048", "4096",
          "--survivors_per_selection", "4", "2", "1", "--initial_tokens", "1024", "--calibration_tokens", "32768",
          *LEVELS_EVALUATION]

BASELINE_TOKENS = 8192           # of the calibration text
SCORES = {"cosine_similarity": "ShortGPT", "window_cosine_similarity": "window cosine",
          "norm_ratio": "weight subcloning", "perplexity": "Shortened Llama", "kl_div": "KL of blocks alone",
          "l2": "L2 of blocks alone"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--data", default="stdlib", help="calibration and evaluation text")
    parser.add_argument("--tasks", nargs="+", default=["depth", "sparsity", "bits"],
                        choices=["depth", "sparsity", "bits"])
    parser.add_argument("--calibration_tokens", type=int, default=65536)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--eval_tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="searches at once, one thread each")
    parser.add_argument("--write_readme", nargs="?", const="quality", metavar="NAME",
                        help="put the table between the <!-- NAME --> marks of benchmarks/README.md (default: quality)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    out = args.out.resolve()
    claim(out, args, ("model_name_or_path", "data", "calibration_tokens", "sequence_length", "eval_tokens"))
    model = ["--model_name_or_path", args.model_name_or_path]
    calibration = ["--calibration_data", args.data, "--calibration_sequence_length", args.sequence_length,
                   "--calibration_tokens", args.calibration_tokens]
    evaluation = ["--eval_datasets", args.data, "--eval_tokens", args.eval_tokens, "--eval_sequence_length",
                  args.sequence_length]
    search = [*model, *calibration, *evaluation, "--eval_every", 0]
    build = [*model, *calibration]

    weights_diff = sparsity_step(args.model_name_or_path)
    databases, scorings, baselines, searches = [], [], [], []

    def dynamic_programming(tasks: dict[str, float], weights: list, budget: str, measured_levels: list) -> None:
        for errors, flags in (("manifest", []), ("kl", ["--errors", "kl", "--measured_levels", *measured_levels])):
            folder = out / f"dp-{errors}-{weights[1].name}"
            scorings.append((folder.name, ["-m", "baselines.dp", *build, "--calibration_tokens", BASELINE_TOKENS // 8,
                                           *weights, budget, *tasks.values(), *flags, "--save_dir", folder]))
            for task, target in tasks.items():
                baselines.append((task, f"DP, {errors} errors", folder / f"{target}.result.json", [
                    *LEVELS_EVALUATION, *weights, weights[0].replace("weights", "config"),
                    folder / f"dp-{errors}-{target:g}.txt"]))

    for share in (0.25, 0.375) if "depth" in args.tasks else ():
        folder = out / f"scores-{share:g}"
        scorings.append((folder.name, ["-m", "baselines.drop_scores", *build, "--calibration_tokens", BASELINE_TOKENS,
                                       "--scoring_method", *SCORES, "--sparsities", share, "--save_dir", folder]))
        for score, name in SCORES.items():
            baselines.append((f"depth {share:.1%}", name, folder / f"{score}.result.json", [
                "--drop_config", folder / f"{score}-{share:g}.txt"]))
        for seed in range(args.seeds):
            searches.append((f"depth {share:.1%}", seed, out / f"depth-{share}-{seed}", [
                "evo_drop.py", *search, *DEPTH, "--sparsity", share, "--initially_generated", 64]))
    for share in (0.5, 0.6, 0.7) if "sparsity" in args.tasks else ():
        task, weights = f"sparsity {share:.0%}", ["--sparse_weights_path", out / f"sparse-{share}"]
        databases.append((f"sparse-{share}", ["-m", "database.sparsegpt", *build, "--sparsity", share, "--weights_diff",
                                              weights_diff, "--save_dir", weights[1]]))
        scorings.append((f"owl-{share}", ["-m", "baselines.owl", *build, "--calibration_tokens", BASELINE_TOKENS,
                                          "--owl_m", 5, "--select_by", "kl", *weights,
                                          "--save_dir", out / f"owl-{share}"]))
        baselines.append((task, "OWL", out / f"owl-{share}" / "result.json", [
            *LEVELS_EVALUATION, *weights, "--sparse_config_path", out / f"owl-{share}" / "owl.txt"]))
        dynamic_programming({task: share}, weights, "--target_sparsity", [-8, -4, 0, 4, 8])
        for seed in range(args.seeds):
            searches.append((task, seed, out / f"sparsity-{share}-{seed}", [
                "evo_unstructured.py", *search, *LEVELS, *weights, "--configuration_name", f"seed-{seed}.txt"]))
    weights = ["--quant_weights_path", out / "quant"]
    if "bits" in args.tasks:
        databases.append(("quant", ["-m", "database.gptq", *build, "--bitwidth_options", 2, 3, 4, 5, 6,
                                    "--calibration_bitwidth", 3, "--group_size", 128, "--perchannel", "--save_dir",
                                    weights[1]]))
        dynamic_programming({f"{target} bits": target for target in (2.25, 2.5, 3)}, weights, "--target_bitwidth",
                            [2, 3, 4, 6])
    for target in (2.25, 2.5, 3) if "bits" in args.tasks else ():
        for seed in range(args.seeds):
            searches.append((f"{target} bits", seed, out / f"bits-{target}-{seed}", [
                "evo_quant.py", *search, *LEVELS, *weights, "--target_bitwidth", target, "--group_rule", "none",
                "--generations", 30 if target == 3 else 10, "--configuration_name", f"{target}-seed-{seed}.txt"]))

    def prepare(item) -> None:
        name, command = item
        if not (out / "logs" / f"{name}.done").exists():
            run(command, out / "logs" / f"{name}.log")
            (out / "logs" / f"{name}.done").touch()

    def evaluate(item) -> None:
        _, _, result, flags = item
        if not result.exists():
            run(["eval_config.py", *model, *evaluation, *flags, "--output", result],
                out / "logs" / f"{result.parent.name}-{result.stem}.log")

    def one(item) -> None:
        _, seed, folder, command = item
        if (folder / "summary.json").exists():
            return
        run([*command, "--seed", seed, "--output_dir", folder], out / "logs" / f"{folder.name}.log")
        print(f"{folder.name} done", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for work, items in ((prepare, databases), (prepare, scorings), (evaluate, baselines), (one, searches)):
            list(pool.map(work, items))

    rows = [["budget", "baseline", "baseline KL", "search KL, median", "range", "seeds below baseline", "baseline ppl",
             "search ppl, median", "dense ppl", "tokens searched"]]
    for task in dict.fromkeys(task for task, *_ in searches):
        folders = [folder for name, _, folder, _ in searches if name == task]
        finished = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        summaries = [summary["evaluation"] for summary in finished]
        start = next(name for name in summaries[0] if name not in ("dense", "search"))
        compared = {("best of 64 random" if task.startswith("depth") else start): [
            summary[start][args.data] for summary in summaries]}
        for name, result in ((name, result) for owner, name, result, _ in baselines if owner == task):
            compared[name] = [json.loads(result.read_text())["compressed"][args.data]] * len(summaries)
        found = [summary["search"][args.data] for summary in summaries]
        for name, values in compared.items():
            rows.append([task, name,
                         statistics.median(v["kl"] for v in values), statistics.median(v["kl"] for v in found),
                         f"{min(v['kl'] for v in found):.4f}–{max(v['kl'] for v in found):.4f}",
                         f"{sum(f['kl'] < v['kl'] for f, v in zip(found, values))} of {len(found)}",
                         statistics.median(v["ppl"] for v in values), statistics.median(v["ppl"] for v in found),
                         summaries[0]["dense"][args.data]["ppl"], f"{finished[0]['tokens']:,}"])
    table = format_table(rows)
    print(table)
    (out / "table.md").write_text(table + "\n")
    if args.write_readme:
        write_readme(args.write_readme, table)


if __name__ == "__main__":
    main()
