"""Calibration and evaluation tokens: named datasets (streamed), local files, and Python's own standard library.

A dataset is named on the command line by
  fineweb_edu | c4 | wikitext2     streamed from the hub through `datasets`, with the paper's conventions
  stdlib                           the source text of the running Python's standard library, always at hand
  PATH                             a .txt, .jsonl or .parquet file (rows need a "text" field, or that of --text_field),
                                   or a folder of them
  NAME:PATH                        local rows under the conventions of NAME, e.g. wikitext2:wiki.test.txt
  NAME+NAME...                     for calibration, equal parts of several of these
Each has a train and a test side that share no document. Documents are int64 tensors of 2 to `sequence_length` tokens.
A tokenizer that begins texts with a BOS token does so once a text: later pieces of a long one have none, and neither
has wikitext2, by convention.
"""
import hashlib
import io
import json
import os
import random
import re
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from utils import distributed

HUB_DATASETS = ("fineweb_edu", "c4", "wikitext2")
LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")
C4_REVISION = "607bd4c8450a42878aa9ddc051a65a055450ef87"
TEST_SHARE = 8  # one document in eight is held out where a source has no split of its own


def check_dataset(name: str, flag: str) -> None:
    """Raise ValueError, naming `flag`, unless `name` is a dataset this module can read. Touches no network."""
    parts = _parts(name)
    if len(parts) > 1:
        if flag != "--calibration_data":
            raise ValueError(f"{flag} {name}: only calibration mixes texts; name these one by one")
        for part in parts:
            check_dataset(part, flag)
        return
    convention, path = _parse(name)
    if path is None:
        if convention not in (*HUB_DATASETS, "stdlib"):
            raise ValueError(f"{flag} {name or repr(name)}: no such dataset, file or folder; use one of "
                             f"{', '.join(HUB_DATASETS)}, stdlib, a {'/'.join(LOCAL_SUFFIXES)} file or a folder of "
                             f"them")
    elif not path.exists():
        raise ValueError(f"{flag} {name}: {path} does not exist")
    elif not _local_files(path):
        raise ValueError(f"{flag} {name}: found no {', '.join(LOCAL_SUFFIXES)} file; rows of .jsonl and .parquet need "
                         f'a "text" field')


@distributed.from_main
def calibration_documents(name: str, tokenizer, num_tokens: int, sequence_length: int, seed: int = 0,
                          flag: str = "--calibration_tokens", text_field: str = "text") -> list[torch.Tensor]:
    """Exactly `num_tokens` tokens of the train side, as documents of at most `sequence_length` tokens.

    `text_field`: of local rows: a text, or a chat's messages. Several datasets give equally many tokens, to one or two,
    and their documents come in random order, so that any number of the first has some of each.

    Raises ValueError when the dataset holds fewer: a calibration set silently smaller than asked changes the result.
    """
    parts = _parts(name)
    shares = trimmed_lengths([-(-num_tokens // len(parts))] * len(parts), num_tokens)
    drawn: list[torch.Tensor] = []
    for part, share in zip(parts, shares):
        documents = _documents(part, "train", tokenizer, share, sequence_length, seed, text_field)
        available = sum(map(len, documents))
        if available < share:
            most = "that many" if len(parts) == 1 else f"{available * len(parts)}, of which it gives that many,"
            raise ValueError(f"{flag} {num_tokens}: {part} holds only {available} training tokens; "
                             f"ask for at most {most} or add text")
        lengths = trimmed_lengths([len(d) for d in documents], share)
        # copies, which leave the text they were cut from behind, here and where processes are given them
        drawn += [document[:length].clone() for document, length in zip(documents, lengths)]
    if len(parts) > 1:
        random.Random(seed).shuffle(drawn)
    return drawn


@distributed.from_main
def evaluation_documents(name: str, tokenizer, num_tokens: int, sequence_length: int, text_field: str = "text"
                         ) -> list[torch.Tensor]:
    """Up to `num_tokens` tokens of the test side: what there is. Raises ValueError when there is nothing at all.

    wikitext2 and c4 come as consecutive windows of exactly `sequence_length` tokens, the last partial one dropped.
    """
    documents = _documents(name, "test", tokenizer, num_tokens, sequence_length, 0, text_field)
    if not documents:
        raise ValueError(f"--eval_datasets {name}: no text to evaluate on at --eval_sequence_length {sequence_length}")
    if sum(map(len, documents)) > num_tokens:
        if _parse(name)[0] in ("wikitext2", "c4"):                    # only whole windows
            if num_tokens < sequence_length:
                raise ValueError(f"--eval_tokens {num_tokens}: {name} comes in windows of --eval_sequence_length "
                                 f"{sequence_length} tokens; raise it to that, or lower that")
            documents = documents[:num_tokens // sequence_length]
        else:
            lengths = trimmed_lengths([len(d) for d in documents], num_tokens)
            documents = [document[:length] for document, length in zip(documents, lengths)]
    return [document.clone() for document in documents]      # without the text they were cut from


def trimmed_lengths(lengths: list[int], num_tokens: int) -> list[int]:
    """Lengths of the first documents cut to exactly `num_tokens` tokens in total, the last one trimmed.

    A document of one token predicts nothing, so where one would be left the latest longer document before it gives
    up a token. Raises ValueError when the documents are too few, or too short to do that.
    """
    kept: list[int] = []
    missing = num_tokens
    for length in lengths:
        if missing <= 0:
            break
        kept.append(min(length, missing))
        missing -= kept[-1]
    if missing > 0:
        raise ValueError(f"{num_tokens} tokens asked for, but the documents hold only {num_tokens - missing}")
    if kept and kept[-1] == 1:
        donor = next((i for i in range(len(kept) - 2, -1, -1) if kept[i] > 2), None)
        if donor is None:
            raise ValueError(f"{num_tokens} tokens cannot be made up of documents of two or more tokens")
        kept[donor] -= 1
        kept[-1] = 2
    return kept


def draw_minibatch(documents: list[torch.Tensor], num_tokens: int, rng: random.Random) -> list[tuple[int, int]]:
    """Documents drawn without replacement until exactly `num_tokens` tokens (paper: the minibatch of a selection step).

    Returns (document index, length) pairs; all but the last (see `trimmed_lengths`) have their full length.
    """
    order = list(range(len(documents)))
    rng.shuffle(order)
    if num_tokens % 2 and all(len(documents[i]) == 2 for i in order[:num_tokens // 2]):
        longer = next((i for i in order if len(documents[i]) > 2), order[0])   # no odd number is made of twos alone
        order.remove(longer)
        order.insert(0, longer)
    lengths = trimmed_lengths([len(documents[i]) for i in order], num_tokens)
    return list(zip(order, lengths))


def documents_sha256(documents: list[torch.Tensor]) -> str:
    """Tells calibration texts apart."""
    return hashlib.sha256(b"".join(document.numpy().tobytes() + b"|" for document in documents)).hexdigest()


def check_minibatches(documents: list[torch.Tensor], sizes: Iterable[int]) -> None:
    """Raise ValueError for a number of tokens that no minibatch of `documents` can have: an odd one where all of them
    have two tokens."""
    odd = [size for size in sizes if size % 2]
    if odd and all(len(document) == 2 for document in documents):
        raise ValueError(f"--initial_tokens, --tokens_per_selection {odd[0]}: an odd number, but all calibration "
                         f"documents have two tokens; give even numbers, or a --calibration_sequence_length above 2")


def sequence_length(asked: int | None, config, flag: str) -> int:
    """The value of `flag`, or its default. Raises ValueError where the model has fewer positions, or is another
    function beyond some."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if asked and positions and asked > positions:
        raise ValueError(f"{flag} {asked}: more than the model's {positions} positions; give at most that many")
    rope_type, original = _changing_rope(config)
    if asked and original and asked > original:
        raise ValueError(f"{flag} {asked}: the model's rotary embedding ({rope_type}) is another one beyond {original} "
                         f"positions, so long and short documents cannot be compared; give at most {original}")
    return asked or default_sequence_length(config)


def default_sequence_length(config) -> int:
    """min(context length, 8192): what a missing --calibration_sequence_length or --eval_sequence_length means. Where
    the rotary embedding depends on a batch's length, the length up to which it is the same."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(positions or 8192, _changing_rope(config)[1] or 8192, 8192)


def _changing_rope(config) -> tuple[str | None, int | None]:
    """(type, positions up to which it stays as it is) of a rotary embedding that changes with the largest position of
    a batch."""
    text_config = config.get_text_config(decoder=True)
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]         # one for each type of layer
    found = []
    for kind in kinds:
        rope_type = kind.get("rope_type") or kind.get("type") or ""
        original = (kind.get("original_max_position_embeddings")
                    or getattr(text_config, "original_max_position_embeddings", None))
        if original and (rope_type == "longrope" or "dynamic" in rope_type):
            found.append((rope_type, original))
    return min(found, key=lambda pair: pair[1], default=(None, None))


# ---- where text comes from -------------------------------------------------------------------------------------------


def stdlib_texts(split: str, with_tests: bool = False) -> list[str]:
    """Source files of the running Python's standard library; a hash of the relative path decides the side.

    `with_tests` adds the interpreter's own test suite, which some distributions leave out; only demo/train.py asks for
    it, and only for the train side.
    """
    train, test = _stdlib_sides(with_tests)
    return [*(train if split == "train" else test)]


@cache
def _stdlib_sides(with_tests: bool) -> tuple[list[str], list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"site-packages", "dist-packages", "__pycache__"} | (set() if with_tests
                                                                     else {"test", "tests", "idle_test"})
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = {*inner} - excluded                       # they are not even looked into
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    texts: dict[bool, list[str]] = {False: [], True: []}
    for path in sorted(found):
        relative = path.relative_to(root)
        if relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-"):
            continue
        held_out = int(hashlib.sha256(relative.as_posix().encode()).hexdigest(), 16) % TEST_SHARE == 0
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            texts[held_out].append(text)
    known = set(texts[False])
    return texts[False], [text for text in texts[True] if text not in known]    # a few files are there under two names


def local_texts(path: Path, split: str, text_field: str = "text") -> list[str]:
    """Documents of local files: a .txt file is one, a row of .jsonl or .parquet is one.

    A file whose name contains the word "train" or "test" belongs to that side. Of the rest every eighth document is
    held out; where there are fewer than sixteen, or eight different ones, the last eighth of each one's text is.
    """
    unsplit: list[str] = []
    chosen: list[str] = []
    for file in _local_files(path):
        side = _named_side(file)
        if side == split:
            chosen += _rows(file, text_field)
        elif side is None:
            unsplit += _rows(file, text_field)
    many = len(unsplit) >= 2 * TEST_SHARE
    if many:
        unsplit = list(dict.fromkeys(unsplit))       # a repeated document stays on one side
    if many and len(unsplit) >= TEST_SHARE:
        unsplit = [text for i, text in enumerate(unsplit) if (i % TEST_SHARE == TEST_SHARE - 1) == (split == "test")]
    else:
        cuts = [len(text) - len(text) // TEST_SHARE for text in unsplit]
        unsplit = [text[cut:] if split == "test" else text[:cut] for text, cut in zip(unsplit, cuts)]
    return [text for text in chosen + unsplit if text.strip()]


def _parts(name: str) -> list[str]:
    """The datasets that are mixed; a plus in a path that exists is none of that."""
    path = _parse(name)[1]
    return [name] if path is not None and path.exists() else name.split("+")


def _parse(name: str) -> tuple[str, Path | None]:
    """(convention, local path or None) of a dataset's name."""
    convention, colon, path = name.partition(":")
    if colon and path and convention in HUB_DATASETS:
        return convention, Path(path)
    if name in (*HUB_DATASETS, "stdlib"):
        return name, None
    if name and Path(name).exists():                         # Path("") is the current folder
        return "documents", Path(name)
    return name, None


def _local_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in LOCAL_SUFFIXES and file.is_file()]


def _named_side(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", file.name.lower())
    return next((side for side in ("train", "test") if side in words), None)


def _rows(file: Path, text_field: str = "text", lines: bool = False) -> list[str]:
    """Texts of one local file; with `lines`, the lines of a .txt file as the hub's WikiText rows have them. Of a chat's
    messages, their contents, one after the other."""
    try:
        if file.suffix == ".txt":
            text = file.read_text(encoding="utf-8-sig")      # without the mark that some editors begin a file with
            return [line if line.strip() else "" for line in io.StringIO(text)] if lines else [text]
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8-sig") as stream:
                rows = [json.loads(line)[text_field] for line in stream if line.strip()]
        else:
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(file, columns=[text_field]).column(text_field).to_pylist()
        rows = ["\n\n".join(message["content"] for message in row) if isinstance(row, list) else row for row in rows]
        if not all(isinstance(text, str) for text in rows):
            raise TypeError(f'a "{text_field}" is not a string')
        return rows
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f'{file}: cannot be read as text ({type(error).__name__}: {error}); .txt needs UTF-8, rows of '
                         f'.jsonl and .parquet need a "{text_field}" field, or name theirs with --text_field'
                         ) from error


def _convention_rows(convention: str, path: Path | None, split: str, seed: int, text_field: str) -> Iterable[str]:
    """Rows of wikitext2, c4 or fineweb_edu, from a local file or streamed from the hub."""
    if path is not None:
        rows: list[str] = []
        for file in _local_files(path):
            texts = _rows(file, text_field, lines=convention == "wikitext2")
            cut = len(texts) - len(texts) // TEST_SHARE
            side = _named_side(file)
            rows += texts if side == split else [] if side else texts[cut:] if split == "test" else texts[:cut]
        return rows
    if convention == "wikitext2":
        return _from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
    if convention == "c4":
        file = "en/c4-train.00000-of-01024.json.gz" if split == "train" else "en/c4-validation.00000-of-00008.json.gz"
        rows = _from_hub("allenai/c4", data_files={split: file}, revision=C4_REVISION, split=split, streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=10_000) if split == "train" else rows.take(1_100)
    else:  # first half of the shards trains, the second half evaluates
        rows = _from_hub("HuggingFaceFW/fineweb-edu", "sample-10BT", split="train", streaming=True)
        rows = rows.shard(2, 0 if split == "train" else 1, contiguous=True).shuffle(seed=seed, buffer_size=10_000)
    return (row["text"] for row in rows)


def _from_hub(dataset: str, *configuration: str, **options):
    from datasets import load_dataset
    try:
        return load_dataset(dataset, *configuration, **options)
    except OSError as error:
        raise ValueError(f"{dataset}: cannot be read from the hub ({error}); without a network use stdlib, local files "
                         f"or a copy, e.g. wikitext2:wiki.train.txt") from error


# ---- from text to documents ------------------------------------------------------------------------------------------


def _documents(name: str, split: str, tokenizer, num_tokens: int, sequence_length: int, seed: int,
               text_field: str = "text") -> list[torch.Tensor]:
    """At least `num_tokens` tokens of `split` where the dataset has them, else all it has."""
    if sequence_length < 2:
        raise ValueError(f"sequence length {sequence_length}: a document needs at least 2 tokens to predict one")
    convention, path = _parse(name)
    rng = random.Random(seed)
    if convention == "wikitext2":
        rows = _convention_rows(convention, path, split, seed, text_field)
        tokens = _tokenize(tokenizer, "\n\n".join(rows), add_special_tokens=False)
        if split == "test":
            return _windows(tokens, sequence_length)
        count = -(-num_tokens // sequence_length)
        if len(tokens) <= max(sequence_length, num_tokens):  # random windows would only repeat what there is
            return _pieces(tokens, sequence_length)
        starts = [rng.randrange(len(tokens) - sequence_length) for _ in range(count)]
        return [tokens[start:start + sequence_length] for start in starts]
    if convention == "c4":
        rows = _convention_rows(convention, path, split, seed, text_field)
        if split == "test":
            return _windows(_tokenize(tokenizer, "\n\n".join(rows)), sequence_length)
        return _joined_windows(rows, tokenizer, num_tokens, sequence_length)
    if convention == "fineweb_edu":
        texts = _convention_rows(convention, path, split, seed, text_field)
    elif path is None and convention != "stdlib":            # which programs refuse before, naming their flag
        raise ValueError(f"{name}: no such file, folder or dataset")
    else:
        texts = stdlib_texts(split) if path is None else local_texts(path, split, text_field)
        rng.shuffle(texts)
    return _split_documents(texts, tokenizer, num_tokens, sequence_length)


def _split_documents(texts: Iterable[str], tokenizer, num_tokens: int, sequence_length: int) -> list[torch.Tensor]:
    """Pieces of single documents, never joined. No document gives more than a sixteenth of the tokens while others
    are left: one huge file would otherwise be the whole calibration set."""
    most_pieces = max(1, num_tokens // (16 * sequence_length))
    documents: list[torch.Tensor] = []
    reserve: list[torch.Tensor] = []
    total = 0
    for text in texts:
        pieces = _pieces(_tokenize(tokenizer, text), sequence_length)
        documents += pieces[:most_pieces]
        reserve += pieces[most_pieces:]
        total += sum(map(len, pieces[:most_pieces]))
        if total >= num_tokens:
            return documents
    return documents + reserve


def _joined_windows(texts: Iterable[str], tokenizer, num_tokens: int, sequence_length: int) -> list[torch.Tensor]:
    """C4's train convention: documents joined by two newlines until a window is full, then trimmed to it."""
    windows: list[torch.Tensor] = []
    joined, least_bytes = "", 0  # fewer than this cannot be full: spares tokenising every prefix
    for text in texts:
        joined = f"{joined}\n\n{text}" if joined else text
        if len(joined.encode()) < least_bytes:
            continue
        tokens = _tokenize(tokenizer, joined)
        if len(tokens) < sequence_length:
            least_bytes = len(joined.encode()) + sequence_length - len(tokens)  # a token has at least one byte
            continue
        windows.append(tokens[:sequence_length])
        joined, least_bytes = "", 0
        if len(windows) * sequence_length >= num_tokens:
            break
    return windows


def _tokenize(tokenizer, text: str, add_special_tokens: bool = True) -> torch.Tensor:
    # verbose=False: the warning about the model's maximum length does not apply, the text is cut afterwards
    tokens = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    if tokens[:2] == [tokenizer.bos_token_id] * 2:           # the text begins with it, too
        tokens = tokens[1:]
    return torch.tensor(tokens, dtype=torch.int64)


def _windows(tokens: torch.Tensor, sequence_length: int) -> list[torch.Tensor]:
    return [tokens[i:i + sequence_length] for i in range(0, len(tokens) - sequence_length + 1, sequence_length)]


def _pieces(tokens: torch.Tensor, sequence_length: int) -> list[torch.Tensor]:
    return [piece for piece in tokens.split(sequence_length) if len(piece) > 1]
