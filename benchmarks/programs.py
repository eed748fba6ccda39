"""What benchmarks share: running whole programs, and putting what they print into benchmarks/README.md."""
import argparse
import json
import os
import runpy
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from utils.files import write_atomic
from utils.report import commit

ROOT = Path(__file__).resolve().parents[1]
COMMAND = shlex.join(["python", *sys.argv])      # before `run_here` changes it


def run(arguments: list[object], log: Path) -> None:
    """Run Python with these arguments, on one thread and offline; what it prints goes to `log`. Raises SystemExit
    where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    with log.open("w") as stream:
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=stream, stderr=stream,
                              env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\nfailed, see {log}")


def run_here(arguments: list[object], log: Path) -> None:
    """Run one of the scripts with these arguments in this process, where what a script imports has to be imported only
    once; what it prints goes to `log`. Raises SystemExit where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = list(map(str, arguments))
    with log.open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
            return
        except SystemExit as error:
            if error.code in (None, 0):
                return
            if isinstance(error.code, str):
                print(error.code)
        except Exception:
            traceback.print_exc()
    raise SystemExit(f"{' '.join(sys.argv)}\nfailed, see {log}")


def claim(folder: Path, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Make the folder in which results are kept, for these values of the flags `names`. Raises SystemExit where it
    holds results of others, which would be taken for these."""
    flags, file = {name: getattr(args, name) for name in names}, folder / "flags.json"
    kept = json.loads(file.read_text()) if file.exists() else flags
    for name, value in flags.items():
        if kept.get(name) != value:
            raise SystemExit(f"--out {folder}: has results of --{name} {kept.get(name)}, not {value}; give another "
                             f"folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(flags))


def sparsity_step(model: str) -> int:
    """1/16 of a square layer, in weights: in relation to the layers about what a step of 1,000,000 is in the paper."""
    return json.loads((Path(model) / "config.json").read_text())["hidden_size"]**2 // 16


def group_size(model: str) -> int:
    """The largest of 128, 64, 32 that divides the hidden size."""
    hidden = json.loads((Path(model) / "config.json").read_text())["hidden_size"]
    return next(size for size in (128, 64, 32) if hidden % size == 0)


def made_by() -> str:
    """The commit and the command of what is measured now."""
    return f"Commit {commit()}: `{COMMAND}`"


def write_readme(name: str, text: str, readme: Path = ROOT / "benchmarks" / "README.md",
                 made: Iterable[str] | None = None) -> None:
    """Put `text` between the marks <!-- NAME --> and <!-- /NAME -->, and what it was made by: `made`, or this very
    command. Raises SystemExit where the marks are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = readme.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"--write_readme {name}: {readme.name} has no marks {begin} and {end}; add them")
    lines = "\n".join(dict.fromkeys([made_by()] if made is None else made))
    readme.write_text(f"{before}{begin}\n{text}\n\n{lines}\n{end}{after}")
