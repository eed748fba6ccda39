"""utils/search.py: a run of whatever candidates, here sets of dropped blocks, is logged, resumed and finished alike."""
import json
from contextlib import suppress

import pytest

import evo_drop
from utils import flags
from utils.errors import RunError
from utils.model import load_config
from utils.search import Search

LINE = ("--calibration_data stdlib --calibration_tokens 256 --calibration_sequence_length 32 --initial_tokens 64 "
        "--tokens_per_selection 64 128 --sparsity 0.5 --eval_datasets stdlib --eval_tokens 64 --eval_every 2 "
        "--eval_sequence_length 32 --device cpu").split()
BLOCKS = [(0,), (1,), (2,), (3,), (4,), (5,)]


@pytest.fixture
def opened(checkpoint, tmp_path):
    """opened(generations): a search, whose candidates are the blocks that are dropped, in tmp_path / "run"."""
    def build(generations: int, *more: str) -> Search:
        args = evo_drop.parse_arguments(["--model_name_or_path", checkpoint, *LINE, "--generations", str(generations),
                                         "--output_dir", str(tmp_path / "run"), *more])
        flags.check_search_flags(args)
        search = Search("blocks", args, load_config(checkpoint), {})
        if not search.run.finished:
            search.load()
            blocks = search.decoder.blocks
            search.prepare(lambda index, state: blocks[index].drop(state, state),
                           lambda candidate: tuple(block.index in candidate for block in blocks),
                           logged=lambda candidate: {"blocks": candidate})
        return search

    return build


def ranked(search: Search, candidates: list, tokens: int) -> list:
    return sorted(zip(search.measure(candidates, search.draw(tokens)), candidates))


def test_tokens_are_counted_the_best_are_the_parents_and_the_log_says_so(opened, tmp_path):
    search = opened(3)
    search.begin(ranked(search, BLOCKS, 64))
    assert search.tokens == 6 * 64 and len(search.parents) == 1
    for generation in search.generations():
        survivors = ranked(search, [(0, 1), (1, 2), (generation,)], 128)[:1]
        search.record(survivors)
        assert search.parents == [survivors[0][1]] and search.best == survivors[0][0]
    search.evaluate("start")
    summary = search.finish("a third", [[0]], ["blocks"], "dropped", [], extra=7)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in log] == sorted(record["tokens"] for record in log)
    assert log[-1]["blocks"] == list(search.parents[0]) and log[-1]["tokens"] == summary["tokens"] == search.tokens
    assert ["evaluation" in record for record in log] == [False, False, True, False]
    assert list(summary["evaluation"]) == ["dense", "start", "search"] and summary["extra"] == 7
    assert summary["evaluation"]["search"]["stdlib"]["kl"] > 0 == summary["evaluation"]["dense"]["stdlib"]["kl"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert opened(3).earlier_summary() == summary and not opened(4).run.finished


def test_resumed_run_has_its_random_numbers_tokens_parents_and_what_the_script_saved(opened):
    first = opened(4)
    first.begin(ranked(first, BLOCKS, 64), note=0)
    with suppress(StopIteration):
        for generation in first.generations():
            if generation == 3:
                raise StopIteration
            first.record(ranked(first, [(generation,), (0, generation)], 128)[:1], note=generation)
    again = opened(4)
    assert again.resumed and again.saved["note"] == 2 and again.generation == 2
    assert (again.tokens, again.parents, again.start, again.best) == (first.tokens, first.parents, first.start,
                                                                      first.best)
    assert again.draw(128) == first.draw(128)
    assert list(again.generations()) == [3, 4]


def test_curve_has_each_new_parent_on_the_same_text_killed_or_not_and_none_of_the_search_s_tokens(opened, monkeypatch):
    pictures = []
    monkeypatch.setattr("utils.search.plot_search", lambda *drawn: pictures.append(drawn[2:4]))
    search = opened(4)
    search.begin([(0.5, (3,))])
    for candidates in ([(3,), (0, 1)], [(0, 1), (2,)]):
        for generation, candidate in zip(search.generations(), candidates):
            search.tokens += 10
            search.record([(0.5 / generation, candidate)])
        search = opened(4)
    search.finish("a third", [[0]], ["blocks"], "dropped", [])
    [(curve, common)] = pictures
    assert [tokens for tokens, _ in curve] == [0, 20, 40] and search.tokens == 40
    minibatch = search._shared
    values = search.fitness.measure([search.states(candidate) for candidate in ((3,), (0, 1), (2,))], minibatch)
    assert [value for _, value in curve] == [value for value, in values] and len({value for _, value in curve}) == 3
    assert common == sum(length for _, length in minibatch) > 0


def test_a_confirmed_parent_gives_way_to_what_is_better_on_the_common_text_and_to_nothing_else(opened):
    assert opened(4).confirm([(7.0, (0,))]) == [(7.0, (0,))]             # not asked for
    flags = ["--confirm_tokens", "192"]
    search = opened(4, *flags)
    minibatch = search._shared
    assert sum(length for _, length in minibatch) == 192
    known = dict(zip(BLOCKS, (value for value, in search.fitness.measure([*map(search.states, BLOCKS)], minibatch))))
    best, *others = sorted(BLOCKS, key=known.get)
    search.begin([(0.0, others[1]), (0.5, others[2])])
    for generation, found in zip(search.generations(), (others[2], others[0])):      # as if by luck
        survivors = search.confirm([(-1.0, found)])
        assert survivors == [(known[others[2 - generation]], others[2 - generation])]
        search.record(survivors)
    assert search.tokens == 3 * 192 and search.parents == [others[0]]
    again = opened(4, *flags)
    for _, found in zip(again.generations(), (others[0], best)):
        again.record(again.confirm([(-1.0, found)]))
    assert again.parents == [best] and again.tokens == 4 * 192           # the parent's own fitness was not forgotten
    assert [value for _, value in again.curve] == [known[others[1]], known[others[0]], known[best]]


@pytest.mark.parametrize("given, message", [
    (["--confirm_tokens", "1"], "--confirm_tokens 1: at least 2 are needed"),
    (["--confirm_tokens", "512"], "--confirm_tokens 512: more than the 256 --calibration_tokens"),
    (["--confirm_tokens", "64", "--strategy", "comma"], "which --strategy comma lets go; leave out one of them"),
    (["--confirm_tokens", "64", "--invert_fitness"], "keeps what has the least fitness; leave it out, or")])
def test_what_cannot_be_confirmed_is_refused(given, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        evo_drop.check_flags(evo_drop.parse_arguments(["--model_name_or_path", checkpoint, *LINE, *given]))


def test_a_start_of_which_nothing_is_finite_is_refused(opened):
    search = opened(1)
    with pytest.raises(RunError, match="--fitness_fn kl: not finite for any start; use --dtype bfloat16 or float32"):
        search.begin([(float("inf"), (0,)), (float("inf"), (1,))])
