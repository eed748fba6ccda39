"""What finishing is worth: configurations as a search leaves them, and trained in their own mixture by finish.py.

    python benchmarks/finish.py --out results/finish --jobs 2 --seeds 3 --write_readme

At every budget: uniform (for depth ShortGPT's), random and searched, as they are and finished. Databases are built
once, with --mse for bits; seeds differ in calibration text, search and training. --other_data is text of another kind,
on which the same is evaluated. With --auto_round PYTHON, an interpreter that has auto-round 0.16.1, uniform bitwidths
and the mixtures that the first seed's search has found, by that with its defaults. Finished parts are not run again.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from benchmarks.programs import claim, group_size, run, sparsity_step, write_readme
from utils.configs import read_level_config
from utils.files import write_atomic
from utils.report import format_table

DEPTH = ["--generations", 10, "--offspring", 24, "--tokens_per_selection", 1024, 8192,
         "--survivors_per_selection", 2, 1, "--initial_tokens", 1024, "--init", "measured", "--refine", 2,
         "--screen", 4, "--confirm_tokens", 32768]
LEVELS = ["--generations", 8, "--offspring", 24, "--tokens_per_selection", 512, 2048, 4096,
          "--survivors_per_selection", 4, 2, 1, "--initial_tokens", 1024, "--init", "measured", "--screen", 4]
RANDOM = ["--generations", 0, "--init", "random", "--initially_generated", 1, "--initial_tokens", 256, "--offspring", 1,
          "--survivors_per_selection", 1, "--tokens_per_selection", 256]
SCORE_TOKENS = 16384
FINISHED = ", finished"
WAYS = ("uniform", "random", "searched")
BITS = {"2 bits": 2, "2.25 bits": 2.25, "2.5 bits": 2.5, "3 bits": 3}
SPARSITIES = {"50% sparsity": 0.5, "60% sparsity": 0.6, "70% sparsity": 0.7}
DEPTHS = {"25% depth": 0.25, "37.5% depth": 0.375}
AUTO_ROUND = """
import json, sys, torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
model, documents, levels, out = sys.argv[1:]
levels = json.loads(levels)
documents = [d for d in json.load(open(documents)) if len(d) == max(map(len, json.load(open(documents))))]
own, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
data = [{"input_ids": torch.tensor([d]), "attention_mask": torch.ones(1, len(d), dtype=torch.int64)} for d in documents]
tuned, _ = AutoRound(own, tokenizer, bits=levels.pop("*", 2), layer_config={n: {"bits": b} for n, b in levels.items()},
                     group_size=128, sym=False, iters=200, seqlen=len(documents[0]), nsamples=len(data), dataset=data,
                     batch_size=8, enable_torch_compile=False, device_map="cpu").quantize()
fresh = AutoModelForCausalLM.from_pretrained(model)
fresh.load_state_dict(tuned.state_dict(), strict=False)
fresh.save_pretrained(out)
tokenizer.save_pretrained(out)
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--dtype", default="auto", help="of everything (default: the scripts' own)")
    parser.add_argument("--data", default="stdlib", help="calibration and evaluation text")
    parser.add_argument("--other_data", help="evaluation text of another kind")
    parser.add_argument("--calibration_tokens", type=int, default=131072)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--eval_tokens", type=int, default=16384)
    parser.add_argument("--budgets", nargs="+", default=[*BITS, *SPARSITIES, *DEPTHS], metavar="NAME",
                        help="e.g. '2.5 bits' '60%% sparsity' '25%% depth' (default: all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY",
                        help=f"of {', '.join(WAYS)}, for depth uniform being ShortGPT's (default: all)")
    parser.add_argument("--steps", type=int, default=100, help="of finish.py (default: 100)")
    parser.add_argument("--end_to_end_steps", type=int, default=0, help="of finish.py (default: 0)")
    parser.add_argument("--batch_size", type=int, default=4, help="of finish.py (default: 4)")
    parser.add_argument("--auto_round", metavar="PYTHON", help="interpreter of an environment that has auto-round")
    parser.add_argument("--out", type=Path, default=Path("results/finish"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="at once, one thread each")
    parser.add_argument("--write_readme", nargs="?", const="finish", metavar="NAME",
                        help="put the table between the <!-- NAME --> marks of benchmarks/README.md (default: finish)")
    return parser.parse_args()


class Bench:
    """One model's commands, each run once: what it has made is kept in a folder of its own."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out.resolve()
        self.locks = defaultdict(Lock)               # of what is being made
        self.model = ["--model_name_or_path", args.model_name_or_path]
        self.text = [*self.model, "--calibration_data", args.data, "--calibration_sequence_length",
                     args.sequence_length, "--calibration_tokens", args.calibration_tokens]

    def once(self, name: str, command: list) -> Path:
        """The folder of what `command` has made; beside it NAME.seconds."""
        folder, done = self.out / name, self.out / f"{name}.seconds"
        with self.locks[name]:
            if not done.exists():
                began = time.time()
                run([*command, "--output_dir" if command[0].startswith("evo_") else "--save_dir", folder],
                    self.out / "logs" / f"{name}.log")
                write_atomic(done, str(time.time() - began))
                print(f"{name}: {time.time() - began:.0f} s", flush=True)
        return folder

    def evaluate(self, name: str, flags: list) -> dict:
        """dataset -> {"kl", "ppl"}"""
        result = self.out / f"{name}.json"
        if not result.exists():      # what is the same for all seeds is evaluated once more than needed at worst
            data = [self.args.data, *([self.args.other_data] if self.args.other_data else ())]
            run(["eval_config.py", *self.model, "--eval_datasets", *data, "--eval_tokens", self.args.eval_tokens,
                 "--eval_sequence_length", self.args.sequence_length, *flags, "--output", result],
                self.out / "logs" / f"eval-{name}.log")
        return json.loads(result.read_text())["compressed"]

    def finish(self, name: str, flags: list, seed: int) -> Path:
        return self.once(name, ["finish.py", *self.text, *flags, "--steps", self.args.steps, "--end_to_end_steps",
                                self.args.end_to_end_steps, "--batch_size", self.args.batch_size, "--seed", seed])

    # ---- of one budget and seed: name of a way -> dataset -> values --------------------------------------------------

    def levels(self, budget: str, seed: int) -> dict[str, dict]:
        bits = budget in BITS
        kind, target = ("quant", BITS[budget]) if bits else ("sparse", SPARSITIES[budget])
        build = [*self.text, "--bitwidth_options", 2, 3, 4, 5, 6, "--calibration_bitwidth", 2, "--group_size",
                 group_size(self.args.model_name_or_path), "--perchannel", "--mse"] if bits else [
                 *self.text, "--sparsity", target, "--weights_diff", sparsity_step(self.args.model_name_or_path)]
        name = "gptq" if bits else f"sparsegpt-{target}"
        database = self.once(name, ["-m", f"database.{'gptq' if bits else 'sparsegpt'}", *build])
        uniform = str(int(target)) if bits else "0"
        script = ["evo_quant.py", "--target_bitwidth", target, "--group_rule", "none"] if bits else [
            "evo_unstructured.py", "--refine", 2]
        found = {}

        def both(way: str, folder: Path, configuration: str, seeded: str) -> None:
            found[way] = self.evaluate(f"{kind}-{target}-{way}{seeded}", [
                f"--{kind}_weights_path", folder, f"--{kind}_config_path", configuration])
            finished = self.finish(f"{kind}-{target}-{way}-finished-{seed}", [
                f"--{kind}_weights_path", folder, f"--{kind}_config_path", configuration], seed)
            found[way + FINISHED] = self.evaluate(f"{kind}-{target}-{way}-finished-{seed}", [
                f"--{kind}_weights_path", finished, f"--{kind}_config_path", configuration])

        def search(way: str, folder: Path, flags: list) -> str:
            run_name = f"{kind}-{target}-{way}-{seed}"
            own = [f"--{kind}_weights_path", folder, "--configuration_name", f"{run_name}.txt"]
            return str(self.once(run_name, [*script, *self.text, "--no_eval", "--seed", seed, *flags, *own])
                       / f"{run_name}.txt")

        if "uniform" in self.args.ways and (not bits or target == int(target)):
            both("uniform", database, uniform, "")
        for way, flags in (("random", RANDOM), ("searched", LEVELS)):
            if way in self.args.ways and target != 2:
                both(way, database, search(way, database, flags), f"-{seed}")
        if bits and self.args.auto_round and not seed:
            if target == int(target):
                found["auto-round"] = self.auto_round(target, {"*": target})
            elif "searched" in found:
                file = next((self.out / f"quant-{target}-searched-0").glob("*.txt"))
                found["searched, then auto-round"] = self.auto_round(target, read_level_config(file))
        return found

    def depth(self, budget: str, seed: int) -> dict[str, dict]:
        share = DEPTHS[budget]
        files = {}
        if "uniform" in self.args.ways:
            files["uniform"] = self.once(f"shortgpt-{share}", [
                "-m", "baselines.drop_scores", *self.text, "--calibration_tokens", SCORE_TOKENS, "--scoring_method",
                "cosine_similarity", "--sparsities", share]) / f"cosine_similarity-{share:g}.txt"
        for way, flags in (("random", RANDOM), ("searched", DEPTH)):
            if way in self.args.ways:
                files[way] = self.once(f"depth-{share}-{way}-{seed}", [
                    "evo_drop.py", *self.text, "--no_eval", "--seed", seed, "--sparsity", share, *flags]
                    ) / "layer_drop_config.txt"
        found = {}
        for way, file in files.items():
            name = f"depth-{share}-{way}"
            found[way] = self.evaluate(name if way == "uniform" else f"{name}-{seed}", ["--drop_config", file])
            finished = self.finish(f"{name}-finished-{seed}", ["--drop_config", file], seed)
            found[way + FINISHED] = self.evaluate(f"{name}-finished-{seed}", ["--checkpoint", finished])
        return found

    def auto_round(self, bits: float, levels: dict[str, int]) -> dict:
        """Of an average of `bits`; `levels`: of every layer, or of all under "*"."""
        folder, done = self.out / f"auto-round-{bits}", self.out / f"auto-round-{bits}.seconds"
        if not done.exists():
            from utils.data import calibration_documents
            from utils.model import load_tokenizer
            documents = calibration_documents(self.args.data, load_tokenizer(self.args.model_name_or_path),
                                              self.args.calibration_tokens, self.args.sequence_length, 0)
            write_atomic(self.out / "documents.json", json.dumps([d.tolist() for d in documents]))
            began = time.time()
            with (self.out / "logs" / f"auto-round-{bits}.log").open("w") as log:
                subprocess.run([self.args.auto_round, "-c", AUTO_ROUND, self.args.model_name_or_path,
                                str(self.out / "documents.json"), json.dumps(levels), str(folder)],
                               check=True, stdout=log, stderr=log)
            write_atomic(done, str(time.time() - began))
        return self.evaluate(f"auto-round-{bits}", ["--checkpoint", folder])


def main() -> None:
    args = parse_arguments()
    unknown = [name for name in args.budgets if name not in {**BITS, **SPARSITIES, **DEPTHS}]
    if unknown:
        raise SystemExit(f"--budgets {unknown[0]}: use one of {', '.join({**BITS, **SPARSITIES, **DEPTHS})}")
    claim(args.out.resolve(), args, ("model_name_or_path", "dtype", "data", "other_data", "calibration_tokens",
                                     "sequence_length", "eval_tokens", "steps", "end_to_end_steps", "batch_size"))
    bench = Bench(args)
    for flags in (bench.model, bench.text):
        flags += ["--dtype", args.dtype]
    jobs = [(budget, seed) for seed in range(args.seeds) for budget in args.budgets]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda job: (bench.depth if job[0] in DEPTHS else bench.levels)(*job), jobs))

    rows = [["budget", "configuration", "KL", "ppl", "finished: KL", *(["range"] if args.seeds > 1 else ()), "ppl",
             *(["KL on other text", "finished: KL on other text"] if args.other_data else ()), "minutes to finish"]]
    for budget in args.budgets:
        results = [values for (name, _), values in zip(jobs, found) if name == budget]
        for way in dict.fromkeys(way for values in results for way in values if not way.endswith(FINISHED)):
            def values(measure: str, text: str, suffix: str = "", way: str = way, results: list = results) -> list:
                return [ways[way + suffix][text][measure] for ways in results if way + suffix in ways]
            row = [budget, {"uniform": "ShortGPT"}.get(way, way) if budget in DEPTHS else way]
            row += [statistics.median(values(measure, args.data)) for measure in ("kl", "ppl")]
            after = values("kl", args.data, FINISHED)
            row.append(statistics.median(after) if after else "–")
            if args.seeds > 1:
                row.append(f"{min(after):.3f}-{max(after):.3f}" if after else "–")
            row.append(statistics.median(values("ppl", args.data, FINISHED)) if after else "–")
            if args.other_data:
                row += [statistics.median(values("kl", args.other_data)),
                        statistics.median(values("kl", args.other_data, FINISHED)) if after else "–"]
            kind = "depth" if budget in DEPTHS else "quant" if budget in BITS else "sparse"
            target = {**DEPTHS, **BITS, **SPARSITIES}[budget]
            seconds = [float(file.read_text()) for file in bench.out.glob(
                f"auto-round-{target}.seconds" if "auto-round" in way else f"{kind}-{target}-{way}-finished-*.seconds")]
            rows.append([*row, statistics.median(seconds) / 60 if seconds else "–"])
    table = format_table(rows)
    print(table)
    if args.write_readme:
        write_readme(args.write_readme, table)


if __name__ == "__main__":
    main()
