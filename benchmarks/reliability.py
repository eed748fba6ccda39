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
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)              # and not benchmarks/, which has a database.py of its own

import matplotlib.pyplot  # noqa: E402,F401  imported late otherwise, in every process anew
import torch  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

import eval_config  # noqa: E402
import evo_drop  # noqa: E402
import evo_quant  # noqa: E402
import evo_unstructured  # noqa: E402
import export  # noqa: E402
from baselines import dp, drop_scores, owl  # noqa: E402
from database import build, gptq, sparsegpt  # noqa: E402
from database.levels import check_configuration_flags, open_configuration  # noqa: E402
from database.store import Database  # noqa: E402
from scripts import convergence, nonmonotonicity  # noqa: E402
from utils.configs import read_drop_config, write_drop_config, write_level_config  # noqa: E402
from utils.files import read_sealed  # noqa: E402
from utils.model import load_decoder, load_tokenizer  # noqa: E402
from utils.runs import Run, format_table  # noqa: E402

MODEL = "--model_name_or_path WORK/model".split()
TEXT = "--calibration_data WORK/text.jsonl --calibration_sequence_length 32 --calibration_tokens".split()
SEARCH = [*MODEL, *TEXT, *("512 --eval_datasets WORK/text.jsonl --eval_tokens 128 --eval_sequence_length 32 --eval_every 2 "
                           "--initially_generated 4 --initial_tokens 64 --generations 4 --offspring 4 "
                           "--survivors_per_selection 2 1 --tokens_per_selection 64 128 --output_dir WORK/out/run").split()]
SPARSE = "--sparse_weights_path WORK/sparse".split()
QUANT = "--quant_weights_path WORK/quant".split()
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


# program -> (its main, its arguments, where WORK is the folder it works in)
PROGRAMS: dict[str, tuple[Callable[[list[str]], object], list[str]]] = {
    "evo_drop.py": (evo_drop.main, [*SEARCH, "--sparsity", "0.5", "--save_dir", "WORK/out/model"]),
    "evo_unstructured.py": (evo_unstructured.main, [*SEARCH, *SPARSE]),
    "evo_quant.py": (evo_quant.main, [*SEARCH, *QUANT, "--target_bitwidth", "2.5"]),
    "database.sparsegpt": (command(sparsegpt.make_parser, sparsegpt.main), [
        *MODEL, *TEXT, *"512 --sparsity 0.5 --num_levels 2 --weights_diff 100 --save_dir WORK/out/database".split()]),
    "database.gptq": (command(gptq.make_parser, gptq.main), [
        *MODEL, *TEXT, *"512 --bitwidth_options 2 3 4 --calibration_bitwidth 3 --save_dir WORK/out/database".split()]),
    "baselines.drop_scores": (drop_scores.main, [
        *MODEL, *TEXT, *"512 --scoring_method cosine_similarity kl_div --sparsities 0.5 --save_dir WORK/out".split()]),
    "baselines.owl": (owl.main, [*MODEL, *TEXT, "512", *SPARSE, "--save_dir", "WORK/out"]),
    "baselines.dp": (dp.main, [*MODEL, *TEXT, "512", *SPARSE, *(
        "--errors kl --measured_levels -1 1 --save_dir WORK/out").split()]),
    "scripts/convergence.py": (convergence.main, [
        *MODEL, *TEXT, *"512 --sparsity 0.5 --brute_force_tokens 256 --search WORK/pairs --output WORK/out/ranks.json".split()]),
    "scripts/nonmonotonicity.py": (nonmonotonicity.main, [*MODEL, *TEXT, *"512 --most 3 --save_dir WORK/out".split()]),
    "eval_config.py": (eval_config.main, [*MODEL, *QUANT, *(
        "--quant_config_path WORK/quant.txt --drop_config WORK/drop.txt --eval_datasets WORK/text.jsonl --eval_tokens 512 "
        "--eval_sequence_length 32 --output WORK/out/results.json").split()]),
    "export.py": (export.main, [*MODEL, *QUANT, *(
        "--quant_config_path WORK/quant.txt --drop_config WORK/drop.txt --save_dir WORK/out/export").split()]),
}


class Failure(Exception):
    """What must not happen, in words."""


class Workplace:
    """A folder `work` that is filled anew for every trial, with a small model, text, databases and configurations;
    `others` has databases of other seeds."""

    def __init__(self, folder: Path):
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
        argv = [word.replace("WORK", str(self.work)) for word in PROGRAMS[program][1]]
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
            raise Failure(f"{program} ended with {status}: {printed[-2000:]}")

    def files(self) -> dict[str, bytes]:
        """Content by path of what is in `work` and can be compared."""
        found = {}
        for path in sorted(self.work.rglob("*")):
            if path.is_dir() or path.name in NOT_COMPARED:
                continue
            content = path.read_bytes()
            if path.name == "summary.json":
                content = json.dumps(json.loads(content) | {"seconds": None}).encode()
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
        if flag in PROGRAMS[program][1]:
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


# ---- damaged files ---------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """Something that is read from a file."""
    kind: str
    file: Path
    read: Callable[[], object]
    others: list[Path]                   # files of its kind
    edits: bool = False                  # it may be read as something else
    checked: bool = True                 # damage inside it is seen, not only a wrong length

    def __post_init__(self):
        self.content, self.expected = self.file.read_bytes(), self.read()


def readers(place: Workplace) -> list[Reader]:
    """Everything that is read back, from the files of one finished run of each kind."""
    place.fill()
    work, found = place.work, []
    for program, folder in (("evo_drop.py", "run"), ("evo_quant.py", "quant_run")):
        place.run(program, output_dir=f"{work}/{folder}")
    place.run("export.py")
    for kind in ("sparse", "quant"):
        layers = sorted((work / kind).glob("*.safetensors"))
        for i in (0, len(layers) // 2):
            found.append(Reader("database, a layer", layers[i], lambda kind=kind, name=layers[i].stem: levels_of(
                work / kind, name), [layers[i - 1], place.others / kind / layers[i].name]))
        found.append(Reader("database, manifest", work / kind / "manifest.json", lambda kind=kind: Database.open(
            work / kind).manifest, [place.others / kind / "manifest.json"]))
        arguments = [*MODEL, f"--{kind}_weights_path", "WORK/" + kind, f"--{kind}_config_path", f"WORK/{kind}.txt",
                     f"--{kind}_budget", "0.45" if kind == "sparse" else "3.5"]
        found.append(Reader("configuration, levels", work / f"{kind}.txt", lambda arguments=arguments: configuration(
            work, arguments), [work / ("quant.txt" if kind == "sparse" else "sparse.txt")], edits=True))
    found.append(Reader("configuration, depth", work / "drop.txt", lambda: configuration(
        work, [*MODEL, "--drop_config", "WORK/drop.txt", "--drop_budget", "0.5"]), [work / "sparse.txt"], edits=True))
    flags = read_sealed(work / "run" / "checkpoint.json")["flags"]
    for name in ("checkpoint.json", "log.jsonl"):
        found.append(Reader(f"run, {name}", work / "run" / name, lambda: resumed(work / "run", flags),
                            [work / "quant_run" / name]))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        found.append(Reader("exported model", work / "out" / "model" / name, lambda: loaded(work / "out" / "model"),
                            [work / "out" / "export" / "export.json", work / "text.jsonl"], checked=False))
    return found


def levels_of(folder: Path, name: str) -> list[bytes]:
    database = Database.open(folder)
    return [database.weight(name, level).view(torch.uint8).numpy().tobytes() for level in database.levels(name)]


def configuration(work: Path, arguments: list[str]) -> object:
    args = eval_config.parse_arguments([word.replace("WORK", str(work)) for word in arguments])
    check_configuration_flags(args, AutoConfig.from_pretrained(work / "model"))
    return read_drop_config(args.drop_config) if args.drop_config else open_configuration(args)[1]


def resumed(folder: Path, flags: dict) -> tuple:
    """State and log of a run, in a copy: resuming writes."""
    copy = shutil.copytree(folder, folder.with_name("resumed"), dirs_exist_ok=True)
    try:
        run = Run(copy, flags)
        return run.state, run.records()
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), str(folder))) from error
    finally:
        shutil.rmtree(copy)


def loaded(folder: Path) -> list[bytes]:
    load_tokenizer(str(folder))
    return [weight.numpy().tobytes() for weight in load_decoder(str(folder), device="cpu").model.parameters()]


def damage(content: bytes, others: list[bytes], rng: random.Random, checked: bool = True) -> tuple[str, bytes]:
    """(what was done, what is left)."""
    place, length = rng.randrange(len(content)), rng.randint(1, 40)
    ways = {
        "truncated": lambda: content[:place],
        "swapped": lambda: rng.choice(others),
        "foreign": lambda: rng.choice([b"", b"{}", b"[]", b"null", b"\0" * 64, b"\xff\xfe" * 8, b"[" * 100_000, b"1" * 9_999,
                                       b"\x89PNG\r\n\x1a\n", rng.randbytes(200), b'{"sha256": 0}', b'{"version": 2}',
                                       b"\x08\0\0\0\0\0\0\0{}      "]),
        "bit flipped": lambda: content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:],
        "overwritten": lambda: content[:place] + rng.randbytes(length) + content[place + length:],
        "cut out": lambda: content[:place] + content[place + length:],
        "doubled": lambda: content[:place] + content[place:place + length] + content[place:],
    }
    while True:
        way = rng.choice(list(ways) if checked else ["truncated", "swapped", "foreign"])
        damaged = ways[way]()
        if damaged != content:
            return way, damaged


def read_damaged(reader: Reader, rng: random.Random) -> tuple[str, str]:
    """(what was done to the file, the outcome) of one trial; the file is put back."""
    way, damaged = damage(reader.content, [other.read_bytes() for other in reader.others], rng, reader.checked)
    try:
        reader.file.write_bytes(damaged)
        found = reader.read()
    except ValueError as error:
        if str(reader.file) not in str(error) and f"{reader.file.parent}:" not in str(error):
            raise Failure(f"{reader.file} {way}: refused, but not by name: {error}") from error
        return way, "one sentence"
    except Exception as error:
        raise Failure(f"{reader.file} {way}: {type(error).__name__}: {error}\n{damaged[:300]!r}") from error
    finally:
        reader.file.write_bytes(reader.content)
    if found == reader.expected:
        return way, "same result"
    if reader.edits:
        return way, "another that fits"
    raise Failure(f"{reader.file} {way}: read as something else")


# ---- all of it -------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="PROGRAM")
    parser.add_argument("--kills", type=int, default=20, metavar="TIMES", help="of each program (default: 20)")
    parser.add_argument("--full_disks", type=int, default=10, metavar="TIMES", help="of each program (default: 10)")
    parser.add_argument("--mutations", type=int, default=2500, metavar="TIMES",
                        help="over all files that are read (default: 2500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write_readme", action="store_true", help="put the table into README.md")
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
        damaged = readers(place) if args.mutations else []
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
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text().partition("<!-- reliability -->\n")
        _, mark, after = rest.partition("<!-- /reliability -->")
        readme.write_text(f"{before}<!-- reliability -->\n{tables}\n{mark}{after}")
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
