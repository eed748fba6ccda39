"""What parents were measured at is looked up: the same fitness as measuring anew, for fewer tokens."""
import json
import math
import random

import numpy as np
import pytest
import torch

import evo_drop
import evo_quant
import evo_unstructured
import families
from test_fitness import documents, drop, random_candidates
from utils.data import draw_minibatch
from utils.fitness import Fitness
from utils.measurements import Measurements, confirmed
from utils.model import Decoder

TEXTS = documents([3, 20, 7, 16, 5, 2, 9, 12] * 4)


@pytest.fixture(scope="module")
def fitness():
    decoder = Decoder(families.build("llama"))
    return Fitness(decoder, TEXTS, drop(decoder), microbatch_tokens=64)


@pytest.fixture
def runs(monkeypatch) -> list:
    """Every (candidates, documents) that is run."""
    calls, sums = [], Fitness.sums

    def recording(self, candidates, minibatch, kinds):
        calls.append((list(candidates), list(minibatch)))
        return sums(self, candidates, minibatch, kinds)

    monkeypatch.setattr(Fitness, "sums", recording)
    return calls


def tokens(minibatch) -> int:
    return sum(length for _, length in minibatch)


@pytest.mark.parametrize("kind", ["kl", "ppl", "sparse_kl"])
def test_what_is_looked_up_and_what_is_run_add_up_to_the_same_fitness(kind, fitness):
    rng, candidates = random.Random(0), random_candidates(9)
    measurements, spent, asked = Measurements(fitness, tuple, kind), 0, 0
    for generation in range(8):
        parents, children = candidates[:2], rng.sample(candidates[2:], 3)
        minibatch = draw_minibatch(TEXTS, 101, rng)
        values, run = measurements.measure([*children, *parents], minibatch)
        plain = [value for value, in fitness.measure([*children, *parents], minibatch, (kind,))]
        assert values == pytest.approx(plain, rel=1e-6)
        measurements.keep(parents)
        spent, asked = spent + run, asked + 5 * 101
    assert spent < 0.85 * asked                      # parents have seen most of the documents by then


def test_only_documents_that_a_candidate_has_not_seen_are_run(fitness, runs):
    parent, child = random_candidates(2)
    measurements = Measurements(fitness, tuple, "kl")
    seen, new = [(0, 3), (1, 20), (2, 7)], [(3, 16), (1, 10)]       # a document cut shorter is another one
    assert measurements.measure([parent], seen)[1] == tokens(seen)
    assert measurements.measure([child, parent], seen[1:] + new)[1] == tokens(seen[1:]) + 2 * tokens(new)
    assert runs[1:] == [([child], seen[1:]), ([child, parent], new)]
    assert measurements.measure([parent, child], new)[1] == 0 and len(runs) == 3
    measurements.keep([parent])
    assert measurements.measure([parent, child], seen + new)[1] == tokens(seen + new)
    assert runs[3:] == [([child], seen + new)]


def test_restored_from_json_it_knows_the_same_to_the_bit(fitness, runs):
    states, parents, minibatch = random_candidates(3), [(0, True), (1, False), (2, True)], [(1, 20), (4, 5)]
    before, after = (Measurements(fitness, lambda candidate: states[candidate[0]], "ppl") for _ in range(2))
    values, _ = before.measure(parents, minibatch)
    before.keep(parents[:2])
    after.restore(json.loads(json.dumps(before.state)))
    runs.clear()
    assert after.measure(parents[:2], minibatch) == (values[:2], 0) and not runs
    assert after.measure(parents[2:], minibatch) == (values[2:], 25)


def test_what_is_not_finite_is_infinite_and_measured_again(fitness, monkeypatch):
    sums = Fitness.sums

    def breaking(self, candidates, minibatch, kinds):
        found = sums(self, candidates, minibatch, kinds)
        found[[i for i, document in enumerate(minibatch) if document == (1, 20)]] = math.nan
        return found

    measurements, minibatch = Measurements(fitness, tuple, "kl"), [(1, 20), (4, 5)]
    parents = random_candidates(2)
    with monkeypatch.context() as patch:
        patch.setattr(Fitness, "sums", breaking)
        assert measurements.measure(parents, minibatch)[0] == [math.inf] * 2
    measurements.keep(parents)
    json.loads(json.dumps(measurements.state, allow_nan=False))
    values, spent = measurements.measure(parents, minibatch)
    assert spent == 2 * 20 and values == pytest.approx([v for v, in fitness.measure(parents, minibatch)], rel=1e-6)


# ---- selection under noise -------------------------------------------------------------------------------------------


class Table:
    """Fitness from a table: candidate -> KL divergence a predicted token of each document of ten tokens."""

    def __init__(self, values: dict):
        self.values, self.spent = values, 0
        self.documents = [torch.zeros(10, dtype=torch.int64)] * len(next(iter(values.values())))

    def sums(self, states, minibatch, kinds):
        self.spent += len(states) * tokens(minibatch)
        return torch.tensor([[[self.values[state][index] * (length - 1)] for state in states]
                             for index, length in minibatch], dtype=torch.float64)


def search_of(**values) -> tuple[Table, Measurements]:
    """Values of candidates a, b, ..., of which all have seen the first documents, as after a last selection step."""
    table = Table({(name,): row for name, row in values.items()})
    measurements = Measurements(table, lambda candidate: candidate, "kl")
    measurements.measure(list(table.values), [(i, 10) for i in range(4)])
    table.spent = 0
    return table, measurements


def select(measurements, survivors: str, parents: str, limit: int, **options):
    """(names of the population after it, their fitness)."""
    found = confirmed([(math.nan, (name,)) for name in survivors], [(name,) for name in parents], measurements,
                      lambda minibatch, candidates: measurements.measure(candidates, minibatch), 40, limit,
                      random.Random(0), **options)
    return "".join(name for _, (name,) in found), [fitness for fitness, _ in found]


def test_difference_is_that_of_paired_documents_with_its_standard_error():
    rng = np.random.default_rng(0)
    hard, better = rng.exponential(1.0, 200), rng.normal(0.1, 0.2, 200)
    _, measurements = search_of(a=hard + 10 - better, b=hard + 10)
    measurements.measure([("a",), ("b",)], [(i, 10) for i in range(200)])
    measurements.measure([("a",)], [(5, 7)])                                  # b has not seen it cut short
    difference, error, seen = measurements.difference(("a",), ("b",))
    assert seen == 2000 and difference == pytest.approx(-better.mean(), rel=1e-9)
    assert error == pytest.approx(better.std(ddof=1) / 200**0.5, rel=1e-6)
    assert measurements.estimate(("b",)) == pytest.approx((hard + 10).mean(), rel=1e-9)


def test_difference_weighs_documents_by_their_predicted_tokens():
    _, measurements = search_of(a=[1.0, 2.0, 3.0, 4.0, 5.0], b=[0.0] * 5)
    measurements.keep([])
    measurements.measure([("a",), ("b",)], [(0, 10), (3, 4)])
    assert measurements.difference(("a",), ("b",))[0] == pytest.approx((9 * 1.0 + 3 * 4.0) / 12)


def test_further_documents_are_first_those_that_one_has_seen_and_never_those_of_both():
    _, measurements = search_of(a=[0.0] * 20, b=[0.0] * 20)
    measurements.measure([("b",)], [(7, 10), (9, 6), (11, 10)])
    rng, drawn = random.Random(0), set()
    for _ in range(50):
        minibatch = measurements.further(("a",), ("b",), 45, rng)
        assert set(minibatch[:3]) == {(7, 10), (9, 6), (11, 10)} and len(minibatch) == 5 == len(set(minibatch))
        drawn |= set(minibatch[3:])
    assert drawn == {(index, 10) for index in range(4, 20) if index not in (7, 9, 11)}
    assert tokens(measurements.further(("a",), ("b",), 10**6, rng)) == 13 * 10 + 26
    assert measurements.further(("a",), ("b",), 0, rng) == []


def test_clear_differences_are_believed_at_once_and_cost_nothing():
    table, measurements = search_of(a=[1.0, 2.0, 3.0, 4.0] * 5, b=[1.5, 2.4, 3.6, 4.5] * 5)
    assert select(measurements, "a", "b", 200) == ("a", [pytest.approx(2.5)])
    assert select(measurements, "b", "a", 200) == ("a", [pytest.approx(2.5)])
    assert select(measurements, "a", "a", 200) == ("a", [pytest.approx(2.5)])
    assert table.spent == 0


def test_luck_on_a_few_documents_does_not_displace_a_better_parent_nor_save_a_worse_one():
    noise = [0.9, -0.6, 0.8, -0.7] + [0.2, -0.2] * 8                           # mean 0.1 on the first four
    for shift, winner in ((0.05, "parent"), (-0.15, "child")):
        parent = [2.0] * 20
        lucky = [2.0 - sign * value + (shift if index >= 4 else 0) for sign in (1 if shift > 0 else -1,)
                 for index, value in enumerate(noise)]
        table, measurements = search_of(c=lucky, p=parent)
        begun = measurements.difference(("c",), ("p",))
        assert (begun[0] < 0) == (winner == "parent") and abs(begun[0]) < begun[1]
        measurements.measure([("p",)], [(i, 10) for i in range(4, 8)])
        table.spent = 0
        name, (fitness,) = select(measurements, "c", "p", 200)
        assert name == winner[0]
        assert table.spent <= 200 - 40 + 120                                  # the parent has seen four of these
        assert fitness == pytest.approx(measurements.estimate((name,)))


def test_a_tie_is_decided_by_the_mean_once_the_limit_or_the_text_is_at_its_end():
    for offset, winner in ((0.01, "p"), (-0.01, "c")):
        for limit, run in ((40, 0), (60, 2 * 20), (80, 2 * 40), (10**6, 2 * 40)):
            table, measurements = search_of(c=[3 + offset, 1 + offset] * 4, p=[2.0] * 8)
            if limit == 60:
                table.values["c",] = [3 + offset, 1 + offset] * 2 + [2 + offset] * 4
            assert select(measurements, "c", "p", limit)[0] == winner
            assert table.spent == run and measurements.difference(("c",), ("p",))[2] == 40 + run / 2


def test_text_is_added_bit_by_bit():
    table, measurements = search_of(c=[3.0, 1.0] * 2 + [1.0] * 16, p=[2.0] * 20)
    assert select(measurements, "c", "p", 10**6)[0] == "c" and table.spent == 2 * 40


def test_with_several_parents_each_is_displaced_only_by_one_that_is_better():
    table, measurements = search_of(a=[1.0] * 20, b=[2.0] * 20, c=[1.5] * 20, d=[3.0] * 20)
    assert select(measurements, "ac", "bd", 200)[0] == "ac"
    assert select(measurements, "ad", "bc", 200)[0] == "ab"
    assert select(measurements, "bd", "ac", 200)[0] == "ac"
    _, measurements = search_of(a=[1.0] * 20, b=[1.2] * 20, c=[2.5] * 20, d=[3.0] * 20)
    assert select(measurements, "bd", "ac", 200)[0] == "ab"
    assert select(measurements, "ab", "ab", 200)[0] == "ab" and table.spent == 0


def test_searching_for_the_worst_the_higher_is_confirmed():
    _, measurements = search_of(a=[1.0] * 20, b=[2.0] * 20)
    assert select(measurements, "b", "a", 200, sign=-1) == ("b", [-2.0])
    assert select(measurements, "a", "b", 200, sign=-1) == ("b", [-2.0])


def test_what_is_not_finite_displaces_nothing():
    _, measurements = search_of(a=[1.0] * 20, b=[2.0] * 4 + [math.nan] * 16, c=[0.5, 1.6, 0.4, 1.5] + [math.inf] * 16)
    assert select(measurements, "c", "a", 10**6)[0] == "a"
    assert select(measurements, "a", "b", 10**6)[0] == "a"
    _, measurements = search_of(a=[1.0] * 20, b=[0.5, 1.6, 0.4, 1.5] + [math.nan] * 16)
    assert select(measurements, "b", "a", 10**6)[0] == "a"


@pytest.mark.parametrize("module, own", [
    (evo_drop, ["--sparsity", "0.34"]), (evo_drop, ["--sparsity", "0.34", "--invert_fitness"]),
    (evo_unstructured, ["--sparse_weights_path", "sparse"]),
    (evo_quant, ["--quant_weights_path", "quant", "--target_bitwidth", "2.5"])])
def test_in_a_search_parents_are_displaced_by_what_is_clearly_better_or_better_on_all_text(
        checkpoint, databases, tmp_path, monkeypatch, module, own):
    outcomes, confirm, sign = [], module.confirmed, -1 if "--invert_fitness" in own else 1

    def recording(survivors, parents, measurements, *rest):
        found = confirm(survivors, parents, measurements, *rest)
        asked, after = survivors[0][1], found[0][1]
        if asked != parents[0]:
            difference, error, seen = measurements.difference(asked, parents[0])
            assert abs(difference) > error or seen == 512
            assert after == (asked if sign * difference < 0 else parents[0])
            outcomes.append((after == asked, seen))
        return found

    monkeypatch.setattr(module, "confirmed", recording)
    module.main(["--model_name_or_path", str(checkpoint), "--calibration_data", "stdlib", "--seed", "2", "--no_eval",
                 "--calibration_sequence_length", "16", "--calibration_tokens", "512", "--init", "measured",
                 "--initial_tokens", "64", "--offspring", "4", "--survivors_per_selection", "2", "1",
                 "--tokens_per_selection", "32", "64", "--confirm", "512", "--generations", "25",
                 *[str(databases.get(word, word)) for word in own], "--output_dir", str(tmp_path / "run")])
    assert {taken for taken, _ in outcomes} == {True, False}         # some are confirmed, and some are not
    assert max(seen for _, seen in outcomes) > 64
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len({record.get("dropped") or tuple(record["levels"]) for record in log}) <= 1 + sum(
        taken for taken, _ in outcomes)
