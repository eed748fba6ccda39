"""Read and write configurations in the paper's text formats.

Depth: one of none/attn/mlp/attn+mlp a line, one line a block. Sparsity and bits: `layer.name: level` a line.
Files are read strictly: a misspelt or missing line is an error, never a default.
"""
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils import distributed
from utils.files import write_atomic

DROP_WORDS = {"none": (False, False), "attn": (True, False), "mlp": (False, True), "attn+mlp": (True, True)}


def read_drop_config(path: str | Path, num_blocks: int | None = None) -> list[tuple[bool, bool]]:
    """(attention dropped, MLP dropped) of every block. Raises ValueError naming file, line and what would be right."""
    lines = _lines(path)
    wrong = [(number, line) for number, line in enumerate(lines, 1) if line not in DROP_WORDS]
    if wrong:
        found = "; ".join(f"line {number}: {line!r}" for number, line in wrong[:3])
        raise ValueError(f"{path}: {found}; every line is one of {', '.join(DROP_WORDS)}")
    if num_blocks is not None and len(lines) != num_blocks:
        raise ValueError(f"{path}: {len(lines)} lines, but the model has {num_blocks} blocks; one line a block is "
                         f"needed")
    return [DROP_WORDS[line] for line in lines]


@distributed.main_only
def write_drop_config(path: str | Path, dropped: Sequence[tuple[bool, bool]]) -> None:
    """One line a block, as `read_drop_config` reads it."""
    write_atomic(path, "".join(f"{word}\n" for word in drop_words(dropped)))


def drop_words(dropped: Sequence[tuple[bool, bool]]) -> list[str]:
    """The word of every block, of which (attention, MLP) are dropped."""
    words = {state: word for word, state in DROP_WORDS.items()}
    return [words[bool(attn), bool(mlp)] for attn, mlp in dropped]


def check_configuration_name(name: str) -> None:
    """Raise ValueError for a --configuration_name that leads elsewhere, or could be another file of a run or
    database."""
    if not re.fullmatch(r"[^/\0]+\.txt", name):
        raise ValueError(f"--configuration_name {name}: a file name ending in .txt is needed, without a folder")


def parse_level(text: str) -> float:
    """A level as files and flags have it: a whole number, or bits a weight with a fraction (K-quants). Raises
    ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return int(value) if value.is_integer() else value


def read_level_config(path: str | Path) -> dict[str, float]:
    """Level by layer name, in the file's order. Raises ValueError naming file and line."""
    levels: dict[str, float] = {}
    for number, line in enumerate(_lines(path), 1):
        name, colon, level = line.rpartition(":")
        try:
            value = parse_level(level)
        except ValueError:
            colon = ""
        if not colon or not name.strip():
            raise ValueError(f"{path}: line {number}: {line!r} is not `layer.name: level` with a number")
        if name.strip() in levels:
            raise ValueError(f"{path}: line {number}: {name.strip()} is there twice")
        levels[name.strip()] = value
    return levels


@distributed.main_only
def write_level_config(path: str | Path, levels: dict[str, float]) -> None:
    """`layer.name: level` a line, in the order given."""
    write_atomic(path, "".join(f"{name}: {level}\n" for name, level in levels.items()))


def check_level_config(path: str | Path, levels: dict[str, float], available: dict[str, Iterable[float]]
                       ) -> None:
    """Raise ValueError with the first three lines of `path` that do not fit the layers and levels `available`."""
    wrong = [f"{name}: {level} ({'no such layer' if name not in available else 'no such level'})"
             for name, level in levels.items() if level not in available.get(name, ())]
    wrong += [f"{name} (missing)" for name in available if name not in levels]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path}: does not fit the model and database: {'; '.join(wrong[:3])}{more}; use the database "
                         f"the configuration was found on, or one with the same layers and levels")


def _lines(path: str | Path) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); a configuration is a text file") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: is empty; a configuration has one line a block or a layer")
    return lines
