"""Exactly the tokens asked for, no document of one token, and no text on both sides of a split."""
import json
import random
import re
import sysconfig
from pathlib import Path
from unittest.mock import Mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils import distributed
from utils.data import (
    C4_REVISION,
    calibration_documents,
    check_dataset,
    default_sequence_length,
    draw_minibatch,
    evaluation_documents,
    local_texts,
    stdlib_texts,
    trimmed_lengths,
)

WORDS = "def return import class self None True for while yield lambda async raise except finally assert".split()


def sentences(count: int, seed: int = 0, words: int = 30) -> list[str]:
    """Distinct texts of different lengths."""
    rng = random.Random(seed)
    return [f"{seed}.{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(3, words))) for i in range(count)]


def ids(tokenizer, text, special=True) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def total(documents) -> int:
    return sum(len(document) for document in documents)


def write_rows(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path)
    else:
        path.write_text("\n".join(texts))
    return path


# ---- exact numbers of tokens -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 50), min_size=1, max_size=20), st.data())
def test_trimmed_lengths_add_up_exactly_and_leave_no_document_of_one_token(lengths, data):
    asked = data.draw(st.integers(2, sum(lengths)))
    try:
        kept = trimmed_lengths(lengths, asked)
    except ValueError:                                       # only when all before the last are pairs and one is left
        assert asked % 2 and set(lengths[:(asked - 1) // 2]) == {2}
        return
    assert sum(kept) == asked
    assert all(2 <= length <= whole for length, whole in zip(kept, lengths))
    assert sum(length < whole for length, whole in zip(kept, lengths)) <= 2


@pytest.mark.parametrize("lengths, asked, kept", [
    ([5, 5, 5], 12, [5, 5, 2]),
    ([5, 5, 5], 11, [5, 4, 2]),                              # one token would be left: the one before is shortened
    ([5, 2, 5], 8, [4, 2, 2]),                               # the one before has none to give: the one before that
    ([5, 5, 5], 10, [5, 5]),
    ([5, 5, 5], 3, [3]),
])
def test_last_document_is_trimmed(lengths, asked, kept):
    assert trimmed_lengths(lengths, asked) == kept


@pytest.mark.parametrize("lengths, asked, message", [([5, 5], 11, "11 tokens asked for, but .* only 10"),
                                                     ([2, 2, 2], 5, "5 tokens cannot be made up"),
                                                     ([9], 1, "1 tokens cannot be made up")])
def test_tokens_that_cannot_be_had_are_refused(lengths, asked, message):
    with pytest.raises(ValueError, match=message):
        trimmed_lengths(lengths, asked)


@given(st.lists(st.integers(3, 40), min_size=1, max_size=30), st.integers(0, 10**6), st.data())
def test_minibatch_is_exact_and_draws_no_document_twice(lengths, seed, data):
    documents = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    asked = data.draw(st.integers(2, sum(lengths)))
    minibatch = draw_minibatch(documents, asked, random.Random(seed))
    indices = [index for index, _ in minibatch]
    assert len(set(indices)) == len(indices)
    assert sum(length for _, length in minibatch) == asked
    assert all(2 <= length <= lengths[index] for index, length in minibatch)
    assert minibatch == draw_minibatch(documents, asked, random.Random(seed))


def test_every_document_is_drawn_equally_often():
    documents, rng = [torch.zeros(4, dtype=torch.int64)] * 8, random.Random(0)
    drawn = [index for _ in range(2000) for index, _ in draw_minibatch(documents, 8, rng)]
    assert all(0.9 * 500 < drawn.count(index) < 1.1 * 500 for index in range(8))


@pytest.mark.parametrize("dataset, asked, sequence_length", [("stdlib", 1001, 32), *[
    (dataset, asked, sequence_length) for dataset in ("txt", "jsonl", "parquet", "wikitext2", "c4", "fineweb_edu")
    for asked, sequence_length in ((1001, 32), (640, 64), (333, 7))]])
def test_calibration_is_exactly_what_was_asked_for(dataset, asked, sequence_length, tokenizer, tmp_path):
    if dataset in ("txt", "jsonl", "parquet"):
        name = str(write_rows(tmp_path / f"rows.{dataset}", sentences(150)))
    elif dataset == "stdlib":
        name = dataset
    else:
        name = f"{dataset}:{write_rows(tmp_path / 'rows.jsonl', sentences(150))}"
    documents = calibration_documents(name, tokenizer, asked, sequence_length, seed=3)
    assert total(documents) == asked
    assert all(document.dtype == torch.int64 and 2 <= len(document) <= sequence_length for document in documents)
    again = calibration_documents(name, tokenizer, asked, sequence_length, seed=3)
    assert all(map(torch.equal, documents, again)) and len(documents) == len(again)
    if dataset != "c4" and dataset != "fineweb_edu":             # their local rows are read in order, not at random
        other = calibration_documents(name, tokenizer, asked, sequence_length, seed=4)
        assert [d.tolist() for d in other] != [d.tolist() for d in documents] or dataset == "txt"


def test_texts_are_mixed_in_equal_parts_and_shuffled(tokenizer, tmp_path, monkeypatch):
    names = [str(write_rows(tmp_path / "rows.jsonl", sentences(150))),
             str(write_rows(tmp_path / "one.txt", sentences(200, seed=2))),
             f"wikitext2:{write_rows(tmp_path / 'wiki.jsonl', sentences(150, seed=1))}"]
    shares = [334, 334, 333]
    mixed = as_lists(calibration_documents("+".join(names), tokenizer, 1001, 32, seed=3))
    apart = [as_lists(calibration_documents(name, tokenizer, share, 32, seed=3)) for name, share in zip(names, shares)]
    assert sorted(mixed) == sorted(document for part in apart for document in part)
    assert all(any(document in part for document in mixed[:12]) for part in apart)
    assert mixed == as_lists(calibration_documents("+".join(names), tokenizer, 1001, 32, seed=3))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)        # the main process asks for all parts at once
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", sent := Mock())
    assert as_lists(calibration_documents("+".join(names), tokenizer, 1001, 32, seed=3)) == mixed
    assert sent.call_count == 1


def test_a_mixture_says_which_text_is_too_short_and_how_many_tokens_there_are(tokenizer, tmp_path):
    long, short = (str(write_rows(tmp_path / f"{count}.jsonl", sentences(count))) for count in (400, 40))
    with pytest.raises(ValueError, match=f"--calibration_tokens 10000: {short} holds only") as error:
        calibration_documents(f"{long}+{short}", tokenizer, 10_000, 64)
    most = int(str(error.value).split("at most ")[1].split(",")[0])
    assert total(calibration_documents(f"{long}+{short}", tokenizer, most, 64)) == most


@pytest.mark.parametrize("convention", ["", "wikitext2:", "c4:", "fineweb_edu:"])
def test_calibration_refuses_less_than_asked_and_evaluation_takes_what_there_is(convention, tokenizer, tmp_path):
    name = convention + str(write_rows(tmp_path / "rows.jsonl", sentences(40)))
    message = rf"--calibration_tokens 5000000: {name} holds only (\d+) training tokens; ask for at most that many"
    with pytest.raises(ValueError, match=message) as error:
        calibration_documents(name, tokenizer, 5_000_000, 64)
    available = int(str(error.value).split("only ")[1].split()[0])
    assert total(calibration_documents(name, tokenizer, available, 64)) == available
    assert 0 < total(evaluation_documents(name, tokenizer, 5_000_000, 64)) < 5_000_000
    assert 0 < total(evaluation_documents(name, tokenizer, 100, 64)) <= 100


def test_evaluation_on_nothing_is_refused(tokenizer, tmp_path):
    name = f"wikitext2:{write_rows(tmp_path / 'wiki.test.txt', ['too short'])}"
    with pytest.raises(ValueError, match=f"--eval_datasets {name}: no text .* at --eval_sequence_length 64"):
        evaluation_documents(name, tokenizer, 1000, 64)


def test_documents_are_pieces_of_one_text_each_and_one_long_text_is_not_the_whole_set(tokenizer, tmp_path):
    texts = ["long " + " ".join(sentences(400, seed=1))] + sentences(40, seed=2)
    name = str(write_rows(tmp_path / "train.jsonl", texts))
    documents = calibration_documents(name, tokenizer, 512, 16, seed=1)
    starts = [document for document in documents if document[0] == tokenizer.bos_token_id]
    assert len(starts) > 8
    whole = [ids(tokenizer, text) for text in texts]
    for document in documents:
        piece = document.tolist()
        assert any(piece == text[i:i + len(piece)] for text in whole for i in range(0, len(text), 16))
    of_the_long_one = [whole[0][i:i + 16] for i in range(0, len(whole[0]), 16)]
    assert sum(document.tolist() in of_the_long_one for document in documents) <= 512 // 16 // 16


@pytest.mark.parametrize("context, length", [(2048, 2048), (131072, 8192)])
def test_default_sequence_length_is_the_context_length_up_to_8192(context, length):
    from transformers import LlamaConfig, OPTConfig
    assert default_sequence_length(LlamaConfig(max_position_embeddings=context)) == length
    assert default_sequence_length(OPTConfig(max_position_embeddings=context)) == length


# ---- train and test --------------------------------------------------------------------------------------------------


def test_stdlib_sides_share_no_text_and_make_up_the_library():
    train, test = stdlib_texts("train"), stdlib_texts("test")
    assert not set(train) & set(test)
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.2
    assert Path(random.__file__).read_text() in train + test
    library = sysconfig.get_paths()["stdlib"]
    suite = [path.read_text(errors="ignore") for path in Path(library, "test").glob("test_r*.py")]    # may be left out
    assert not set(suite) & {*train, *test}
    with_tests = stdlib_texts("train", with_tests=True)
    assert set(train) <= set(with_tests) and not set(with_tests) & set(test)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("count", [1, 5, 16, 100])
def test_local_sides_share_no_text_and_lose_none(suffix, count, tmp_path):
    texts = sentences(count)
    path = write_rows(tmp_path / f"rows{suffix}", texts)
    train, test = local_texts(path, "train"), local_texts(path, "test")
    if suffix != ".txt" and count >= 16:                     # whole rows are held out, every eighth
        assert test == texts[7::8]
        assert sorted(train + test) == sorted(texts)
    else:                                                    # too few: the last eighth of each one's text is
        wholes = ["\n".join(texts)] if suffix == ".txt" else texts
        assert [a + b for a, b in zip(train, test, strict=True)] == wholes
        assert all(abs(len(b) - len(whole) / 8) < 1 for b, whole in zip(test, wholes))


def test_repeated_text_stays_on_one_side(tmp_path):
    texts = sentences(20) * 3
    path = write_rows(tmp_path / "rows.jsonl", texts)
    train, test = local_texts(path, "train"), local_texts(path, "test")
    assert not set(train) & set(test) and set(train) | set(test) == set(texts)


def test_names_with_train_and_test_decide_the_side(tmp_path):
    train, test, rest = sentences(3, seed=1), sentences(3, seed=2), sentences(32, seed=3)
    write_rows(tmp_path / "wiki.train.jsonl", train)
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "more" / "Test-00000.parquet", test)
    write_rows(tmp_path / "contest.jsonl", rest)                       # "test" is in it, but not as a word
    (tmp_path / "notes.md").write_text("not read")
    assert local_texts(tmp_path, "train") == train + [text for i, text in enumerate(rest) if i % 8 != 7]
    assert local_texts(tmp_path, "test") == test + rest[7::8]


@pytest.mark.parametrize("convention", ["", "c4:", "fineweb_edu:", "wikitext2:"])
def test_no_piece_of_test_text_is_calibrated_on(convention, tokenizer, tmp_path):
    texts = sentences(200)
    name = convention + str(write_rows(tmp_path / "rows.jsonl", texts))
    seen = " ".join(tokenizer.decode(d) for d in calibration_documents(name, tokenizer, 2000, 64))
    held_out = " ".join(tokenizer.decode(d) for d in evaluation_documents(name, tokenizer, 2000, 64))
    numbers = [set(re.findall(r"\b0\.\d+:", text)) for text in (seen, held_out)]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]


# ---- the hub's datasets ----------------------------------------------------------------------------------------------


def windows(tokens: list[int], length: int) -> list[list[int]]:
    return [tokens[i:i + length] for i in range(0, len(tokens), length) if i + length <= len(tokens)]


def as_lists(documents) -> list[list[int]]:
    return [document.tolist() for document in documents]


WIKITEXT = ["", " = Title = \n", "", " First paragraph , with words . \n", " Second \u2028 paragraph . \n", ""] * 20


def fake_hub(monkeypatch, make):
    """`datasets.load_dataset` returning make(*args, **kwargs); [(args, kwargs)] of its calls."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return make(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def streamed(shards: list[list[str]]) -> datasets.IterableDataset:
    def rows(shards):
        for shard in shards:
            yield from ({"text": text, "id": i} for i, text in enumerate(shard))
    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": shards})


def test_wikitext2_test_windows_are_consecutive_and_the_last_partial_one_is_dropped(tokenizer, monkeypatch):
    calls = fake_hub(monkeypatch, lambda *_, **__: datasets.Dataset.from_dict({"text": WIKITEXT}))
    expected = windows(ids(tokenizer, "\n\n".join(WIKITEXT), special=False), 48)
    assert as_lists(evaluation_documents("wikitext2", tokenizer, 10**6, 48)) == expected
    assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    assert as_lists(evaluation_documents("wikitext2", tokenizer, 5 * 48 + 3, 48)) == expected[:5]


def test_wikitext2_training_windows_are_random_stretches_of_the_joined_text(tokenizer, monkeypatch):
    calls = fake_hub(monkeypatch, lambda *_, **__: datasets.Dataset.from_dict({"text": WIKITEXT}))
    joined = ids(tokenizer, "\n\n".join(WIKITEXT), special=False)
    drawn = as_lists(calibration_documents("wikitext2", tokenizer, 480, 48, seed=1))
    assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})]
    assert [len(window) for window in drawn] == [48] * 10
    stretches = {tuple(joined[i:i + 48]) for i in range(len(joined) - 47)}
    assert all(tuple(window) in stretches for window in drawn)
    assert drawn != as_lists(calibration_documents("wikitext2", tokenizer, 480, 48, seed=2))


def test_local_wikitext_is_read_as_the_hub_has_it(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "wiki.test.txt"
    path.write_text("".join(row or " \n" for row in WIKITEXT), encoding="utf-8")         # the published files' form
    fake_hub(monkeypatch, lambda *_, **__: datasets.Dataset.from_dict({"text": WIKITEXT}))
    assert as_lists(evaluation_documents(f"wikitext2:{path}", tokenizer, 10**6, 48)) == as_lists(
        evaluation_documents("wikitext2", tokenizer, 10**6, 48))


def test_c4_training_windows_are_documents_joined_until_full_then_trimmed(tokenizer, monkeypatch):
    texts = sentences(60, words=60)
    dataset = streamed([texts])
    calls = fake_hub(monkeypatch, lambda *_, **__: dataset)
    monkeypatch.setattr(datasets.IterableDataset, "shuffle", lambda self, seed, buffer_size: self)
    expected, joined = [], ""
    for text in texts:
        joined = joined + "\n\n" + text if joined else text
        if len(ids(tokenizer, joined)) >= 128:
            expected.append(ids(tokenizer, joined)[:128])
            joined = ""
    asked = 128 * (len(expected) - 2) + 30
    drawn = as_lists(calibration_documents("c4", tokenizer, asked, 128))
    assert drawn == [*expected[:-2], expected[-2][:30]]
    assert calls == [(("allenai/c4",), {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train",
                                        "revision": C4_REVISION, "streaming": True})]


def test_c4_evaluation_joins_the_first_1100_validation_documents(tokenizer, monkeypatch):
    texts = sentences(1150, words=6)
    calls = fake_hub(monkeypatch, lambda *_, **__: streamed([texts]))
    documents = evaluation_documents("c4", tokenizer, 10**7, 64)
    assert as_lists(documents) == windows(ids(tokenizer, "\n\n".join(texts[:1100])), 64)
    assert calls[0][1]["data_files"] == {"test": "en/c4-validation.00000-of-00008.json.gz"}
    assert calls[0][1]["revision"] == "607bd4c8450a42878aa9ddc051a65a055450ef87" and calls[0][1]["streaming"]


def test_fineweb_edu_trains_on_the_first_half_of_the_shards_and_evaluates_on_the_second(tokenizer, monkeypatch):
    shards = [sentences(30, seed=shard) for shard in range(4)]
    calls = fake_hub(monkeypatch, lambda *_, **__: streamed(shards))
    trained = calibration_documents("fineweb_edu", tokenizer, 900, 16)
    evaluated = evaluation_documents("fineweb_edu", tokenizer, 900, 16)
    assert total(trained) == total(evaluated) == 900
    for documents, halves in ((trained, shards[:2]), (evaluated, shards[2:])):
        pieces = {tuple(tokens[i:i + 16]) for shard in halves for text in shard for tokens in [ids(tokenizer, text)]
                  for i in range(0, len(tokens), 16)}
        assert all(tuple(document) in pieces for document in as_lists(documents[:-1]))    # the last one is trimmed
    assert calls[0] == calls[1] == (("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "train", "streaming": True})


def test_fineweb_edu_is_read_no_further_than_needed(tokenizer, monkeypatch):
    read = []

    def rows(shards):
        for shard in shards:
            for i in range(30_000):
                read.append(i)
                yield {"text": f"{shard} {i} " + " ".join(WORDS)}

    fake_hub(monkeypatch, lambda *_, **__: datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1]}))
    assert total(calibration_documents("fineweb_edu", tokenizer, 300, 16)) == 300
    assert len(read) < 15_000                                          # the shuffling buffer, and little more


def test_missing_network_ends_in_a_sentence(tokenizer):
    for name in ("wikitext2", "c4", "fineweb_edu"):
        with pytest.raises(ValueError, match="cannot be read from the hub .*; without a network use stdlib"):
            calibration_documents(name, tokenizer, 100, 16)


# ---- names and files that are refused --------------------------------------------------------------------------------


def test_datasets_are_known_by_name_or_path(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ["text"])
    write_rows(tmp_path / "c++.jsonl", ["text"])
    for name in ("fineweb_edu", "c4", "wikitext2", "stdlib", str(tmp_path), str(tmp_path / "rows.jsonl"),
                 f"c4:{tmp_path}/rows.jsonl", f"stdlib+c4+{tmp_path}", f"{tmp_path}/c++.jsonl"):
        check_dataset(name, "--calibration_data")


@pytest.mark.parametrize("name, message", [
    ("wikitext3", "no such dataset, file or folder; use one of fineweb_edu, c4, wikitext2, stdlib, a .txt"),
    ("no/such/file.txt", "no such dataset, file or folder"),
    ("c4:no/such/file.txt", "no/such/file.txt does not exist"),
    ("{folder}", "found no .txt, .jsonl, .parquet file"),
    ("{folder}/notes.md", "found no .txt, .jsonl, .parquet file"),
    ("stdlib+c4", "only calibration mixes texts; name these one by one"),
    ("wikitext2:", "no such dataset, file or folder"),
])
def test_unknown_dataset_is_refused_naming_flag_and_value(name, message, tmp_path):
    (tmp_path / "notes.md").write_text("not text for us")
    name = name.format(folder=tmp_path)
    with pytest.raises(ValueError, match=rf"--eval_datasets {re.escape(name)}: {message}"):
        check_dataset(name, "--eval_datasets")


def test_part_of_a_mixture_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--calibration_data wikitext3: no such dataset"):
        check_dataset("stdlib+wikitext3", "--calibration_data")


@pytest.mark.parametrize("name", ["", "stdlib+", "+stdlib", "stdlib++c4"])
def test_an_empty_name_is_not_the_current_folder(name, tmp_path, monkeypatch):
    write_rows(tmp_path / "private.jsonl", ["text"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--calibration_data '': no such dataset"):
        check_dataset(name, "--calibration_data")


def test_documents_hold_no_more_than_themselves(tokenizer, tmp_path):
    """As they are given to other processes: a piece of a text would take the whole one with it."""
    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 2000)
    for name in (f"wikitext2:{tmp_path}/text.txt", f"{tmp_path}/text.txt", f"{tmp_path}/text.txt+stdlib"):
        for documents in (calibration_documents(name, tokenizer, 256, 32),
                          [] if "+" in name else evaluation_documents(name, tokenizer, 256, 32)):
            assert all(document.untyped_storage().nbytes() == 8 * len(document) for document in documents)


@pytest.mark.parametrize("file, content", [
    ("rows.jsonl", b'{"text": "fine"}\n{"body": "no text"}\n'),
    ("rows.jsonl", b'{"text": "fine"}\nnot json\n'),
    ("rows.jsonl", b'["a list"]\n'),
    ("rows.jsonl", b'{"text": null}\n'),
    ("rows.txt", b"\xff\xfe not UTF-8"),
    ("rows.parquet", b"not parquet"),
])
def test_file_that_is_no_text_is_refused_naming_it(file, content, tokenizer, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{file}: cannot be read as text .*need a \"text\" field"):
        calibration_documents(str(tmp_path), tokenizer, 10, 8)


def test_parquet_without_text_is_refused_naming_it(tokenizer, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=rf"{tmp_path}/rows.parquet: cannot be read as text"):
        calibration_documents(str(tmp_path), tokenizer, 10, 8)


def test_sequence_of_one_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="sequence length 1: a document needs at least 2 tokens"):
        calibration_documents("stdlib", tokenizer, 10, 1)


# ---- what local text comes as ----------------------------------------------------------------------------------------


def test_text_is_read_from_any_field_and_behind_a_byte_order_mark(tmp_path, tokenizer):
    texts = sentences(20)
    expected = as_lists(calibration_documents(str(write_rows(tmp_path / "rows.jsonl", texts)), tokenizer, 200, 16))
    rows = [{"content": text, "messages": [{"role": "user", "content": part} for part in text.split("\n\n")]}
            for text in texts]
    other = tmp_path / "other.jsonl"
    other.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for field in ("content", "messages"):
        assert as_lists(calibration_documents(str(other), tokenizer, 200, 16, text_field=field)) == expected
    with pytest.raises(ValueError, match=r'other\.jsonl: .*need a "text" field, or name theirs with --text_field'):
        calibration_documents(str(other), tokenizer, 200, 16)
    (tmp_path / "bom.txt").write_text("\ufeff" + texts[0], encoding="utf-8")
    assert local_texts(tmp_path / "bom.txt", "train")[0][0] == texts[0][0]


def test_rows_that_are_all_alike_have_both_sides(tmp_path, tokenizer):
    name = str(write_rows(tmp_path / "rows.jsonl", ["the same words again and again, " * 8] * 20))
    assert total(evaluation_documents(name, tokenizer, 10, 8)) and total(calibration_documents(name, tokenizer, 10, 8))


def test_a_text_that_begins_with_the_bos_token_gets_no_second_one(tmp_path, tokenizer):
    plain, marked = (as_lists(calibration_documents(str(write_rows(tmp_path / f"{name}.jsonl", [
        start + text for text in sentences(20)])), tokenizer, 200, 16)) for name, start in (("a", ""), ("b", "<s>")))
    assert plain == marked and plain[0][0] == tokenizer.bos_token_id != plain[0][1]


def test_text_that_nobody_has_is_not_taken_for_the_standard_library(tokenizer):
    with pytest.raises(ValueError, match="wikitext3: no such file, folder or dataset"):
        evaluation_documents("wikitext3", tokenizer, 128, 32)
