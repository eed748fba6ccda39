"""Reliability: every program killed, starved of disk and fed damaged files, over and over; anything unexpected fails.

    python benchmarks/reliability.py --kills 20 --full_disks 10 --mutations 2500 --write_readme

Killed: SIGKILL at a random moment, then the same command again: its files have to be those of a run never killed, byte
for byte (seconds and pictures aside), with nothing half-written in between or left over. Full disk: writing fails, by
a limit on the size of files or by an error of the system's at a random write; the program has to end in one sentence,
and the same command, given room, in the same files. Damaged: a file that is read is truncated, altered, swapped or
replaced; it has to be refused by name, or to be read as if nothing had happened. A configuration may be edited, so it
may also be another one that fits the model and meets its budget.

A process is forked from this one, which has imported everything, so that killing one costs no minute of imports.
Without --write_readme the table is only printed. Exits with 1 where anything failed.
"""
import argparse
import errno
import faulthandler
import fcntl
import inspect
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)              # and not benchmarks/, which has a database.py of its own

import matplotlib.pyplot  # noqa: F401  imported late otherwise, in every process anew
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eval_config
import evo_drop
import evo_quant
import evo_unstructured
import export
from baselines import dp, drop_scores, owl
from benchmarks.damage import Failure, Reader, read_damaged, readers
from benchmarks.programs import write_readme
from database import build, gptq, sparsegpt
from database.store import Database
from scripts import convergence, nonmonotonicity
from utils.configs import write_drop_config, write_level_config
from utils.report import format_table

# WORK is the folder that a program works in; processes that are forked cannot use a GPU that the first one has used
MODEL = "--model_name_or_path WORK/model --device cpu"
TEXT = "--calibration_data WORK/text.jsonl --calibration_sequence_length 32 --calibration_tokens 512"
EVALUATION = "--eval_datasets WORK/text.jsonl --eval_sequence_length 32"
SEARCH = (f"{MODEL} {TEXT} {EVALUATION} --eval_tokens 128 --eval_every 2 --initially_generated 4 --initial_tokens 64 "
          f"--generations 4 --offspring 4 --survivors_per_selection 2 1 --tokens_per_selection 64 128 "
          f"--output_dir WORK/out/run")
SPARSE = "--sparse_weights_path WORK/sparse"
QUANT = "--quant_weights_path WORK/quant"
FOUND = f"{QUANT} --quant_config_path WORK/quant.txt --drop_config WORK/drop.txt"
GROWING = ("log.jsonl", "timing.jsonl", "checkpoint.json", "manifest.json")    # not yet final before a run's end
NOT_COMPARED = ("timing.jsonl", "search.png")
TRIALS = {"killed": "same files", "disk full": "one sentence", "beneath a file": "one sentence"}   # and what is right
OUTPUTS = ("--output_dir", "--save_dir", "--drop_config_dir", "--output")      # flags that name a place to write


def command(parser_of: Callable, main: Callable) -> Callable[[list[str]], None]:
    """A database build as its command line runs it."""
    def run(argv: list[str]) -> None:
        sys.argv[1:] = argv
        build.run(parser_of(), main)
    return run


def kinds_of(kind: type) -> Iterator[type]:
    """A class and all that are derived from it."""
    yield kind
    for derived in kind.__subclasses__():
        yield from kinds_of(derived)


# program -> (its main, its arguments)
PROGRAMS: dict[str, tuple[Callable[[list[str]], object], str]] = {
    "evo_drop.py": (evo_drop.main, f"{SEARCH} --sparsity 0.5 --save_dir WORK/out/model"),
    "evo_unstructured.py": (evo_unstructured.main, f"{SEARCH} {SPARSE}"),
    "evo_quant.py": (evo_quant.main, f"{SEARCH} {QUANT} --target_bitwidth 2.5"),
    "database.sparsegpt": (command(sparsegpt.make_parser, sparsegpt.main), (
        f"{MODEL} {TEXT} --sparsity 0.5 --num_levels 2 --weights_diff 100 --save_dir WORK/out/database")),
    "database.gptq": (command(gptq.make_parser, gptq.main), (
        f"{MODEL} {TEXT} --bitwidth_options 2 3 4 --calibration_bitwidth 3 --save_dir WORK/out/database")),
    "baselines.drop_scores": (drop_scores.main, (
        f"{MODEL} {TEXT} --scoring_method cosine_similarity kl_div --sparsities 0.5 --save_dir WORK/out")),
    "baselines.owl": (owl.main, f"{MODEL} {TEXT} {SPARSE} --save_dir WORK/out"),
    "baselines.dp": (dp.main, f"{MODEL} {TEXT} {SPARSE} --errors kl --measured_levels -1 1 --save_dir WORK/out"),
    "scripts/convergence.py": (convergence.main, (
        f"{MODEL} {TEXT} --sparsity 0.5 --brute_force_tokens 256 --search WORK/pairs --output WORK/out/ranks.json")),
    "scripts/nonmonotonicity.py": (nonmonotonicity.main, f"{MODEL} {TEXT} --most 3 --save_dir WORK/out"),
    "eval_config.py": (eval_config.main, (
        f"{MODEL} {FOUND} {EVALUATION} --eval_tokens 512 --output WORK/out/results.json")),
    "export.py": (export.main, f"{MODEL} {FOUND} --save_dir WORK/out/export"),
}


class Workplace:
    """A folder `work` that is filled anew for every trial, with a small model, text, databases and configurations;
    `others` has databases of other seeds."""

    def __init__(self, folder: Path, patience: float = 300):
        """A program that has not ended after `patience` seconds hangs: it is ended, and prints where it was."""
        self.patience = patience
        self.inputs, self.work, self.others = (folder / name for name in ("inputs", "work", "others"))
        self._whole: dict[str, tuple[dict[str, bytes], float]] = {}
        self.inputs.mkdir(parents=True)
        self.others.mkdir()
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                             num_attention_heads=2, max_position_embeddings=64, initializer_range=0.2)
        for part in (LlamaForCausalLM(config), tokenizer):
            part.save_pretrained(self.inputs / "model")
        text = inspect.getsource(argparse)
        (self.inputs / "text.jsonl").write_text("".join(
            json.dumps({"text": text[start:start + 400]}) + "\n" for start in range(0, 40_000, 400)))
        self.inputs.rename(self.work)                        # what a program writes names its inputs
        for kind, program in (("sparse", "database.sparsegpt"), ("quant", "database.gptq")):
            for seed, to in (("0", self.work), ("1", self.others)):
                self.run(program, seed=seed)
                shutil.move(self.work / "out" / "database", to / kind)
        self.run("evo_drop.py", output_dir=f"{self.work}/pairs", drop_entire_block="", drop_two_consecutive="")
        levels = {kind: list(Database.open(self.work / kind).layers) for kind in ("sparse", "quant")}
        write_level_config(self.work / "sparse.txt", {name: i % 2 * 2 - 1 for i, name in enumerate(levels["sparse"])})
        write_level_config(self.work / "quant.txt", {name: 2 + i % 3 for i, name in enumerate(levels["quant"])})
        write_drop_config(self.work / "drop.txt", [(True, False), (False, False), (True, True), (False, True)])
        shutil.rmtree(self.work / "out")
        self.work.rename(self.inputs)

    def fill(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.inputs, self.work)

    def arguments(self, program: str, **changes: str) -> list[str]:
        argv = [word.replace("WORK", str(self.work)) for word in PROGRAMS[program][1].split()]
        return argv + [word for flag, value in changes.items() for word in (f"--{flag}", *value.split())]

    def start(self, program: str, prepare: Callable[[], object] = lambda: None, **changes: str) -> tuple[int, int]:
        """(process id, pipe of what it prints) of a new process that runs the program."""
        argv, (read, write) = self.arguments(program, **changes), os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2**20)        # more than a program prints, so it never waits
        sys.stdout.flush()
        process = os.fork()
        if process:
            os.close(write)
            return process, read
        code = 70
        try:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
            for kind in kinds_of(tqdm):                      # theirs is one for all: who is killed keeps it locked
                kind.set_lock(threading.RLock())
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.setitimer(signal.ITIMER_REAL, self.patience)
            prepare()
            PROGRAMS[program][0](argv)
            code = 0
        except SystemExit as end:                            # as the interpreter itself ends a program
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def finish(self, process: int, pipe: int) -> tuple[int, str]:
        """(exit status, negative for a signal; what was printed)."""
        with os.fdopen(pipe, errors="replace") as stream:
            printed = stream.read()
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), printed

    def run(self, program: str, prepare: Callable[[], object] = lambda: None, **changes: str) -> None:
        """Run to the end, without an error."""
        status, printed = self.finish(*self.start(program, prepare, **changes))
        if status:
            raise Failure(f"{program} ended with {status}: {printed[-5000:]}")

    def files(self) -> dict[str, bytes]:
        """Content by path of what is in `work` and can be compared."""
        found = {}
        for path in sorted(self.work.rglob("*")):
            if path.is_dir() or path.name in NOT_COMPARED:
                continue
            content = path.read_bytes()
            if path.name == "summary.json":
                content = json.dumps(json.loads(content) | {"seconds": None, "tokens_per_second": None}).encode()
            found[str(path.relative_to(self.work))] = content
        return found

    def whole(self, program: str) -> tuple[dict[str, bytes], float]:
        """The files of a run that nothing happens to, and the seconds it takes."""
        if program not in self._whole:
            self.fill()
            began = time.time()
            self.run(program)
            self._whole[program] = self.files(), time.time() - began
        return self._whole[program]

    def check_nothing_half_written(self, whole: dict[str, bytes]) -> None:
        """Every file that has its name is as it will be at the end, apart from those that grow."""
        for name, content in self.files().items():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not hidden and Path(name).name not in GROWING and content != whole.get(name):
                raise Failure(f"{name} is there, but not as it is at the end")

    def check_same(self, program: str, whole: dict[str, bytes]) -> None:
        """The same command again ends in the same files."""
        self.run(program)
        found = self.files()
        differing = [name for name in sorted({*found, *whole}) if found.get(name) != whole.get(name)]
        if differing:
            raise Failure(f"{', '.join(differing[:5])}: not as in a run that nothing happened to")


# ---- killed, and without room ----------------------------------------------------------------------------------------


def killed(place: Workplace, program: str, times: int, rng: random.Random) -> Counter:
    """Killed at random moments, each time in a run from the beginning, and run again."""
    whole, seconds = place.whole(program)
    counts: Counter = Counter()
    while counts.total() < times:
        place.fill()
        process, pipe = place.start(program)
        time.sleep(rng.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        status, printed = place.finish(process, pipe)
        if status == 0:                                      # it was faster
            continue
        if status != -signal.SIGKILL:
            raise Failure(f"{program} ended by itself with {status}: {printed[-2000:]}")
        place.check_nothing_half_written(whole)
        if place.files() != whole:                           # else it was killed between its last file and its exit
            place.check_same(program, whole)
        counts["same files"] += 1
    return counts


def full_disk(place: Workplace, program: str, times: int, rng: random.Random) -> Counter:
    """No room at random moments: by turns for the bytes of a file, and for one of the writes."""
    whole, _ = place.whole(program)
    largest = max(len(content) for name, content in whole.items() if not (place.inputs / name).exists())
    writes, counts = 16, Counter()
    while counts.total() < times:
        place.fill()
        if counts.total() % 2:
            limit = rng.randrange(1, largest)
            status, printed = place.finish(*place.start(program, lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, limit))))
        else:
            failing = rng.randint(1, writes)
            status, printed = place.finish(*place.start(program, lambda: fail_at_write(failing)))
            if status == 0:
                writes = failing                             # it has no more than that
        if status == 0:
            continue
        check_one_sentence(program, status, printed)
        place.check_nothing_half_written(whole)
        place.check_same(program, whole)
        counts["one sentence"] += 1
    return counts


def fail_at_write(number: int) -> None:
    """In this process, the `number`-th file to be made durable is not: no space is left."""
    fsync, calls = os.fsync, iter(range(1, 10**9))

    def failing(handle):
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)
    os.fsync = failing


def beneath_a_file(place: Workplace, program: str) -> Counter:
    """Every flag that names a place to write names one beneath a file."""
    counts: Counter = Counter()
    for flag in OUTPUTS:
        if flag in PROGRAMS[program][1].split():
            place.fill()
            before = place.files()
            status, printed = place.finish(*place.start(program, **{flag[2:]: f"{place.work}/drop.txt/below"}))
            check_one_sentence(program, status, printed)
            if "drop.txt" not in printed or place.files() != before:
                raise Failure(f"{program} {flag} beneath a file: {printed[-500:]}")
            counts["one sentence"] += 1
    return counts


def check_one_sentence(program: str, status: int, printed: str) -> None:
    last = printed.strip().splitlines()[-1:]
    if status not in (1, 2) or "Traceback" in printed or not last or "error: " not in last[0]:
        raise Failure(f"{program} ended with {status} and no sentence: {printed[-2000:]}")


def finished(place: Workplace) -> list[Reader]:
    """Readers of everything that is read back, from one finished run of each kind."""
    place.fill()
    for program, folder in (("evo_drop.py", "run"), ("evo_quant.py", "quant_run")):
        place.run(program, output_dir=f"{place.work}/{folder}")
    place.run("export.py")
    return readers(place.work, place.others)


# ---- all of it -------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="PROGRAM")
    parser.add_argument("--kills", type=int, default=20, metavar="TIMES", help="of each program (default: 20)")
    parser.add_argument("--full_disks", type=int, default=10, metavar="TIMES", help="of each program (default: 10)")
    parser.add_argument("--mutations", type=int, default=2500, metavar="TIMES",
                        help="over all files that are read (default: 2500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write_readme", action="store_true", help="put the table into benchmarks/README.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Try everything; returns the number of failures."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    outcomes: dict[tuple[str, str], Counter] = {}
    failures = []

    def attempt(what: str, how: str, trial: Callable[[], Counter]) -> None:
        counts = outcomes.setdefault((what, how), Counter())
        try:
            counts += trial()
        except Failure as failure:
            counts["else"] += 1
            failures.append(f"{what}, {how}: {failure}")
            print(failures[-1], file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder) / "reliability")
        for program in args.programs:
            attempt(program, "killed", lambda: killed(place, program, args.kills, rng))
            attempt(program, "disk full", lambda: full_disk(place, program, args.full_disks, rng))
            attempt(program, "beneath a file", lambda: beneath_a_file(place, program))
            print(program, *(f"{how}: {dict(outcomes[program, how])}" for how in TRIALS), sep=", ", flush=True)
        damaged = finished(place) if args.mutations else []
        for number in range(args.mutations):
            reader = damaged[number % len(damaged)]
            attempt(reader.kind, "damaged", lambda: Counter([read_damaged(reader, rng)[1]]))

    rows = [["program", *(f"{how}: {wanted}" for how, wanted in TRIALS.items())]]
    rows += [[program, *(f"{outcomes[program, how][wanted]} of {outcomes[program, how].total()}"
                         for how, wanted in TRIALS.items())] for program in args.programs]
    read = ("one sentence", "same result", "another that fits", "else")
    damages = [["damaged file", "times", "refused by name", "read as before", "another that fits", "anything else"]]
    damages += [[kind, str(counts.total()), *(str(counts[outcome]) for outcome in read)]
                for (kind, how), counts in outcomes.items() if how == "damaged"]
    tables = "\n\n".join(map(format_table, (rows, damages) if args.mutations else (rows,)))
    print(tables)
    if args.write_readme:
        write_readme("reliability", tables)
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
