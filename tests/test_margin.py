"""--margin: the standard error of paired differences, and offspring that must be better by more than it."""
import itertools
import json
import math
import random
from pathlib import Path

import families
import numpy as np
import pytest

import evo_drop
import evo_quant
import evo_unstructured
from test_fitness import documents, drop, random_candidates
from utils.fitness import Fitness
from utils.margin import PARTS, rank_with_margin, split, standard_error
from utils.model import Decoder

SCRIPTS = [evo_drop, evo_unstructured, evo_quant]
SEARCH = ["--calibration_sequence_length", "32", "--calibration_tokens", "512", "--no_eval", "--initial_tokens", "64",
          "--initially_generated", "4", "--offspring", "6", "--survivors_per_selection", "3", "1",
          "--tokens_per_selection", "64", "256"]


@pytest.fixture(scope="module")
def search(checkpoint, databases, tmp_path_factory):
    """search(module, folder, *flags): run one of the three searches on a little text."""
    rows = tmp_path_factory.mktemp("text") / "rows.jsonl"
    words = Path(random.__file__).read_text().split()
    rows.write_text("".join(json.dumps({"text": " ".join(words[i:i + 25])}) + "\n" for i in range(0, 1000, 25)))
    own = {evo_drop: ["--sparsity", "0.5"], evo_unstructured: ["--sparse_weights_path", str(databases["sparse"])],
           evo_quant: ["--quant_weights_path", str(databases["quant"]), "--target_bitwidth", "2.5"]}

    def run(module, folder, *flags: str) -> dict:
        return module.main(["--model_name_or_path", str(checkpoint), "--calibration_data", str(rows), *SEARCH,
                            *own[module], "--output_dir", str(folder), *flags])

    return run


@pytest.fixture
def no_picture(monkeypatch):
    for module in SCRIPTS:
        monkeypatch.setattr(module, "plot_search", lambda *_: None)


class Landscape:
    """A Fitness whose candidate (name,) differs from the parent ("parent",) by `gains[name]` and by noise that depends
    on the document. It records (candidates, minibatch) of every call."""

    def __init__(self, gains: dict[str, float], seed: int = 0, documents: int = 64):
        self.gains, self.calls = gains, []
        noise = np.random.default_rng(seed)
        self.noise = {name: noise.normal(0, 1, documents) for name in gains}
        self.common = noise.normal(0, 100, documents)        # hard documents are hard for all: paired, it is no noise

    def loss(self, name: str, document: int) -> float:
        return 1000 - self.gains[name] + self.noise[name][document] * (name != "parent") + self.common[document]

    def measure(self, candidates, minibatch, kinds):
        self.calls.append((candidates, minibatch))
        predicted = [length - 1 for _, length in minibatch]
        means = [np.average([self.loss(name, i) for i, _ in minibatch], weights=predicted) for (name,) in candidates]
        return [(math.exp(mean / 1000) if kinds == ("ppl",) else float(mean),) for mean in means]


def error_of(landscape: Landscape, name: str, minibatch) -> tuple[float, float]:
    """Mean difference of a candidate to the parent and its standard error, written out with numpy."""
    parts = split(minibatch)
    shares = np.array([sum(length - 1 for _, length in part) for part in parts], dtype=float)
    values = [np.subtract(*(landscape.measure([(who,)], part, ("kl",))[0] for who in (name, "parent")))[0]
              for part in parts]
    shares, mean = shares / shares.sum(), np.average(values, weights=shares)
    return mean, np.linalg.norm(shares * (values - mean)) * np.sqrt(len(parts) / (len(parts) - 1))


# ---- the standard error ----------------------------------------------------------------------------------------------


def test_standard_error_of_equal_parts_is_the_textbooks_and_of_unequal_ones_the_weighted_means():
    rng = np.random.default_rng(0)
    values = rng.normal(size=16)
    assert standard_error([1 / 16] * 16, values.tolist()) == pytest.approx(values.std(ddof=1) / 4)
    shares = rng.uniform(1, 2, 16)
    shares /= shares.sum()
    expected = np.sqrt(16 / 15 * shares**2 @ (values - shares @ values)**2)
    assert standard_error(shares.tolist(), values.tolist()) == pytest.approx(expected)
    assert standard_error([1.0], [3.0]) == 0


def test_standard_error_is_how_far_means_scatter():
    rng = np.random.default_rng(1)
    shares = rng.uniform(1, 2, 16)
    shares /= shares.sum()
    draws = rng.normal(size=(2000, 16)) / np.sqrt(shares * 16)       # of longer parts the mean is steadier
    estimated = [standard_error(shares.tolist(), draw.tolist()) for draw in draws]
    assert np.sqrt(np.mean(np.square(estimated))) == pytest.approx((draws @ shares).std(), rel=0.05)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 200])
def test_parts_are_whole_documents_of_about_equal_tokens(count):
    rng = random.Random(count)
    minibatch = [(i, rng.randint(2, 40)) for i in range(count)]
    parts = split(minibatch)
    assert len(parts) == min(count, PARTS) and all(parts)
    assert sorted(document for part in parts for document in part) == minibatch
    sizes = [sum(length for _, length in part) for part in parts]
    assert max(sizes) - min(sizes) <= 40


@pytest.mark.parametrize("kind", ["kl", "ppl", "sparse_kl"])
def test_fitness_of_parts_combined_is_that_of_the_whole_minibatch(kind):
    decoder = Decoder(families.build("llama"))
    texts = documents([3, 20, 7, 16, 5, 2, 9, 12] * 3)
    fitness = Fitness(decoder, texts, drop(decoder), microbatch_tokens=64)
    minibatch = [(i, len(text)) for i, text in enumerate(texts)]
    candidates = random_candidates(4)
    for sign in (1, -1):
        ranked = rank_with_margin(fitness, candidates, minibatch, kind, [3], 1.0, sign)
        whole = [sign * value for value, in fitness.measure(candidates, minibatch, (kind,))]
        assert sorted(i for _, i in ranked) == [0, 1, 2, 3]
        assert [value for value, _ in ranked] == pytest.approx([whole[i] for _, i in ranked], rel=1e-5)


# ---- selection -------------------------------------------------------------------------------------------------------


MINIBATCH = [(i, 9 + i % 3) for i in range(64)]


def measuring(landscape, kind="kl", sign=1):
    """`measure` of the scripts, on a landscape."""
    def measure(candidates, num_tokens, parents=(), margin=0.0):
        if margin:
            return [(value, candidates[i]) for value, i in rank_with_margin(
                landscape, candidates, MINIBATCH, kind, [candidates.index(c) for c in parents], margin, sign)]
        values = landscape.measure(candidates, MINIBATCH, (kind,))
        return sorted(((sign * value, c) for (value,), c in zip(values, candidates)), key=lambda pair: pair[0])
    return measure


@pytest.mark.parametrize("module", SCRIPTS)
@pytest.mark.parametrize("kind, sign", [("kl", 1), ("kl", -1), ("ppl", 1), ("ppl", -1)])
def test_a_child_displaces_the_parent_by_more_than_one_standard_error_and_not_by_less(module, kind, sign):
    child, parent = ("child",), ("parent",)
    landscape = Landscape({"child": 0.0, "parent": 0.0})
    mean, error = error_of(landscape, "child", MINIBATCH)
    for errors_better in (0.9, 1.1, -0.5):
        landscape.gains["child"] = mean + sign * errors_better * error       # inverted: the worse is the better
        measure = measuring(landscape, kind, sign)
        for margin, wins in ((0.0, errors_better > 0), (1.0, errors_better > 1)):
            [(value, winner)] = module.select([child], [parent], [(1, 64), (1, 64)], measure, "plus", margin)
            assert winner == (child if wins else parent)
            [[plain]] = landscape.measure([winner], MINIBATCH, (kind,))
            assert value == pytest.approx(sign * plain)                      # as measured, without the handicap


def test_lucky_children_displace_the_parent_in_half_of_all_draws_and_with_a_margin_in_a_sixth():
    displaced = {0.0: 0, 1.0: 0}
    for margin, seed in itertools.product(displaced, range(200)):
        landscape = Landscape({"child": 0.0, "parent": 0.0}, seed)
        [(_, winner)] = evo_quant.select([("child",)], [("parent",)], [(1, 64)], measuring(landscape), "plus", margin)
        displaced[margin] += winner == ("child",)
    assert 80 < displaced[0.0] < 120 and 20 < displaced[1.0] < 48


def test_parents_have_no_handicap_and_children_are_compared_with_the_best_of_them():
    gains = {"parent": 0.0, "worse": -50.0, "close": 0.0, "better": 50.0}
    landscape = Landscape(gains)
    mean, error = error_of(landscape, "close", MINIBATCH)
    gains["close"] = mean + 0.5 * error
    survivors = evo_drop.select([("close",), ("better",)], [("worse",), ("parent",)], [(2, 64), (4, 64)],
                                measuring(landscape), "plus", 1.0)
    assert [name for _, (name,) in survivors] == ["better", "parent", "close", "worse"]
    gains["worse"] = 0.01                                    # now both are in the lead, and neither pays for the other
    survivors = evo_drop.select([("close",)], [("worse",), ("parent",)], [(1, 64), (3, 64)], measuring(landscape),
                                "plus", 5.0)
    assert survivors[2][1] == ("close",)


def test_where_no_parent_competes_or_there_is_no_margin_everything_is_measured_at_once():
    for strategy, margin, calls in (("plus", 0.0, 1), ("comma", 1.0, 1), ("plus", 1.0, PARTS)):
        landscape = Landscape({"child": 0.0, "parent": 0.0})
        evo_drop.select([("child",)], [("parent",)], [(1, 64), (1, 64)], measuring(landscape), strategy, margin)
        assert len(landscape.calls) == 1 + calls             # after the first step's


def test_a_single_document_has_no_margin():
    landscape = Landscape({"child": 10.0, "parent": 0.0})
    assert rank_with_margin(landscape, [("child",), ("parent",)], [(3, 20)], "kl", [1], 1e9)[0][1] == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_not_finite_on_any_part_never_survives(sign):
    gains = {"child": 0.0, "broken": 30.0 * sign, "parent": -20.0 * sign}
    landscape = Landscape(gains)
    measure = landscape.measure

    def breaking(broken):
        return lambda candidates, minibatch, kinds: [
            (math.inf,) if name == broken and (7, 10) in minibatch else value
            for (name,), value in zip(candidates, measure(candidates, minibatch, kinds))]

    for broken, expected in (("broken", ["child", "parent"]), ("parent", ["broken", "child"])):
        landscape.measure = breaking(broken)
        survivors = evo_drop.select([("child",), ("broken",)], [("parent",)], [(3, 64)],
                                    measuring(landscape, sign=sign), "plus", 1.0)
        assert [name for _, (name,) in survivors] == expected


# ---- whole searches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", SCRIPTS)
def test_margin_searches_resume_to_the_same_bytes_and_spend_the_same_tokens(module, search, tmp_path, monkeypatch,
                                                                           no_picture):
    flags = ["--generations", "2", "--margin", "1", "--screen", "2"]
    whole = search(module, tmp_path / "whole", *flags)
    measure, last_steps = Fitness.measure, []

    def dying(self, candidates, minibatch, kinds):
        if len(candidates) == 3 + 1:
            last_steps.append(len(minibatch))
            if len(last_steps) == 12:                        # parts: in the second generation
                raise KeyboardInterrupt
        return measure(self, candidates, minibatch, kinds)

    monkeypatch.setattr(Fitness, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        search(module, tmp_path / "killed", *flags)
    assert (tmp_path / "killed" / "log.jsonl").read_bytes().count(b"\n") == 2
    monkeypatch.setattr(Fitness, "measure", measure)
    resumed = search(module, tmp_path / "killed", *flags)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1] and logs[0].count(b"\n") == 3
    assert resumed["tokens"] == whole["tokens"]
    records = [json.loads(line) for line in logs[0].splitlines()]
    assert [b["tokens"] - a["tokens"] for a, b in zip(records, records[1:])] == [6 * 64 + (3 + 1) * 256] * 2


@pytest.mark.parametrize("flags", [["--invert_fitness"], ["--fitness_fn", "ppl"],
                                   ["--survivors_per_selection", "3", "2", "--invert_fitness", "--fitness_fn", "ppl"]])
def test_a_parent_that_no_child_can_displace_stays(flags, search, tmp_path, no_picture):
    search(evo_drop, tmp_path, "--generations", "2", *flags, "--margin", "1e6")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    if "--survivors_per_selection" not in flags:
        assert len({record["dropped"] for record in records}) == 1
    assert all((record["fitness"] < 0) == ("--invert_fitness" in flags) and abs(record["fitness"]) < 1e5
               for record in records)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
@pytest.mark.parametrize("module", SCRIPTS)
def test_a_margin_that_is_no_number_of_standard_errors_is_refused(module, value, search, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: --margin {value}(.0)?: a finite number of standard errors, 0 or"):
        search(module, tmp_path / "run", "--margin", value)
