"""Speed of one generation of each search: the plain way, here, and here with one ingredient switched off at a time.

    python benchmarks/search.py                             the demo model
    python benchmarks/search.py --model 100m                a Llama of 100 million random weights
    python benchmarks/search.py --model llama-3-8b --device cuda
    python benchmarks/search.py --write_readme              the table, of the latest results in --out
    python benchmarks/search.py --plot benchmarks/cost.png  cost and memory over candidates and tokens

Candidates, survivors and tokens are the scripts' defaults, which are the paper's; only the tokens are divided, so that
the plain way (see ways.py) takes at most about two minutes and 8 GB. All ways measure the same candidates on the same
minibatches in this one process, by turns; the median of --repeats counts. The run fails where fitness values differ.

Seconds are those of the processor with one thread on a CPU, so that other processes count little, and else on the wall.
The share of the peak is that of the plain way's work, 2 · weights · tokens of all candidates' matrices and of the head,
in the time of a large matrix product, measured by turns with the rest. Memory is what comes on top of the model: what a
way keeps (logits or hidden states, packed levels) and the most that it needed besides.
"""
import argparse
import ctypes
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)                              # this file's own folder would hide the database package
from benchmarks.programs import made_by, write_readme
from benchmarks.subjects import SHAPES, load
from benchmarks.ways import EARLIER, SEARCHES, Generation, compiled, here, parent_looked_up, plain, play, without
from utils import model as models
from utils.decoder import Decoder
from utils.files import write_atomic
from utils.model import default_device
from utils.report import format_table

DIVIDE = {"demo": 8, "100m": 64, "llama-3-8b": 16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}      # of fitness, relative to the plain way's
COMPILED = "here, with --compile"
LATER = f"here, a parent's generation {EARLIER + 1}"
WHOLE = ("plain", "here", LATER, COMPILED)                   # the other ways go without something
MEGABYTE = 10**6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=["demo", *SHAPES])
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--device", help="default: the CPU, but for llama-3-8b the GPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: 1)")
    parser.add_argument("--divide", type=int, metavar="FACTOR",
                        help="the paper's tokens by this (default: demo 8, 100m 64, llama-3-8b 16)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    parser.add_argument("--whole", action="store_true", help="neither with --compile nor without each ingredient")
    parser.add_argument("--default_allocator", action="store_true",
                        help="without utils.model.keep_freed_memory, for all ways; the results are printed alone")
    parser.add_argument("--out", type=Path, default=Path("results/speed"), metavar="FOLDER")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write_readme", action="store_true", help="only put the results in --out into "
                                                                    "benchmarks/README.md")
    action.add_argument("--plot", type=Path, metavar="FILE", help="only measure evo_quant's cost, and plot it")
    return parser.parse_args()


# ---- measuring -------------------------------------------------------------------------------------------------------


class Meter:
    """Seconds and peak memory of a piece of work."""

    def __init__(self, device: torch.device, threads: int):
        self.cuda = device.type == "cuda"
        self.clock = time.process_time if threads == 1 and not self.cuda else time.perf_counter
        self.libc = ctypes.CDLL(None) if platform.system() == "Linux" else None

    def __call__(self, work: Callable) -> tuple[object, dict[str, float]]:
        """(what `work` returns, its seconds and its peak bytes on the host and the device beyond those before)."""
        if self.libc:
            self.libc.malloc_trim(0)                                   # what is free goes back, so that peaks are seen
            Path("/proc/self/clear_refs").write_text("5")              # resets the peak of the resident set
        host, device = self._resident("VmRSS"), 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            device = torch.cuda.memory_allocated()
        began = self.now()
        result = work()
        seconds = self.now() - began
        return result, {"seconds": seconds, "host": self._resident("VmHWM") - host,
                        "device": torch.cuda.max_memory_allocated() - device if self.cuda else 0}

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return self.clock()

    def _resident(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines() if self.libc else ()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def seconds_a_flop(decoder: Decoder, meter: Meter) -> float:
    """Of a large matrix product in the model's dtype."""
    size = 8192 if meter.cuda else 2048
    a = torch.randn(size, size, dtype=decoder.dtype, device=decoder.device)
    return meter(lambda: a @ a)[1]["seconds"] / (2 * size**3)


def flops(generation: Generation, shared: bool) -> int:
    """Of matrix products with the weights that are not dropped, and with the head: of every candidate's own forward, or
    with every prefix that candidates share run once."""
    decoder, total = generation.decoder, 0
    config = decoder.config.get_text_config(decoder=True)
    for candidates, minibatch in generation.steps:
        prefixes = [candidate[:count] for candidate in candidates for count in range(1, len(decoder.blocks) + 1)]
        weights = len(candidates) * config.vocab_size * config.hidden_size
        for prefix in set(prefixes) if shared else prefixes:
            block, dropped = decoder.blocks[len(prefix) - 1], (False, False) if generation.files else prefix[-1]
            weights += sum(part.size for part, gone in zip((block.attn, block.mlp), dropped) if not gone)
        total += 2 * weights * sum(length for _, length in minibatch)
    return total


def spent_on(generation: Generation, meter: Meter) -> dict[str, float]:
    """Seconds of `here` by what they are spent on."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            began = meter.now()
            result = function(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + meter.now() - began
            return result
        return call

    fitness, decoder = generation.fitness, generation.decoder
    generation.forget_loaded()
    with ExitStack() as stack:
        for name, owner, attribute in (
                ("blocks", decoder, "run_block"), ("head and KL", fitness, "_losses"), ("levels", fitness, "set_block"),
                ("teacher's distribution", fitness, "_teacher_distributions"), ("embedding", decoder, "block_inputs")):
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        total = meter(lambda: here(generation))[1]["seconds"]
    return {**spent, "rest": total - sum(spent.values())}


def largest_difference(values: list[list[float]], expected: list[list[float]]) -> float:
    """Relative, over all fitness values of all steps; not finite where one is not."""
    return max(abs(a - b) / b if math.isfinite(a - b) else math.inf
               for step, plainly in zip(values, expected, strict=True) for a, b in zip(step, plainly, strict=True))


def kept_bytes(generation: Generation, way: str, device: str) -> int:
    """What a way keeps between steps: the teacher's logits or hidden states, and packed levels."""
    stored = generation.logits if way in ("plain", "hidden states stored") else generation.fitness.teacher
    packed = generation.switcher is not None and way not in ("plain", "levels packed")
    on_device = packed and generation.decoder.device.type == device
    return (sum(tensor.nbytes for tensor in stored if tensor.device.type == device)
            + (generation.switcher.cache.bytes if on_device else 0))


def with_compile(generation: Generation) -> dict[str, tuple]:
    """The way with --compile, where it works."""
    try:
        return {COMPILED: (here, compiled(generation))}
    except ValueError as error:
        print(error)
        return {}


def measure(name: str, generation: Generation, repeats: int, meter: Meter, whole: bool = False) -> dict:
    """All ways by turns, with `whole` those with all ingredients: their costs, and how well fitness values agree.
    Raises SystemExit where they do not."""
    tolerance = TOLERANCE[generation.decoder.dtype]
    ways = {"plain": (plain, nullcontext()), "here": (here, nullcontext()),
            LATER: (parent_looked_up, nullcontext())}
    if not whole:
        ways |= with_compile(generation)
        ways |= {ingredient: (here, off) for ingredient, off in without(generation).items()}
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    peak, difference, expected = math.inf, 0.0, None
    for _ in range(repeats):
        for way, (run, switched) in ways.items():
            generation.forget_loaded()
            with switched:
                values, cost = meter(lambda: run(generation))
            expected = expected or values
            difference = max(difference, largest_difference(values, expected))
            if not difference <= tolerance:
                raise SystemExit(f"{name}, {way}: a fitness differs from the plain way's by a relative "
                                 f"{difference:.2g}, more than {tolerance:g}")
            turns[way].append(cost)
            peak = min(peak, seconds_a_flop(generation.decoder, meter))
    costs = {way: {key: (statistics.median if key == "seconds" else max)(cost[key] for cost in each) for key in each[0]}
             for way, each in turns.items()}
    for way, cost in costs.items():
        cost["host"] += kept_bytes(generation, way, "cpu")
        cost["device"] += kept_bytes(generation, way, "cuda")
    return {"costs": costs, "spent": spent_on(generation, meter), "peak": 1 / peak, "difference": difference,
            "flops": flops(generation, shared=False), "shared_flops": flops(generation, shared=True),
            "tokens": sum(len(candidates) * length for candidates, minibatch in generation.steps
                          for _, length in minibatch)}


# ---- tables and a plot -----------------------------------------------------------------------------------------------


def print_result(name: str, result: dict, cuda: bool) -> None:
    rows = [[name, "seconds", "tokens/s", "against plain", "of the matmul peak", "host, MB", "device, MB"]]
    costs, spent = result["costs"], result["spent"]
    for way, cost in costs.items():
        title = way if way in WHOLE else f"here, without: {way}"
        rows.append([title, cost["seconds"], f"{result['tokens'] / cost['seconds']:,.0f}",
                     f"{costs['plain']['seconds'] / cost['seconds']:.2f}x",
                     f"{result['flops'] / cost['seconds'] / result['peak']:.0%}",
                     f"{cost['host'] / MEGABYTE:,.0f}",
                     f"{cost['device'] / MEGABYTE:,.0f}" if cuda else None])
    print(format_table(rows))
    print("here: " + ", ".join(f"{part} {seconds / sum(spent.values()):.1%}" for part, seconds in spent.items()))
    print(f"FLOPs left by sharing prefixes: {result['shared_flops'] / result['flops']:.1%}, so that alone can give "
          f"{result['flops'] / result['shared_flops']:.2f}x; with all but the blocks free, "
          f"{costs['plain']['seconds'] / spent['blocks']:.2f}x\n"
          f"matmul peak {result['peak'] / 1e9:,.0f} GFLOP/s; fitness "
          f"equal within {result['difference']:.1g}, relative\n", flush=True)


def readme_table(folder: Path) -> str:
    """Of all results in `folder`: here against plain, and how much longer it takes without each ingredient."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"), reverse=True)}
    ingredients = list(dict.fromkeys(way for searches in results.values() for result in searches.values()
                                     for way in result["costs"] if way not in WHOLE))
    rows = [["", "plain, s", "here, s", "faster", "parent looked up", "with --compile", "FLOPs left", "of the peak",
             "plain, MB", "here, MB", *ingredients]]
    for stem, searches in results.items():
        model, _, device = stem.rpartition("-")
        memory = {"cpu": "host", "cuda": "device"}[device]
        for name, result in searches.items():
            costs, seconds = result["costs"], result["costs"]["here"]["seconds"]
            rows.append([f"{model}, {device}, tokens / {result['divide']}: {name}", costs["plain"]["seconds"], seconds,
                         *[f"{costs['plain']['seconds'] / costs[way]['seconds']:.2f}x" if way in costs else None
                           for way in ("here", LATER, COMPILED)],
                         f"{result['shared_flops'] / result['flops']:.0%}",
                         f"{result['flops'] / seconds / result['peak']:.0%}",
                         *[f"{costs[way][memory] / MEGABYTE:,.0f}" for way in ("plain", "here")],
                         *[f"{costs[way]['seconds'] / seconds - 1:+.0%}" if way in costs else None
                           for way in ingredients]])
    if not any(stem.endswith("cuda") for stem in results):
        rows.append(["llama-3-8b, cuda", "[below](#on-a-gpu)", *[None] * (len(rows[0]) - 2)])
    return format_table(rows)


def plot_cost(generation: Generation, meter: Meter, file: Path) -> None:
    """Seconds over candidates × tokens, and memory over candidates, of offspring of one parent."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    offspring, fitness = generation.steps[0][0], generation.fitness
    figure, (cost, memory) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    rates = []
    for num_tokens, color in ((256, "tab:green"), (1024, "tab:blue"), (4096, "tab:orange")):
        minibatch = [(i, len(document)) for i, document in enumerate(fitness.documents)
                     if len(document) == 256][:num_tokens // 256]
        counts, seconds, peaks = [1, 2, 4, 8, 16, 32], [], []
        for count in counts:
            runs = [meter(lambda: fitness.measure(offspring[:count], minibatch))[1] for _ in range(2)]
            seconds.append(min(run["seconds"] for run in runs))
            peaks.append(max(run["device" if meter.cuda else "host"] for run in runs) / MEGABYTE)
            rates.append(seconds[-1] / (count * num_tokens))
            print(f"{count} candidates, {num_tokens} tokens: {seconds[-1]:.2f} s, {peaks[-1]:.1f} MB", flush=True)
        cost.loglog([count * num_tokens for count in counts], seconds, "o", color=color, label=f"{num_tokens} tokens")
        memory.semilogx(counts, peaks, "o-", color=color, label=f"{num_tokens} tokens", base=2)
    ends = torch.tensor([256, 32 * 4096])
    cost.loglog(ends, ends * sorted(rates)[len(rates) // 2], "--", color="gray", linewidth=1, label="proportional")
    cost.set(xlabel="candidates × tokens", ylabel="seconds")
    memory.set(xlabel="candidates", ylabel="peak beyond model and teacher, MB", ylim=(0, None), xticks=counts,
               xticklabels=counts)
    for axes in (cost, memory):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    args = parse_arguments()
    if args.write_readme:
        measured = [json.loads(file.read_text()) for file in sorted(args.out.glob("*.json"))]
        return write_readme("speed", readme_table(args.out), made=[
            result.get("made", "Commit unknown") for searches in measured for result in searches.values()])
    if args.default_allocator:                       # once memory is kept, glibc does not unlearn it: so from the start
        models.keep_freed_memory = lambda: False
    torch.set_num_threads(args.threads)
    device = default_device(args.device or ("cuda" if args.model == "llama-3-8b" else "cpu"))
    meter, divide = Meter(device, args.threads), args.divide or DIVIDE[args.model]
    print(f"{args.model} on {device}, {args.threads} threads, the paper's tokens / {divide}", flush=True)
    automatic = "float32" if device.type == "cpu" else "bfloat16"
    dtype = args.dtype or automatic
    file = args.out / f"{args.model}{'' if dtype == automatic else f' {dtype}'}-{device.type}.json"
    results = json.loads(file.read_text()) if file.exists() else {}          # of other searches, maybe
    for name in ["evo_quant"] if args.plot else args.searches:
        decoder, documents = load(args.model, device, max(8192, 131072 // divide), dtype)
        with tempfile.TemporaryDirectory() as folder:
            generation = play(name, decoder, documents, divide, Path(folder), args.model != "demo")
            if args.plot:
                return plot_cost(generation, meter, args.plot)
            results[name] = {"divide": divide, "made": made_by(),
                             **measure(name, generation, args.repeats, meter, args.whole)}
            print_result(name, results[name], meter.cuda)
        if args.default_allocator:
            continue
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({name: results[name] for name in SEARCHES if name in results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
