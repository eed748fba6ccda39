"""Damaged files: everything that is read back, and ways to damage it.

What is damaged has to be refused by name, or to be read as if nothing had happened. A configuration may be edited, so
it may also be another one that fits the model and meets its budget.
"""
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

import eval_config
from database.levels import check_configuration_flags, open_configuration
from database.store import Database
from utils.configs import read_drop_config
from utils.files import read_sealed
from utils.model import load_decoder, load_tokenizer
from utils.runs import Run

FOREIGN = (b"", b"{}", b"[]", b"null", b"\0" * 64, b"\xff\xfe" * 8, b"[" * 100_000, b"1" * 9_999, b"\x89PNG\r\n\x1a\n",
           b'{"sha256": 0}', b'{"version": 2}', b"\x08\0\0\0\0\0\0\0{}      ")


class Failure(Exception):
    """What must not happen, in words."""


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


def readers(work: Path, others: Path) -> list[Reader]:
    """Everything that is read back, of the databases, configurations, runs and exports in `work`; `others` has
    databases of the same kinds."""
    found = []
    for kind in ("sparse", "quant"):
        layers = sorted((work / kind).glob("*.safetensors"))
        for i in (0, len(layers) // 2):
            found.append(Reader("database, a layer", layers[i], lambda kind=kind, name=layers[i].stem: levels_of(
                work / kind, name), [layers[i - 1], others / kind / layers[i].name]))
        found.append(Reader("database, manifest", work / kind / "manifest.json", lambda kind=kind: Database.open(
            work / kind).manifest, [others / kind / "manifest.json"]))
        arguments = [f"--{kind}_weights_path", f"{work}/{kind}", f"--{kind}_config_path", f"{work}/{kind}.txt",
                     f"--{kind}_budget", "0.45" if kind == "sparse" else "3.5"]
        found.append(Reader("configuration, levels", work / f"{kind}.txt", lambda arguments=arguments: configuration(
            work, arguments), [work / ("quant.txt" if kind == "sparse" else "sparse.txt")], edits=True))
    found.append(Reader("configuration, depth", work / "drop.txt", lambda: configuration(
        work, ["--drop_config", f"{work}/drop.txt", "--drop_budget", "0.5"]), [work / "sparse.txt"], edits=True))
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
    args = eval_config.parse_arguments(["--model_name_or_path", f"{work}/model", *arguments])
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
        "foreign": lambda: rng.choice([*FOREIGN, rng.randbytes(200)]),
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
