"""What a GPU has to show, in parts that benchmarks/gpu.sh runs one after another.

    python benchmarks/gpu.py PART ...        parts (--list names them); their results in --out, a JSON file a part
    python benchmarks/gpu.py --report        the tables of all parts that are finished
    python benchmarks/gpu.py --write_readme  the same, put into README.md and benchmarks/README.md
    python benchmarks/gpu.py PART --tiny     a tiny model on a CPU: shows that a part works, and nothing else

Models have the shapes of Llama-3-8B and Llama-3-70B and random weights, their databases are rounded or pruned at random
weights' levels; the text is random tokens. All of it is made on the device.
"""
import argparse
import contextlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)                              # this file's own folder would hide the database package
import evo_drop
import evo_quant
import evo_unstructured
from benchmarks import database as layers_benchmark
from benchmarks import search
from benchmarks.programs import write_readme
from benchmarks.subjects import LEVEL_FLAGS, SHAPES, build_database, load
from benchmarks.ways import SEARCHES, here, play
from database import build, gptq, hidden_states, sparsegpt, store
from database.hessian import Calibration
from database.levels import LevelSwitcher
from database.trained import QuantizedWeight
from database.tuning import HiddenStates
from scripts import estimate
from scripts.estimate import search_tokens
from utils import attention
from utils.decoder import Block, Decoder
from utils.files import write_atomic
from utils.fitness import Fitness
from utils.report import commit, format_table

GIGABYTE = 10**9
PAPER_TOKENS = 8388608                               # of a database
SEARCH_FLAGS = {"evo_drop": "--sparsity 0.25", "evo_unstructured": "--sparse_weights_path sparsegpt",
                "evo_quant": "--quant_weights_path gptq --target_bitwidth 2.5"}
PAPER_BITS = ["--model_name_or_path", "-", "--quant_weights_path", "-", "--target_bitwidth", "2.5"]


class Part:
    """How large a part is, and where its results go."""

    def __init__(self, name: str, out: Path, tiny: bool):
        self.name, self.out, self.tiny = name, out, tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.model = "tiny" if tiny else "llama-3-8b"
        self.dtype = "float32" if tiny else "bfloat16"
        self.results: dict = {"device": torch.cuda.get_device_name() if not tiny else "CPU, tiny",
                              "torch": torch.__version__, "commit": commit()}

    def scaled(self, value: int, tiny: int) -> int:
        return tiny if self.tiny else value

    def load(self, num_tokens: int) -> tuple[Decoder, list[torch.Tensor]]:
        return load(self.model, self.device, num_tokens, self.dtype)

    def keep(self, **results) -> None:
        """Note results, and print them: what a part was killed before it ended is in its log."""
        self.results |= results
        print(json.dumps(results, default=str)[:2000], flush=True)


@contextlib.contextmanager
def timed(device: torch.device):
    """A list that holds the seconds of the context, the device's work included, when it is left."""
    seconds: list[float] = []
    meter = search.Meter(device, 0)
    began = meter.now()
    yield seconds
    seconds.append(meter.now() - began)


def peak_memory(device: torch.device) -> dict[str, float]:
    """GB at the highest since the last call, on the device and on the host."""
    meter = search.Meter(device, 0)
    peak = {"device_gb": torch.cuda.max_memory_allocated() / GIGABYTE if meter.cuda else 0.0,
            "host_gb": meter._resident("VmHWM") / GIGABYTE}
    if meter.cuda:
        torch.cuda.reset_peak_memory_stats()
    return peak


# ---- parts -----------------------------------------------------------------------------------------------------------


def tests(part: Part) -> None:
    """The tests that only a GPU runs."""
    files = ["test_kernels.py", "test_attention.py", "test_database_hessian.py", "test_database_solvers.py",
             "test_hidden_states.py", "test_offload.py", "test_kernels_missing.py"]
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    class Recorder:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome].append(report.nodeid)

    pytest.main(["-q", "-rs", *(str(ROOT / "tests" / file) for file in (files[-1:] if part.tiny else files))],
                plugins=[Recorder()])
    part.keep(counts={outcome: len(names) for outcome, names in outcomes.items()}, failed=outcomes["failed"])


def demo(part: Part) -> None:
    """The demo's databases and searches on the device, against the CPU's values."""
    model = ["--model_name_or_path", str(ROOT / "demo" / "model"), "--calibration_data", "stdlib",
             "--calibration_sequence_length", "256", "--calibration_tokens", str(part.scaled(32768, 1024))]
    few = [*model, "--no_eval", "--generations", "1", "--initial_tokens", "256", "--initially_generated", "4",
           "--offspring", str(part.scaled(24, 2)), "--survivors_per_selection", "2", "1", "--tokens_per_selection",
           *part.scaled(["1024", "8192"], ["256", "256"])]
    values: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", str(part.device)):
            at, found = Path(folder) / f"{device}{len(values)}", {}
            found_errors = {}
            for module, method in ((gptq, "gptq"), (sparsegpt, "sparsegpt")):
                levels = part.scaled(LEVEL_FLAGS[method], {
                    "gptq": "--bitwidth_options 2 3 --calibration_bitwidth 3 --quantizable_modules layers.[01][.]",
                    "sparsegpt": "--sparsity 0.6 --num_levels 1 --prunable_modules layers.[01][.]"}[method])
                module.main(module.make_parser().parse_args([*model, *levels.split(), "--device", device, "--dtype",
                                                             "float32", "--save_dir", str(at / method)]))
                manifest = json.loads((at / method / "manifest.json").read_text())["layers"]
                found_errors[method] = [level["error"] for layer in manifest.values()
                                        for level in layer["levels"].values()]
            for script, more in ((evo_drop, ["--sparsity", "0.25"]),
                                 (evo_unstructured, ["--sparse_weights_path", str(Path(folder) / "cpu0/sparsegpt")]),
                                 (evo_quant, ["--quant_weights_path", str(Path(folder) / "cpu0/gptq"),
                                              "--target_bitwidth", "2.5"])):
                run = at / script.__name__
                script.main([*few, *more, "--device", device, "--dtype", "float32", "--output_dir", str(run)])
                found[script.__name__] = [json.loads(line)["fitness"]
                                          for line in (run / "log.jsonl").read_text().splitlines()]
            values[f"{device}{len(values)}"] = found | found_errors
    cpu, other = values.values()
    part.keep(differences={name: max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(cpu[name], other[name]))
                           for name in cpu})


def generation(name: str) -> Callable[[Part], None]:
    """One generation of a search: the plain way, here, and here with each ingredient off."""
    def run(part: Part) -> None:
        divide = part.scaled(search.DIVIDE["llama-3-8b"], 512)
        decoder, documents = part.load(part.scaled(131072 // divide, 1024))
        meter = search.Meter(part.device, 0)
        with tempfile.TemporaryDirectory(dir=part.out) as folder:
            played = play(name, decoder, documents, divide, Path(folder), one_block=True)
            for whole in (True, False):              # the essential first
                with contextlib.ExitStack() as stack:
                    stack.enter_context(patch.object(search, "with_compile", lambda played: {}))
                    if part.tiny:                    # divergences near zero, and no time for a large product
                        stack.enter_context(patch.dict(search.TOLERANCE, {torch.float32: 1e-2}))
                        stack.enter_context(patch.object(search, "seconds_a_flop", lambda *_: 1e-10))
                    result = search.measure(name, played, 1 if part.tiny or not whole else 2, meter, whole)
                search.print_result(name, result, meter.cuda)
                part.keep(**result, divide=divide, **peak_memory(part.device))
                write_atomic(part.out / f"{part.name}.json", json.dumps(part.results))
    return run


def database_layers(part: Part) -> None:
    """All levels of the layers of a block, in one pass and level by level."""
    args = argparse.Namespace(tokens=part.scaled(8192, 8192), block_size=128, group_size=128, repeats=1, threads=1,
                              device=str(part.device))
    layers = layers_benchmark.llama_3_block(part.scaled(4096, 128))
    if part.tiny:
        layers = {name: layers[name] for name in ("k_proj", "v_proj")}
    rows = layers_benchmark.compare(layers, args)
    print(format_table(rows))
    part.keep(rows=rows)


def database_block(part: Part) -> None:
    """Whole blocks from end to end, hidden states on the host: plain transfers against overlapped ones, extrapolated to
    the paper's tokens and all blocks."""
    tokens, blocks = part.scaled(131072, 512), 2
    for module, method in ((sparsegpt, "sparsegpt"), (gptq, "gptq")):
        for way in ("overlapped", "plain"):
            decoder, documents = part.load(tokens)
            args = module.make_parser().parse_args([*LEVEL_FLAGS[method].split(), "--model_name_or_path", "-",
                                                    "--save_dir", "-"])
            module.resolve(args, decoder.config)
            peak_memory(part.device)
            with tempfile.TemporaryDirectory(dir=part.out) as folder, contextlib.ExitStack() as stack:
                args.save_dir = Path(folder)
                if way == "plain":
                    stack.enter_context(patch.object(hidden_states, "Transfers", lambda *_: None))
                calibration = Calibration(decoder, documents, part.device, part.scaled(8192, 128),
                                          offload_activations=True)
                layers = build.choose_layers(decoder, None, "")[:blocks]
                manifest = build_manifest(module, method, decoder, args, layers)
                calibrating = Stopwatch(part.device)
                for name in ("measure", "run"):
                    stack.enter_context(patch.object(calibration, name,
                                                     calibrating.of(name, getattr(calibration, name))))
                with timed(part.device) as seconds:
                    build.build_blocks(args, manifest, calibration, layers, module.solve_layer,
                                       args.calibration_bitwidth if method == "gptq" else None)
                written = sum(file.stat().st_size for file in args.save_dir.iterdir())
            passes = sum(map(statistics.mean, calibrating.seconds.values()))     # of every block but the last
            levels = (seconds[0] - sum(map(sum, calibrating.seconds.values()))) / blocks
            part.keep(**{f"{method}, {way}": {
                "seconds_a_block": passes + levels, "calibration": passes, "levels": levels,
                "gb_written_a_block": written / blocks / GIGABYTE, **peak_memory(part.device),
                "hours_at_paper": (passes * PAPER_TOKENS / tokens + levels) * 32 / 3600}})
            del decoder, calibration


def build_manifest(module, method: str, decoder: Decoder, args: argparse.Namespace, layers: list[dict]) -> dict:
    """Of a database that is still to be built."""
    args.calibration_tokens = args.calibration_tokens or PAPER_TOKENS
    flags = {key: value for key, value in vars(args).items() if key not in build.NOT_COMPARED}
    manifest = {"format": store.FORMAT, "method": method, "model": "-", "config_sha256": "", "weights_sha256": "",
                "calibration_sha256": "", "flags": flags, "layers": {name: None for block in layers for name in block}}
    store.write_manifest(args.save_dir, manifest)
    return manifest


class Stopwatch:
    """Seconds of every call of some functions, not of those that one of them makes of another."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._inside = device, {}, False

    def of(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            with timed(self.device) as seconds:
                result = function(*args, **kwargs)
            self._inside = False
            self.seconds.setdefault(name, []).append(seconds[0])
            return result
        return call


def walk(part: Part) -> None:
    """Tokens a second of the fitness walk by microbatch size and way of attention."""
    decoder, documents = part.load(part.scaled(32768, 1024))
    candidates = [tuple((block == dropped, False) for block in range(len(decoder.blocks))) for dropped in range(2)]
    minibatch = [(i, len(document)) for i, document in enumerate(documents)]
    total = len(candidates) * sum(length for _, length in minibatch)
    ways = {"one kernel for all documents": contextlib.nullcontext(),
            "documents one after another": patch.object(attention, "has_varlen", lambda *_: False),
            "masked": patch.object(decoder, "by_document", False)}
    fitness = Fitness(decoder, documents, lambda i, state: decoder.blocks[i].drop(*state))
    rates: dict[str, dict[int, float]] = {}
    for size in part.scaled([2048, 4096, 8192, 16384], [64, 128]):
        for way, switched in ways.items():
            fitness.microbatch_tokens = size
            with switched:
                fitness.measure(candidates[:1], minibatch[:4])           # kernels are compiled or chosen
                with timed(part.device) as seconds:
                    fitness.measure(candidates, minibatch)
            rates.setdefault(way, {})[size] = total / seconds[0]
            part.keep(rates=rates, **{"limit" if fitness.microbatch_tokens < size else "fits": size})
    part.keep(**peak_memory(part.device))


def offload(part: Part) -> None:
    """Offloaded search of blocks of a 70B model: rate of copies, how far they and the levels' hide, a generation of 80
    blocks. Every candidate has levels of its own in every layer, none of which are kept."""
    decoder, documents = load("tiny" if part.tiny else "llama-3-70b", torch.device("cpu"), part.scaled(8192, 512),
                              part.dtype)
    block = sum(parameter.nbytes for parameter in decoder.blocks[0].module.parameters())
    with timed(part.device) as pinning:
        decoder.offload_blocks(part.device)
    decoder.by_document = part.device.type == "cuda"
    attention.enable()
    minibatch = [(i, len(document)) for i, document in enumerate(documents)]
    count, visits, rng = len(decoder.blocks), 3, random.Random(0)
    with timed(part.device) as copying:
        for index in [*range(count)] * visits:
            decoder.bring(index)
    a_copy = copying[0] / (count * visits)
    rounds: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory(dir=part.out) as folder:
        database = build_database(decoder, "gptq", Path(folder) / "packed", one_block=True, drawn=True)
        switcher = LevelSwitcher(decoder, database, 0.0)
        fitness = Fitness(decoder, documents, switcher.set_block, microbatch_tokens=part.scaled(8192, 256))
        for way in ("levels beside", "levels waited for"):
            with patch.object(switcher.cache, "_side", switcher.cache._side if way == "levels beside" else None):
                for candidates in part.scaled([1, 4, 16], [1, 2]):
                    states = [switcher.states({name: rng.choice((2, 3)) for name in database.layers})
                              for _ in range(candidates)]
                    fitness.measure(states[:1], minibatch[:2])
                    with timed(part.device) as seconds:
                        fitness.measure(states, minibatch)
                    rounds.setdefault(way, {})[candidates] = seconds[0]
        levels = sum(database.bits(name, 3, overhead=True) for name in switcher.names[0]) / 8
    largest, seconds = max(rounds["levels beside"].items())
    args = evo_quant.parse_arguments(PAPER_BITS)
    a_candidate_token = seconds / largest / sum(length for _, length in minibatch) / count * 80
    part.keep(pinning_seconds=pinning[0], gb_a_block=block / GIGABYTE, gb_a_block_at_3_bits=levels / GIGABYTE,
              copies_gb_a_second=block / a_copy / GIGABYTE, rounds=rounds,
              hidden={number: min(1.0, a_copy * count / taken) for number, taken in rounds["levels beside"].items()},
              generation_hours=a_candidate_token * (search_tokens(args, 1) - search_tokens(args, 0)) / 3600,
              **peak_memory(part.device))


def profile(part: Part) -> None:
    """Of one generation for bits, from its second selection step on (the profiler needs minutes for the first one's
    events): the operators that take the device longest, and the share of time it waits."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    divide = part.scaled(64, 512)
    decoder, documents = part.load(part.scaled(8192, 1024))
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (part.device.type == "cuda")]
    kind = "cpu" if part.tiny else "device"
    with tempfile.TemporaryDirectory(dir=part.out) as folder:
        played = play("evo_quant", decoder, documents, divide, Path(folder), one_block=True)
        del played.steps[0]
        here(played)
        played.forget_loaded()
        with timed(part.device) as seconds:
            here(played)
        played.forget_loaded()
        with profiler(activities=activities) as profiled:
            here(played)
    events = profiled.key_averages()
    # on a GPU the kernels themselves: operators that launch them have the same time once more
    spent = {event.key[:90]: getattr(event, f"self_{kind}_time_total") / 1e6 for event in events
             if part.tiny or event.device_type == torch.autograd.DeviceType.CUDA}
    top = dict(sorted(spent.items(), key=lambda pair: -pair[1])[:15])
    part.keep(seconds=seconds[0], busy=sum(spent.values()), waits=max(0.0, 1 - sum(spent.values()) / seconds[0]),
              top=top, reads={name: sum(event.count for event in events if event.key == name)
                              for name in ("aten::item", "cudaStreamSynchronize", "cudaMemcpyAsync")})


def finishing(part: Part) -> None:
    """finish.py at 3 bits: steps of one block's training and of all blocks' together, and hours at its defaults."""
    documents = [torch.randint(part.scaled(128256, 256), (part.scaled(2048, 32),)) for _ in range(16)]
    decoder, _ = part.load(part.scaled(2048, 64))
    calibration = HiddenStates(decoder, documents, part.scaled(4096, 64), part.device)
    steps, batch_tokens = part.scaled(5, 2), 8 * len(documents[0])
    teacher = None
    for block in decoder.blocks:
        teacher = calibration.run(teacher, block.index)
    with tempfile.TemporaryDirectory(dir=part.out) as folder:
        database = build_database(decoder, "gptq", Path(folder) / "gptq", one_block=True)

        def weights(block: Block, together: bool) -> dict[str, QuantizedWeight]:
            return {f"{name.removeprefix(block.name + '.')}.weight": QuantizedWeight(
                layer.weight, database.packed(name, 3, part.device), 3, database.group_size(name, 3), not together,
                together=together) for name, layer in block.layers.items()}

        own, targets = weights(decoder.blocks[0], together=False), calibration.run(None, 0)
        calibration.train(0, own, None, targets, 1, batch_tokens, 0)         # kernels are chosen
        peak_memory(part.device)
        with timed(part.device) as apart:
            calibration.train(0, own, None, targets, steps, batch_tokens, 0)
        part.keep(seconds_a_step=apart[0] / steps, block=peak_memory(part.device))
        every = [weights(block, together=True) for block in decoder.blocks]
        with timed(part.device) as whole:
            losses = [*calibration.train_together(every, None, teacher, steps, batch_tokens, 0)]
    part.keep(seconds_a_step_together=whole[0] / steps, losses=losses, together=peak_memory(part.device),
              hours=200 * 32 * apart[0] / steps / 3600, hours_of_100_together=100 * whole[0] / steps / 3600)


PARTS: dict[str, Callable[[Part], None]] = {
    "tests": tests, "demo": demo, **{f"generation-{name}": generation(name) for name in reversed(SEARCHES)},
    "database-block": database_block, "database-layers": database_layers, "finish": finishing, "walk": walk,
    "offload": offload, "profile": profile}


# ---- report ----------------------------------------------------------------------------------------------------------


def tables(found: dict[str, dict]) -> tuple[str, str]:
    """(targets, everything) of the parts that are finished, as Markdown."""
    devices = ", ".join(dict.fromkeys(result["device"] for result in found.values()))
    targets = [[devices, "measured", "target"]]
    everything: list[list[list]] = []
    args = evo_quant.parse_arguments(PAPER_BITS)
    for name in SEARCHES:
        if result := found.get(f"generation-{name}"):
            costs, seconds = result["costs"], result["costs"]["here"]["seconds"]
            faster = costs["plain"]["seconds"] / seconds
            targets.append([f"a generation of {name} against the plain way", f"{faster:.2f}x",
                            "1.8x" if name == "evo_drop" else "3x"])
            if name == "evo_quant":
                hours = search_tokens(args, args.generations) / (result["tokens"] / seconds) / 3600
                targets += [["the paper's 2.5-bit search, hours (extrapolated)", f"{hours:.1f}", "8"],
                            ["its device memory, GB", f"{result['device_gb']:.1f}", "40"]]
            everything.append([[f"generation of {name}, tokens / {result['divide']}", "seconds", "tokens/s",
                                "against plain", "of the matmul peak", "device, GB", "host, GB"],
                               *[[way if way in search.WHOLE else f"here, without: {way}", cost["seconds"],
                                  f"{result['tokens'] / cost['seconds']:,.0f}",
                                  f"{costs['plain']['seconds'] / cost['seconds']:.2f}x",
                                  f"{result['flops'] / cost['seconds'] / result['peak']:.0%}",
                                  cost["device"] / GIGABYTE, cost["host"] / GIGABYTE] for way, cost in costs.items()]])
    if result := found.get("database-layers"):
        for row in result["rows"][1:]:
            if row[0].endswith(": all"):
                targets.append([f"{row[0].removesuffix(': all')} of a block against level by level", f"{row[3]:.1f}x",
                                "8x"])
        everything.append(result["rows"])
    if result := found.get("database-block"):
        rows = {key: value for key, value in result.items() if isinstance(value, dict)}
        columns = list(next(iter(rows.values())))
        everything.append([["a block from end to end", *(column.replace("_", " ") for column in columns)],
                           *[[key, *row.values()] for key, row in rows.items()]])
    if result := found.get("walk"):
        sizes = list(next(iter(result["rates"].values())))
        everything.append([["walk, tokens/s, by tokens of a microbatch", *sizes],
                           *[[way, *(f"{rate:,.0f}" for rate in rates.values())]
                             for way, rates in result["rates"].items()]])
    for name in ("tests", "demo", "offload", "profile"):
        if result := found.get(name):
            everything.append([[name, ""], *[[key.replace("_", " "), _words(value)] for key, value in result.items()
                                             if key not in ("device", "torch", "commit", "top")]])
    if result := found.get("profile"):
        everything.append([["kernel", "of the profile's time"],
                           *[[key, f"{seconds / result['busy']:.1%}"] for key, seconds in result["top"].items()]])
    if rows := compared(found):
        everything.append(rows)
    missing = [name for name in PARTS if name not in found]
    if missing:
        everything.append([["not yet measured", ""], *[[name, "–"] for name in missing]])
    return format_table(targets), "\n\n".join(map(format_table, everything))


def compared(found: dict[str, dict]) -> list[list]:
    """Rows of what scripts/estimate.py says of an A100, and of what was measured: whole commands with the paper's
    settings, from parts of them, and the rates that the estimates rest on."""
    rows: list[list] = []
    sizes: dict[str, float] = {}                     # of databases, by folder
    with tempfile.TemporaryDirectory() as folder:
        for name, blocks in (("llama-3-8b", 32), ("llama-3-70b", 80)):
            LlamaConfig(**SHAPES[name] | {"num_hidden_layers": blocks}).save_pretrained(f"{folder}/{name}")

        def need(command: str, model: str = "llama-3-8b") -> estimate.Need:
            return estimate.need_of([*command.split(), "--model_name_or_path", f"{folder}/{model}"], sizes)

        def a_generation(command: str, model: str = "llama-3-8b") -> float:
            one, two = (need(f"{command} --generations {count}", model).seconds for count in (1, 2))
            return two - one

        for method in ("sparsegpt", "gptq"):
            asked = need(f"-m database.{method} {LEVEL_FLAGS[method]} --save_dir {method}")
            if measured := found.get("database-block", {}).get(f"{method}, overlapped"):
                rows += [[f"database.{method}, hours", asked.seconds / 3600, measured["hours_at_paper"]],
                         [f"database.{method}, files, GB", asked.disk / GIGABYTE, 32 * measured["gb_written_a_block"]],
                         [f"database.{method}, device, GB", asked.device / GIGABYTE, measured["device_gb"]]]
        for name in SEARCHES:
            command = f"{name}.py {SEARCH_FLAGS[name]}"
            if result := found.get(f"generation-{name}"):
                here = result["costs"]["here"]
                rows += [[f"{name}, a generation, s", a_generation(command), result["divide"] * here["seconds"]],
                         [f"{name}, of the matmul peak", estimate.UTILIZATION,
                          result["flops"] / here["seconds"] / result["peak"]],
                         [f"{name}, device, GB", need(command).device / GIGABYTE, result["device_gb"]]]
        if result := found.get("finish"):
            asked = need("finish.py --quant_weights_path gptq --quant_config_path 3 --save_dir out")
            rows += [["finish.py, hours", asked.seconds / 3600, result["hours"]],
                     ["finish.py, device, GB", asked.device / GIGABYTE, result["block"]["device_gb"]]]
        if result := found.get("offload"):
            need(f"-m database.gptq {LEVEL_FLAGS['gptq']} --save_dir gptq", "llama-3-70b")
            command = f"evo_quant.py {SEARCH_FLAGS['evo_quant']} --cpu_offload_modules"
            rows += [["evo_quant of 70B, offloaded, a generation, s", a_generation(command, "llama-3-70b"),
                      3600 * result["generation_hours"]],
                     ["copies from pinned memory, GB/s", estimate.COPIES / GIGABYTE, result["copies_gb_a_second"]]]
    return [["", "estimated for an A100", "measured"], *rows] if rows else []


def parts_of(found: dict[str, dict]) -> dict[str, list[str]]:
    """commit -> the parts that it has run."""
    commits: dict[str, list[str]] = {}
    for name, result in found.items():
        commits.setdefault(f"{result['commit']}, torch {result['torch']}", []).append(name)
    return commits


def _words(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_words(item)}" for key, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def run(name: str, out: Path, tiny: bool) -> dict:
    """Run a part; its results, which are in its file then."""
    out.mkdir(parents=True, exist_ok=True)
    if tiny:
        torch.set_num_threads(1)
    part, began = Part(name, out, tiny), time.time()
    PARTS[name](part)
    part.keep(part_seconds=time.time() - began)
    write_atomic(out / f"{name}.json", json.dumps(part.results) + "\n")
    return part.results


def attempt(name: str, out: Path, tiny: bool) -> bool:
    """Run a part; whether it succeeded. What it raises is printed."""
    print(f"== {name}", flush=True)
    try:
        run(name, out, tiny)
    except (Exception, SystemExit):
        traceback.print_exc(file=sys.stdout)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="one, or several in one process, where one that fails "
                                                                 "stops no other")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--list", action="store_true", help="only name the parts, in their order")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--write_readme", action="store_true", help="only put the tables into the two README.md")
    args = parser.parse_args()
    if args.list:
        print("\n".join(PARTS))
    elif args.report or args.write_readme:
        found = {name: json.loads((args.out / f"{name}.json").read_text()) for name in PARTS
                 if (args.out / f"{name}.json").exists()}
        targets, everything = tables(found)
        print(f"{targets}\n\n{everything}")
        if args.write_readme:
            made = [f"Commit {commit}: parts {', '.join(names)}" for commit, names in parts_of(found).items()]
            write_readme("gpu", targets, ROOT / "README.md", made)
            write_readme("gpu", everything, ROOT / "benchmarks" / "README.md", made)
    elif not args.parts or {*args.parts} - {*PARTS}:
        parser.error(f"name parts ({', '.join(PARTS)}), or give --list, --report or --write_readme")
    elif not args.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny shows that the parts work")
    else:
        failed = [name for name in args.parts if not attempt(name, args.out, args.tiny)]
        sys.exit(f"failed: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
