"""What parents were measured at is looked up: the same fitness as measuring anew, for fewer tokens."""
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import families
from test_fitness import documents, drop, random_candidates
from utils.data import draw_minibatch
from utils.decoder import Decoder
from utils.fitness import Fitness
from utils.measurements import Measurements

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


def test_candidates_tie_that_differ_by_less_than_the_noise_between_documents():
    """Differences a token of 0.1 in every document are none of chance, of 0.1 on average between -0.4 and 0.6 are."""
    losses = {"best": [1.0, 2.0, 3.0, 1.5], "steady": [1.1, 2.1, 3.1, 1.6], "noisy": [0.6, 2.6, 3.6, 1.1]}
    minibatch = [(0, 9), (1, 17), (2, 9), (3, 17)]
    planted = SimpleNamespace(sums=lambda states, documents, kinds: torch.tensor(
        [[[losses[state][index] * (length - 1)] for state in states] for index, length in documents]))
    measurements = Measurements(planted, lambda candidate: candidate[0], "kl")
    measurements.measure([("best",), ("steady",), ("noisy",)], minibatch)
    assert not measurements.ties(("steady",), ("best",), minibatch)
    assert measurements.ties(("noisy",), ("best",), minibatch)
