"""Files that appear whole or not at all, and JSON that carries its own checksum.

Whatever is read back later (checkpoints, manifests, configurations) is written beside its name first, then renamed, so
that a process may be killed, or a disk get full, at any moment.
"""
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import distributed

PARTIAL = ".partial"             # ending of what is being written
_locked: dict[Path, int] = {}    # folders that this process has locked


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its name, whole, when the context is left, or not at all. What
    processes killed in the middle of that have left is removed. Raises OSError with the file's name."""
    path = Path(path)
    with naming(path):
        for left_over in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
            shutil.rmtree(left_over, ignore_errors=True)
            left_over.unlink(missing_ok=True)                # of earlier versions
        # a folder, since safetensors writes beside a name, too, and would leave that
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL) as folder:
            beside = Path(folder) / path.name
            yield beside
            with beside.open("rb") as stream:
                os.fsync(stream.fileno())
            os.chmod(beside, 0o644)
            os.replace(beside, path)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Raise an OSError that names `path` for any failure to write: safetensors and tokenizers raise exceptions of
    their own, with the system's error number in the text."""
    try:
        yield
    except Exception as error:
        found = re.search(r"(?:os error |code: )(\d+)", str(error))
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        if found:
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def move_checkpoint(source: Path, folder: Path) -> None:
    """Move all files of a checkpoint into `folder`, config.json last, and remove `source`."""
    for file in sorted(filter(Path.is_file, source.rglob("*")), key=lambda file: file.name == "config.json"):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(source)


def check_writable(folder: str | Path, flag: str) -> None:
    """Create `folder`. Raises ValueError naming `flag` when that, or writing a file in it, fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be written ({error.strerror}); name a folder that can") from error


@distributed.from_main
def lock(folder: str | Path, flag: str) -> None:
    """Keep other processes out of `folder` until this one ends. Raises ValueError naming `flag` where one is at work
    there already."""
    key = Path(folder).resolve()
    if key in _locked:
        return
    handle = os.open(key, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{flag} {folder}: another process is at work there; let it end, or name another "
                         f"folder") from None
    except OSError:                      # a file system without locks
        pass
    _locked[key] = handle


def check_writable_file(path: str | Path, flag: str) -> None:
    """Raises ValueError naming `flag` when `path` is a folder, or its folder cannot be written."""
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file")
    check_writable(Path(path).parent, flag)


def seal(content: dict, indent: int | None = None) -> str:
    """`content` as JSON with its SHA-256, for `read_sealed`."""
    return json.dumps({**content, "sha256": _sha256(content)}, indent=indent) + "\n"


def read_sealed(path: str | Path) -> dict:
    """What `seal` was given. Raises ValueError naming the file when it is anything else, in a single bit."""
    content = read_json(path)
    if content.pop("sha256", None) != _sha256(content):
        raise ValueError(f"{path}: damaged or edited (wrong checksum)")
    return content


def read_json(path: str | Path) -> dict:
    """A JSON object. Raises ValueError naming the file when it cannot be read or holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
