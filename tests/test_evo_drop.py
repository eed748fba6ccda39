"""The depth search from command line to saved configuration: budgets, selection, repeatability, resuming, bad input."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evo_drop
import families
from utils.configs import DROP_WORDS, read_drop_config, write_drop_config
from utils.data import calibration_documents, evaluation_documents
from utils.files import read_sealed, seal
from utils.fitness import Fitness
from utils.measurements import Measurements
from utils.model import load_decoder
from utils.report import plot_search
from utils.runs import Run

NUM_BLOCKS = 6                                                         # of the checkpoint in conftest.py
BASE = {"calibration_tokens": 256, "calibration_sequence_length": 32, "sparsity": 0.34, "initially_generated": 8,
        "initial_tokens": 64, "generations": 4, "offspring": 6, "survivors_per_selection": [2, 1],
        "tokens_per_selection": [64, 128], "no_eval": True, "device": "cpu"}
EVALUATED = {"no_eval": False, "eval_tokens": 200, "eval_sequence_length": 32, "eval_every": 2}
WHOLE_SET = {"tokens_per_selection": [256, 256], "initial_tokens": 256}
TWO_PARENTS = {"survivors_per_selection": [4, 2], "offspring": 8}


@pytest.fixture
def command(checkpoint, text, tmp_path, monkeypatch):
    """command(folder="a", seed=1, sparsity=None): the command line of a small search; None leaves a flag out."""
    def build(folder: str = "run", **changes) -> list[str]:
        flags = {"model_name_or_path": checkpoint, "calibration_data": text, "eval_datasets": [text],
                 "output_dir": tmp_path / folder, **BASE, **changes}
        line = []
        for flag, value in flags.items():
            if value is not None and value is not False:
                values = value if isinstance(value, list) else [] if value is True else [value]
                line += [f"--{flag}", *map(str, values)]
        return line

    monkeypatch.setattr(os, "fsync", lambda _: None)                   # nobody pulls the plug
    return build


@pytest.fixture
def measured(monkeypatch) -> list:
    """Every selection of the search: (candidates as states of the blocks, minibatch, fitness of each)."""
    calls = []
    measure = Measurements.measure

    def recording(self, candidates, minibatch):
        values, spent = measure(self, candidates, minibatch)
        calls.append(([self._states(candidate) for candidate in candidates], minibatch, values))
        return values, spent

    monkeypatch.setattr(Measurements, "measure", recording)
    return calls


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("layer_drop_config.txt", "log.jsonl")}


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def generations(measured: list, steps: int = 2) -> list[list]:
    """The selections of each generation, after the one of the random starts."""
    return [measured[i:i + steps] for i in range(1, len(measured), steps)]


def best(selection, count: int = 1) -> list:
    candidates, _, values = selection
    return [candidate for _, candidate in sorted(zip(values, candidates), key=lambda pair: pair[0])[:count]]


def switches(a, b) -> int:
    """Number of level switches between two candidates of the same budget: half the sub-blocks in which they differ."""
    return sum(x != y for states in zip(a, b) for x, y in zip(*states)) // 2


def counts(candidate) -> tuple[int, int]:
    return sum(attn for attn, _ in candidate), sum(mlp for _, mlp in candidate)


# ---- the result ------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_files_to_the_byte_and_another_seed_does_not(command, tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        evo_drop.main(command(folder, seed=seed, **EVALUATED))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["log.jsonl"] != files(tmp_path / "c")["log.jsonl"]


@pytest.mark.parametrize("fitness_fn", ["kl", "ppl"])
def test_winner_is_saved_not_the_last_candidate_evaluated(fitness_fn, command, measured, tmp_path):
    last_was_another = 0
    for seed in range(4):
        measured.clear()
        summary = evo_drop.main(command(f"run{seed}", seed=seed, fitness_fn=fitness_fn))
        winner, = best(measured[-1])
        assert tuple(read_drop_config(tmp_path / f"run{seed}" / "layer_drop_config.txt", NUM_BLOCKS)) == winner
        assert summary["fitness"] == min(measured[-1][2])
        assert summary["dropped"].split() == [word for state in winner for word, s in DROP_WORDS.items() if s == state]
        last_was_another += measured[-1][0][-1] != winner
    assert last_was_another


def test_winner_is_what_is_evaluated_in_numbers_the_plain_way_confirms(command, measured, tmp_path, text, checkpoint,
                                                                     tokenizer):
    summary = evo_drop.main(command(seed=1, **EVALUATED))
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    documents = evaluation_documents(text, tokenizer, 200, 32)
    teacher = families.plain_logits(model, documents)
    start, winner = best(measured[0])[0], best(measured[-1])[0]
    assert start != winner
    candidates = {"dense": [(False, False)] * NUM_BLOCKS, "best random start": start, "search": winner}
    assert list(summary["evaluation"]) == list(candidates)
    for who, candidate in candidates.items():
        dropped = families.plain_logits(families.dropped_copy(model, candidate), documents)
        expected = families.plain_values(teacher, dropped, documents)
        assert summary["evaluation"][who][text]["ppl"] == pytest.approx(expected["ppl"], rel=1e-5)
        assert summary["evaluation"][who][text]["kl"] == pytest.approx(expected["kl"], rel=1e-4, abs=1e-6)
    records = log(tmp_path / "run")
    assert [record["generation"] for record in records if "evaluation" in record] == [2, 4]
    assert records[-1]["evaluation"] == summary["evaluation"]["search"]


def test_saved_model_is_the_winner_in_plain_transformers(command, tmp_path, checkpoint, tokenizer):
    evo_drop.main(command(save_dir=tmp_path / "model", drop_config_dir=tmp_path / "config"))
    winner = read_drop_config(tmp_path / "config" / "layer_drop_config.txt", NUM_BLOCKS)
    assert winner == read_drop_config(tmp_path / "run" / "layer_drop_config.txt")
    saved, loaded = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "model", checkpoint))
    tokens = tokenizer("def main(argv: list[str] | None = None) -> dict:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = families.dropped_copy(loaded, winner)(input_ids=tokens).logits
        assert torch.allclose(saved(input_ids=tokens).logits, expected, atol=1e-5)
        assert not torch.allclose(loaded(input_ids=tokens).logits, expected, atol=0.1)


def test_saved_model_is_whole_or_not_there_and_keeps_generation_settings_that_transformers_would_not_save(
        command, tmp_path, checkpoint, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    line = command(model_name_or_path=tmp_path / "model", save_dir=tmp_path / "saved")
    with monkeypatch.context() as patch:
        kill_at(patch, os, "replace", BASE["generations"] + 4)          # checkpoints, the configuration, one file moved
        with pytest.raises(Killed):
            evo_drop.main(line)
    assert not (tmp_path / "saved" / "config.json").exists()
    evo_drop.main(line)
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["temperature"] == 0.6
    assert not [path for path in (tmp_path / "saved").iterdir() if path.name.startswith(".")]
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_nothing_is_saved_over_the_model_or_what_is_not_from_here(command, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    for folder, message in (("model", "is the model that is searched"), ("other", "is not empty, and not from evo_")):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "config.json").write_text("{}")
        with pytest.raises(SystemExit, match=f"--save_dir .*{message}.*; name another folder"):
            evo_drop.main(command(model_name_or_path=tmp_path / "model", save_dir=tmp_path / folder))
    with pytest.raises(SystemExit, match="--save_dir .*: is the --output_dir, .*; name another folder"):
        evo_drop.main(command(save_dir=tmp_path / "run"))
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert not (tmp_path / "run").exists()


def test_saved_elsewhere_is_what_was_found_whatever_was_there_before(command, tmp_path):
    """The configuration of another search; a saved model of which only a part was written; shards of a larger one."""
    evo_drop.main(command())
    name = "layer_drop_config.txt"
    own = {"save_dir": tmp_path / "model", "drop_config_dir": tmp_path / "config"}
    for folder in own.values():
        folder.mkdir()
        (folder / name).write_text("none\n" * NUM_BLOCKS)
        (folder / "model-00001-of-00002.safetensors").touch()
    evo_drop.main(command(**own))
    for folder in own.values():
        assert (folder / name).read_bytes() == files(tmp_path / "run")[name]
    assert [file.name for file in (tmp_path / "model").glob("*.safetensors*")] == ["model.safetensors"]


def test_finished_run_of_another_model_or_of_what_may_be_dropped_is_refused(command, tmp_path, checkpoint, tokenizer):
    shutil.copytree(checkpoint, tmp_path / "model")
    legal = tmp_path / "legal.txt"
    legal.write_text("attn+mlp\n" * NUM_BLOCKS)
    line = command(model_name_or_path=tmp_path / "model", legal_to_drop_path=legal)
    evo_drop.main(line)
    legal.write_text("none\n" + "attn+mlp\n" * (NUM_BLOCKS - 1))
    for generations in (BASE["generations"], BASE["generations"] + 1):          # finished, and to be extended
        with pytest.raises(SystemExit, match="--legal_to_drop_path: not what it was when the run in .* was begun"):
            evo_drop.main(command(model_name_or_path=tmp_path / "model", legal_to_drop_path=legal,
                                  generations=generations))
    legal.write_text("attn+mlp\n" * NUM_BLOCKS)
    evo_drop.main(line)
    families.save_llama(tmp_path / "model", tokenizer, seed=1, num_hidden_layers=NUM_BLOCKS)
    with pytest.raises(SystemExit, match="--model_name_or_path: not what it was when the run in .* was begun"):
        evo_drop.main(line)


def test_inverted_fitness_finds_a_worse_model(command, measured, tmp_path):
    worst_and_best = []
    for inverted in (True, False):
        measured.clear()
        evo_drop.main(command(f"{inverted}", invert_fitness=inverted, **WHOLE_SET))
        last, _, values = measured[-1]
        value = max(values) if inverted else min(values)
        assert tuple(read_drop_config(tmp_path / f"{inverted}" / "layer_drop_config.txt")) == last[values.index(value)]
        start = max(measured[0][2]) if inverted else min(measured[0][2])
        assert value > start if inverted else value < start          # it searched, in the right direction
        worst_and_best.append(value)
    assert worst_and_best[0] > 1.5 * worst_and_best[1]


@pytest.mark.parametrize("inverted", [False, True])
def test_candidate_that_is_not_finite_never_survives(inverted, command, tmp_path, monkeypatch):
    sums = Fitness.sums
    broken = []

    def breaking(self, candidates, minibatch, kinds):
        found = sums(self, candidates, minibatch, kinds)
        for i, candidate in enumerate(candidates):
            if candidate[0][0]:
                broken.append(candidate)
                found[-1, i] = math.nan                               # on one document
        return found

    monkeypatch.setattr(Fitness, "sums", breaking)
    evo_drop.main(command(invert_fitness=inverted))
    assert broken
    assert all(record["dropped"].split()[0] in ("none", "mlp") for record in log(tmp_path / "run")[1:])


def test_evaluation_prints_how_much_there_is(command, text, tokenizer, capsys):
    evo_drop.main(command(**EVALUATED | {"eval_tokens": 10**6}, generations=0))
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith(f"evaluation on {text}: "))
    documents = evaluation_documents(text, tokenizer, 10**6, 32)
    assert line == (f"evaluation on {text}: {sum(map(len, documents)):,} tokens (of at most 1,000,000) in "
                    f"{len(documents)} documents")
    assert all(who in printed for who in ("| dense", "| best random start", "| search"))


# ---- every candidate ever evaluated ----------------------------------------------------------------------------------


def check_every_candidate(measured, holds):
    candidates = [candidate for selection, _, _ in measured for candidate in selection]
    assert len(set(candidates)) > 8, "a search through nearly nothing shows nothing"
    assert all(map(holds, candidates))


@pytest.mark.parametrize("budget, expected", [
    ({"sparsity": 0.34}, (2, 2)), ({"sparsity": 0.49}, (2, 2)), ({"sparsity": 0.5}, (3, 3)),
    ({"sparsity": 0.99}, (5, 5)),
    ({"sparsity": None, "drop_attn": 3, "drop_mlp": 1}, (3, 1)), ({"sparsity": None, "drop_attn": 3}, (3, 0)),
    ({"sparsity": None, "drop_attn": 6, "drop_mlp": 2}, (6, 2)),
    ({"sparsity": None, "drop_attn": 0, "drop_mlp": 3}, (0, 3)),
])
def test_numbers_of_dropped_attentions_and_mlps_hold(budget, expected, command, measured):
    evo_drop.main(command(**budget))
    check_every_candidate(measured, lambda candidate: counts(candidate) == expected)


@pytest.mark.parametrize("options, expected", [
    ({"drop_entire_block": True, "sparsity": 0.5}, (3, 3)),
    ({"drop_two_consecutive": True, "sparsity": 0.34}, (2, 2)),
    ({"drop_two_consecutive": True, "sparsity": 0.66}, (2, 2)),
    ({"drop_two_consecutive": True, "sparsity": None, "drop_attn": 2, "drop_mlp": 4}, (2, 4)),
])
def test_sub_blocks_that_belong_together_are_dropped_together(options, expected, command, measured):
    evo_drop.main(command(**options, offspring=4, generations=8))

    def holds(candidate):
        whole = "drop_entire_block" not in options or all(attn == mlp for attn, mlp in candidate)
        pairs = "drop_two_consecutive" not in options or candidate[::2] == candidate[1::2]
        return whole and pairs and counts(candidate) == expected

    check_every_candidate(measured, holds)


def test_pairs_of_entire_blocks_are_dropped_together(command, measured):
    evo_drop.main(command(drop_entire_block=True, drop_two_consecutive=True))
    found = {candidate for selection, _, _ in measured for candidate in selection}
    both, none = (True, True), (False, False)
    assert found == {(both, both, none, none, none, none), (none, none, both, both, none, none),
                     (none, none, none, none, both, both)}


def test_only_what_is_legal_is_dropped(command, measured, tmp_path):
    legal = [(True, False), (True, True), (False, True), (True, True), (True, True), (False, True)]
    write_drop_config(tmp_path / "legal.txt", legal)
    evo_drop.main(command(legal_to_drop_path=tmp_path / "legal.txt", **TWO_PARENTS))
    check_every_candidate(measured, lambda candidate: counts(candidate) == (2, 2) and all(
        may >= drop for states in zip(legal, candidate) for may, drop in zip(*states)))


@pytest.mark.parametrize("max_mutations", [1, 2, 3])
def test_offspring_differ_from_a_parent_by_no_more_than_max_mutations(max_mutations, command, measured):
    evo_drop.main(command(max_mutations=max_mutations, sparsity=0.5, generations=8, **TWO_PARENTS))
    parents, seen = best(measured[0], 2), Counter()
    for first, last in generations(measured):
        for child in first[0]:
            distance = min(switches(child, parent) for parent in parents)
            assert 1 <= distance <= max_mutations
            seen[distance] += 1
        parents = best(last, 2)
    assert max_mutations == 1 or len(seen) > 1


@pytest.mark.parametrize("options", [{}, {"drop_entire_block": True}, {"drop_two_consecutive": True}])
@pytest.mark.parametrize("fraction", [0.2, 0.45])
def test_dropped_parameters_meet_their_budget_within_the_smallest(fraction, options, command, measured, checkpoint):
    evo_drop.main(command(sparsity=None, drop_params=fraction, generations=6, **options))
    blocks = families.blocks_of(AutoModelForCausalLM.from_pretrained(checkpoint))
    attn, mlp = (sum(p.numel() for p in getattr(blocks[0], name).parameters()) for name in ("self_attn", "mlp"))
    assert attn != mlp
    unit = attn + mlp if "drop_entire_block" in options else min(attn, mlp)
    unit *= 2 if "drop_two_consecutive" in options else 1
    total = NUM_BLOCKS * (attn + mlp)
    seen = set()
    for candidate in {candidate for selection, _, _ in measured for candidate in selection}:
        dropped = counts(candidate)[0] * attn + counts(candidate)[1] * mlp
        assert fraction * total <= dropped < fraction * total + unit
        assert "drop_entire_block" not in options or all(a == m for a, m in candidate)
        assert "drop_two_consecutive" not in options or candidate[::2] == candidate[1::2]
        seen.add(counts(candidate))
    assert len(seen) > 1 or options                                     # attentions and MLPs mix freely


def test_candidates_of_a_generation_are_distinct_and_new(command, measured):
    evo_drop.main(command(sparsity=0.17, **TWO_PARENTS))                 # 36 candidates: many draws are duplicates
    parents = best(measured[0], 2)
    for first, last in generations(measured):
        assert len(set(first[0])) == len(first[0]) == 8
        assert not set(first[0]) & set(parents)
        parents = best(last, 2)


def test_number_of_switches_is_the_smaller_of_two_uniform_ones(monkeypatch):
    made, rng = [], random.Random(0)
    monkeypatch.setattr(evo_drop, "switch", lambda space, candidate, rng: made.append(1) or candidate)
    seen = Counter()
    for _ in range(9000):
        made.clear()
        evo_drop.mutate(None, [(True, False)], 3, rng)
        seen[len(made)] += 1
    assert {switches: round(9 * count / 9000, 1) for switches, count in seen.items()} == pytest.approx(
        {1: 5, 2: 3, 3: 1}, abs=0.2)
    for fixed in (1, 7):
        made.clear()
        evo_drop.mutate(None, [(True, False)], 3, rng, fixed_mutations=fixed)
        assert len(made) == fixed


def test_every_switch_of_either_type_is_equally_likely():
    arguments = evo_drop.parse_arguments(["--model_name_or_path", "any", "--drop_attn", "2", "--drop_mlp", "1"])
    space, rng = evo_drop.build_space(arguments, [(10, 20)] * 4), random.Random(0)
    parent = evo_drop.random_candidate(space, rng)
    children = Counter(evo_drop.switch(space, parent, rng) for _ in range(7000))
    attentions = {child: count for child, count in children.items() if child[4:] == parent[4:]}
    mlps = {child: count for child, count in children.items() if child[:4] == parent[:4]}
    assert len(attentions) == 2 * 2 and len(mlps) == 1 * 3 and len(children) == 7
    assert all(count == pytest.approx(3500 / 4, rel=0.15) for count in attentions.values())
    assert all(count == pytest.approx(3500 / 3, rel=0.15) for count in mlps.values())


def test_every_random_start_is_equally_likely():
    arguments = evo_drop.parse_arguments(["--model_name_or_path", "any", "--drop_attn", "2", "--drop_mlp", "1"])
    space, rng = evo_drop.build_space(arguments, [(10, 20)] * 4), random.Random(0)
    starts = Counter(evo_drop.random_candidate(space, rng) for _ in range(6000))
    assert len(starts) == 6 * 4 and all(count == pytest.approx(250, rel=0.3) for count in starts.values())


# ---- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("survivors, tokens, candidates", [
    ([2, 1], [64, 128], [6, 2 + 1]), ([1, 1], [64, 128], [6, 1 + 1]), ([3, 1, 1], [64, 96, 128], [6, 3, 1 + 1]),
    ([4, 2], [64, 128], [6, 4 + 2]), ([1], [128], [6 + 1])])
def test_parents_join_the_last_step_only_and_their_tokens_count(survivors, tokens, candidates, command, measured,
                                                                tmp_path):
    evo_drop.main(command(survivors_per_selection=survivors, tokens_per_selection=tokens))
    assert [len(measured[0][0]), sum(length for _, length in measured[0][1])] == [8, 64]
    parents = best(measured[0], survivors[-1])
    for steps in generations(measured, len(survivors)):
        kept = []
        for step, (selection, minibatch, _) in enumerate(steps):
            last = step == len(survivors) - 1
            assert len(selection) == candidates[step]
            assert sum(length for _, length in minibatch) == tokens[step]
            assert set(selection) & set(parents) == (set(parents) if last else set())
            if step:
                assert set(selection) - set(parents) == set(kept)                  # the best of the step before
            kept = best(steps[step], survivors[step])
        parents = kept
    start, *records = log(tmp_path / "run")
    assert start["tokens"] == 8 * 64
    most = sum(count * size for count, size in zip(candidates, tokens))
    assert all(b["tokens"] - a["tokens"] <= most for a, b in zip([start, *records], records))
    assert records[-1]["tokens"] < start["tokens"] + len(records) * most       # what parents have seen is not run again


def test_with_comma_only_offspring_survive(command, measured, tmp_path):
    evo_drop.main(command(strategy="comma", **TWO_PARENTS))
    parents = best(measured[0], 2)
    for first, last in generations(measured):
        assert [len(first[0]), len(last[0])] == [8, 4] and not set(first[0] + last[0]) & set(parents)
        parents = best(last, 2)
    dropped = [tuple(DROP_WORDS[word] for word in record["dropped"].split()) for record in log(tmp_path / "run")[1:]]
    assert dropped[-1] == parents[0]


def test_all_candidates_of_a_step_see_the_same_minibatch_and_steps_see_different_ones(command, measured):
    evo_drop.main(command(tokens_per_selection=[64, 64]))
    minibatches = [tuple(minibatch) for _, minibatch, _ in measured]
    assert len(minibatches) == 1 + 2 * BASE["generations"]
    assert len(set(minibatches)) >= len(minibatches) - 1               # two may agree by chance


def test_fitness_never_worsens_when_every_step_sees_the_whole_set(command, tmp_path):
    evo_drop.main(command(generations=10, **WHOLE_SET))
    fitness = [record["fitness"] for record in log(tmp_path / "run")]
    assert fitness[-1] < fitness[0]
    assert all(after <= before + 1e-7 for before, after in zip(fitness, fitness[1:]))


@pytest.mark.parametrize("sparsity, blocks_dropped", [(0.34, 2), (0.5, 3)])
def test_default_number_of_generations_is_the_papers(sparsity, blocks_dropped, command):
    summary = evo_drop.main(command(generations=None, sparsity=sparsity, offspring=2, survivors_per_selection=[1, 1]))
    assert summary["generations"] == math.ceil(blocks_dropped * (NUM_BLOCKS - blocks_dropped) / 1.5)


# ---- killed, resumed, extended ---------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_at(monkeypatch, owner, name: str, call: int) -> None:
    """Die instead of the `call`-th call of owner.name."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def dying(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("options, owner, name, call", [
    *[({}, *place) for place in [
        (Measurements, "measure", 1), (Measurements, "measure", 5), (Run, "log", 1), (Run, "log", 3),
        (Run, "checkpoint", 1), (Run, "checkpoint", 5), (evo_drop, "write_drop_config", 1), (Run, "summarize", 1)]],
    *[({"sparsity": None, "drop_params": 0.3, "generations": None, **TWO_PARENTS}, *place) for place in [
        (Measurements, "measure", 4), (Run, "checkpoint", 3)]],
    *[({"init": "measured"}, *place) for place in [(Measurements, "measure", 3), (Run, "checkpoint", 4)]]])
def test_killed_anywhere_and_resumed_gives_the_same_files(options, owner, name, call, command, tmp_path, monkeypatch):
    evo_drop.main(command("whole", **options))
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            evo_drop.main(command("killed", **options))
    assert not (tmp_path / "killed" / "summary.json").exists()
    evo_drop.main(command("killed", **options))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_default_number_of_generations_survives_a_kill_when_fewer_sub_blocks_are_dropped_by_then(command, tmp_path,
                                                                                               monkeypatch):
    options = {"sparsity": None, "drop_params": 0.15, "generations": None, "initially_generated": 1, "seed": 4}
    whole = evo_drop.main(command("whole", **options))
    with monkeypatch.context() as patch:
        kill_at(patch, Run, "checkpoint", 4)
        with pytest.raises(Killed):
            evo_drop.main(command("killed", **options))
    state = json.loads((tmp_path / "killed" / "checkpoint.json").read_text())["state"]
    assert [sum(candidates[0]) for candidates in (state["start"], state["population"])] == [3, 2]
    assert evo_drop.main(command("killed", **options))["generations"] == whole["generations"] == 6
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_resuming_goes_on_from_the_checkpoint_and_does_not_start_over(command, measured, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, Run, "checkpoint", 4)                           # of generation 3
        with pytest.raises(Killed):
            evo_drop.main(command())
    measured.clear()
    evo_drop.main(command())
    assert len(measured) == 2 * 2                                      # generations 3 and 4


def test_process_killed_and_started_again_gives_the_same_files(command, tmp_path, monkeypatch, capsys):
    """The real thing: the script gets SIGKILL in the middle of a generation; then the same command once more."""
    monkeypatch.setattr("utils.search.plot_search", plot_search)
    killed, whole = (command(folder, generations=40, seed=5) for folder in ("killed", "whole"))
    script = subprocess.Popen([sys.executable, evo_drop.__file__, *killed], env=dict(os.environ, OMP_NUM_THREADS="1"),
                              cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path = tmp_path / "killed" / "log.jsonl"
    while script.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 5):
        time.sleep(0.005)
    script.kill()
    printed, _ = script.communicate()
    assert script.returncode == -signal.SIGKILL, printed.decode()                # it did not end by itself
    assert not (tmp_path / "killed" / "layer_drop_config.txt").exists()
    evo_drop.main(killed)
    assert "resumed after generation" in capsys.readouterr().out
    evo_drop.main(whole)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert (tmp_path / "killed" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_extended_run_equals_a_longer_one(command, tmp_path):
    evo_drop.main(command("extended", generations=2))
    short = files(tmp_path / "extended")
    evo_drop.main(command("extended", generations=6))
    evo_drop.main(command("longer", generations=6))
    assert files(tmp_path / "extended") == files(tmp_path / "longer") != short
    assert json.loads((tmp_path / "extended" / "summary.json").read_text())["generations"] == 6


@pytest.mark.parametrize("budget", [{}, {"sparsity": None, "drop_params": 0.15}])
def test_run_goes_on_to_the_default_number_of_generations_when_given_none(budget, command, tmp_path, monkeypatch):
    evo_drop.main(command("extended", generations=2, **budget))
    summary = evo_drop.main(command("extended", generations=None, **budget))
    whole = evo_drop.main(command("whole", generations=None, **budget))
    assert summary["generations"] == whole["generations"] > 2
    assert files(tmp_path / "extended") == files(tmp_path / "whole")
    monkeypatch.setattr("utils.inputs.load_decoder", lambda *_: pytest.fail("the model was loaded"))
    assert evo_drop.main(command("extended", generations=None, **budget)) == json.loads(json.dumps(summary))


def test_finished_run_says_so_and_computes_nothing(command, tmp_path, monkeypatch, capsys):
    summary = evo_drop.main(command())
    assert summary["tokens_per_second"] == summary["tokens"] / summary["seconds"] > 0
    assert f"tokens: {summary['tokens']:,} in {summary['seconds']:.0f} s\n" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr("utils.inputs.load_decoder", lambda *_: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert evo_drop.main(command()) == json.loads(json.dumps(summary))
    assert f"{tmp_path}/run: this search is finished; raise --generations" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_finished_run_still_writes_where_it_is_asked_to_by_then(command, tmp_path, capsys):
    evo_drop.main(command())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    own = {"save_dir": str(tmp_path / "model"), "drop_config_dir": str(tmp_path / "config")}
    again = evo_drop.main(command(**own))
    assert (tmp_path / "model" / "config.json").exists() and again["dropped"] == summary["dropped"]
    name = "layer_drop_config.txt"
    assert (tmp_path / "config" / name).read_bytes() == files(tmp_path / "run")[name]
    capsys.readouterr()
    evo_drop.main(command(**own))
    assert "this search is finished" in capsys.readouterr().out
    (tmp_path / "run" / name).unlink()
    evo_drop.main(command(**own))
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "config" / name).read_bytes()


def test_run_of_an_earlier_version_without_a_flag_is_resumed(command, tmp_path):
    evo_drop.main(command(generations=2))
    path = tmp_path / "run" / "checkpoint.json"
    saved = read_sealed(path)
    del saved["flags"]["init"], saved["flags"]["no_reuse"], saved["state"]["measurements"]
    path.write_text(seal(saved))
    with pytest.raises(SystemExit, match=r"other flags \(--init random there, measured here\)"):
        evo_drop.main(command(generations=2, init="measured"))
    assert evo_drop.main(command(generations=3))["generations"] == 3


def test_folder_of_other_flags_is_refused_naming_what_differs(command, tmp_path):
    evo_drop.main(command())
    before = files(tmp_path / "run")
    for changes, message in (({"seed": 1}, "--seed 0 there, 1 here"),
                             ({"sparsity": 0.5}, "--sparsity 0.34 there, 0.5 here"),
                             ({"offspring": 7}, "--offspring 6 there, 7 here")):
        with pytest.raises(SystemExit, match=rf"{tmp_path}/run: holds a run with other flags \({message}\); use those"):
            evo_drop.main(command(**changes))
    with pytest.raises(SystemExit, match="--generations 3: the run in .* is already at generation 4"):
        evo_drop.main(command(generations=3))
    assert files(tmp_path / "run") == before


# ---- tiny spaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget, lines", [
    ({"sparsity": None, "drop_attn": 6, "drop_mlp": 6}, ["attn+mlp"] * 6),
    ({"sparsity": None, "drop_attn": 0, "drop_mlp": 0}, ["none"] * 6),
    ({"sparsity": None, "drop_mlp": 6}, ["mlp"] * 6),
])
def test_space_of_one_candidate_ends_with_it(budget, lines, command, tmp_path, capsys):
    for changes in ({"generations": None}, {"generations": 3}):
        folder = str(changes["generations"])
        evo_drop.main(command(folder, **budget, **changes))
        assert (tmp_path / folder / "layer_drop_config.txt").read_text().split() == lines
        capsys.readouterr()
        evo_drop.main(command(folder, **budget, **changes))
        assert "this search is finished" in capsys.readouterr().out


def test_space_smaller_than_the_offspring_asked_for_is_searched_whole(command, measured, tmp_path):
    legal = [(True, False)] * 3 + [(False, False)] * 3
    write_drop_config(tmp_path / "legal.txt", legal)
    evo_drop.main(command(sparsity=None, drop_attn=1, legal_to_drop_path=tmp_path / "legal.txt", generations=5))
    everything = {tuple((block == i, False) for block in range(6)) for i in range(3)}
    assert {candidate for selection, _, _ in measured for candidate in selection} == everything
    assert len(log(tmp_path / "run")) == 1 + 5


@pytest.mark.parametrize("budget, lines", [
    ({"sparsity": None, "drop_attn": 1, "drop_mlp": 1}, ["attn+mlp"]),
    ({"sparsity": None, "drop_attn": 1}, ["attn"]), ({"sparsity": None, "drop_params": 0.99}, ["attn+mlp"]),
    ({"sparsity": None, "drop_params": 0.01}, None),
])
def test_model_of_one_block(budget, lines, command, tokenizer, tmp_path):
    model = families.save_llama(tmp_path / "model", tokenizer, num_hidden_layers=1)
    evo_drop.main(command(model_name_or_path=model, **budget))
    found = (tmp_path / "run" / "layer_drop_config.txt").read_text().split()
    assert found == lines if lines else found in (["attn"], ["mlp"])


# ---- the optimum -----------------------------------------------------------------------------------------------------


def test_search_finds_the_exhaustive_optimum_with_half_the_evaluations(command, measured, tokenizer, tmp_path, text):
    """5 blocks, 2 attentions and 2 MLPs dropped: 100 candidates, each measured on the whole calibration set."""
    model = families.save_llama(tmp_path / "model", tokenizer, num_hidden_layers=5)
    decoder = load_decoder(model, device="cpu")
    pairs = [tuple(i in chosen for i in range(5)) for chosen in combinations(range(5), 2)]
    everything = [tuple(zip(attn, mlp)) for attn in pairs for mlp in pairs]
    assert len(everything) == 100
    found = 0
    for seed in range(10):
        measured.clear()
        evo_drop.main(command(f"run{seed}", model_name_or_path=model, sparsity=0.4, seed=seed, calibration_tokens=96,
                              initial_tokens=96, initially_generated=4, offspring=3, generations=30, max_mutations=2,
                              survivors_per_selection=[1], tokens_per_selection=[96]))
        evaluated = {candidate for selection, _, _ in measured for candidate in selection}
        assert len(evaluated) <= 50
        exhaustive = Fitness(decoder, calibration_documents(text, tokenizer, 96, 32, seed),
                             lambda i, state: decoder.blocks[i].drop(*(state or (False, False))))
        decoder.states = [None] * 5
        values = [value for value, in exhaustive.measure(everything)]
        for block in decoder.blocks:
            block.drop(False, False)
        winner = tuple(read_drop_config(tmp_path / f"run{seed}" / "layer_drop_config.txt"))
        found += winner == everything[values.index(min(values))]
    assert found >= 9


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(command, monkeypatch):
    """refused(message, **changes): the search ends in one sentence that matches, before the model is loaded."""
    def check(message: str, **changes):
        monkeypatch.setattr("utils.inputs.load_decoder", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(SystemExit, match=f"^error: {message}") as ended:
            evo_drop.main(command(**changes))
        assert "\n" not in str(ended.value)
    return check


@pytest.mark.parametrize("changes, message", [
    ({"sparsity": 0.0}, r"--sparsity 0\.0: a fraction between 0 and 1 is needed, e\.g\. 0\.25"),
    ({"sparsity": 1.0}, r"--sparsity 1\.0: a fraction between 0 and 1"),
    ({"sparsity": -0.25}, r"--sparsity -0\.25: a fraction"),
    ({"sparsity": 25}, r"--sparsity 25\.0: a fraction"),
    ({"sparsity": "nan"}, r"--sparsity nan: a fraction"),
    ({"sparsity": None, "drop_params": 1.5}, r"--drop_params 1\.5: a fraction"),
    ({"sparsity": None}, "--sparsity, --drop_attn/--drop_mlp, --drop_params: give exactly one budget"),
    ({"drop_attn": 1}, "--sparsity, --drop_attn/--drop_mlp, --drop_params: give exactly one budget"),
    ({"drop_params": 0.25}, "--sparsity, --drop_attn/--drop_mlp, --drop_params: give exactly one budget"),
    ({"sparsity": None, "drop_mlp": -1}, "--drop_mlp -1: must be 0 or more"),
    ({"sparsity": None, "drop_attn": 7}, "--drop_attn 7: 7 of 'attn' to drop, but only 6 may be; lower it"),
    ({"sparsity": None, "drop_attn": 3, "drop_two_consecutive": True},
     "--drop_attn 3: odd, but --drop_two_consecutive drops them in pairs; give an even number"),
    ({"sparsity": None, "drop_attn": 2, "drop_entire_block": True},
     "--drop_entire_block: drops attentions and MLPs together; use --sparsity or --drop_params"),
])
def test_budget_that_makes_no_sense_is_refused(changes, message, refused):
    refused(message, **changes)


@pytest.mark.parametrize("changes, message", [
    ({"survivors_per_selection": [7, 1]}, "--survivors_per_selection 7 1: more survivors than the 6 --offspring"),
    ({"survivors_per_selection": [2, 3]}, "--survivors_per_selection 2 3: .* give falling numbers"),
    ({"survivors_per_selection": [2, 0]}, "--survivors_per_selection 2 0, .*at least 1 survivor"),
    ({"survivors_per_selection": [2, 1, 1]}, "--survivors_per_selection 2 1 1 and --tokens_per_selection 64 128: 3 and "
                                             "2 steps; give one number each"),
    ({"tokens_per_selection": [64]}, "--survivors_per_selection 2 1 and --tokens_per_selection 64: 2 and 1 steps"),
    ({"population_size": 2}, "--population_size 2: must equal the last of --survivors_per_selection 2 1"),
    ({"initially_generated": 1, **TWO_PARENTS}, "--initially_generated 1: fewer than --population_size 2"),
    ({"tokens_per_selection": [64, 257]}, "--tokens_per_selection 257: more than the 256 --calibration_tokens; raise"),
    ({"initial_tokens": 300}, "--initial_tokens 300: more than the 256 --calibration_tokens; raise"),
    ({"initial_tokens": 1}, "--initial_tokens 1: at least 2 are needed"),
    ({"tokens_per_selection": [1, 64]}, ".*--tokens_per_selection 1 64: .*2 tokens in every step"),
    ({"calibration_sequence_length": 1}, "--calibration_sequence_length 1: at least 2 are needed"),
    ({"offspring": 0}, "--offspring 0: must be at least 1"),
    ({"max_mutations": 0}, "--max_mutations 0: must be at least 1"),
    ({"fixed_mutations": 0}, "--fixed_mutations 0: must be at least 1"),
    ({"generations": -1}, "--generations -1: must be 0 or more"),
    ({"microbatch_tokens": 0}, "--microbatch_tokens 0: must be at least 1"),
])
def test_selection_that_makes_no_sense_is_refused(changes, message, refused):
    refused(message, **changes)


def test_tokens_beyond_the_data_are_refused(refused, text):
    refused(rf"--calibration_tokens 90000: {text} holds only \d+ training tokens; ask for at most that many",
            calibration_tokens=90_000)


def test_unknown_dataset_is_refused(refused):
    refused("--calibration_data wikitext9: no such dataset, file or folder; use one of", calibration_data="wikitext9")
    refused("--eval_datasets c5: no such dataset", eval_datasets=["stdlib", "c5"], no_eval=False)


@pytest.mark.parametrize("content, message", [
    ("none\n" * 5, "5 lines, but the model has 6 blocks"), ("attn+mlp\n" * 7, "7 lines, but the model has 6 blocks"),
    ("none\n" * 3 + "attm\n" + "none\n" * 2, "line 4: 'attm'; every line is one of"), ("", "is empty"),
    (None, "cannot be read")])
def test_configuration_of_what_is_legal_that_does_not_fit_is_refused(content, message, refused, tmp_path):
    path = tmp_path / "legal.txt"
    if content is not None:
        path.write_text(content)
    refused(f"{path}: .*{message}", legal_to_drop_path=path)


@pytest.mark.parametrize("budget, message", [
    ({"sparsity": 0.1}, r"--sparsity 0\.1: of 6 drops none; give at least 0\.167"),
    ({"sparsity": "nan", "search_tokens": 50000}, "--sparsity nan: a fraction between 0 and 1 is needed"),
    ({"sparsity": None, "drop_params": "inf", "search_tokens": 50000}, "--drop_params inf: a fraction between 0 and 1"),
    ({"search_tokens": 50000, "fitness_fn": "ppl"}, r"--refine 2: .*\(of this --search_tokens has set .*--refine 0")])
def test_budgets_that_drop_nothing_or_are_no_numbers_are_refused(budget, message, refused):
    refused(message, **budget)


def test_too_little_that_is_legal_is_refused(refused, tmp_path):
    path = tmp_path / "legal.txt"
    path.write_text("attn\nattn+mlp\n" + "none\n" * 4)
    refused(r"--sparsity 0\.34: 2 of 'mlp' to drop, but only 1 may be; lower it, or allow more in --legal_to_drop_path",
            legal_to_drop_path=path)


@pytest.mark.parametrize("flag", ["output_dir", "drop_config_dir", "save_dir"])
def test_folder_that_cannot_be_written_is_refused(flag, refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(rf"--{flag} {folder}: cannot be written \(.*\); name a folder that can", **{flag: folder})


def test_pairs_of_an_odd_number_of_blocks_are_refused(refused, tokenizer, tmp_path):
    model = families.save_llama(tmp_path / "model", tokenizer, num_hidden_layers=3)
    refused("--drop_two_consecutive: the model has 3 blocks; an even number is needed", model_name_or_path=model,
            drop_two_consecutive=True)


def test_what_is_no_model_is_refused(refused, tmp_path):
    refused(f"--model_name_or_path {tmp_path}: cannot be loaded .*; give a folder with a Hugging Face checkpoint",
            model_name_or_path=tmp_path)
    refused(f"--tokenizer_name {tmp_path}: cannot be loaded", tokenizer_name=tmp_path)


def test_model_without_recognisable_blocks_is_refused(command, tokenizer, tmp_path):
    model = families.build("rwkv", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"^error: rwkv\.blocks\.0 \(RwkvBlock\): expected a child that takes"):
        evo_drop.main(command(model_name_or_path=tmp_path / "model", sparsity=0.5))


def test_share_of_parameters_that_nothing_legal_makes_up_is_refused(command, tmp_path):
    path = tmp_path / "legal.txt"
    path.write_text("attn\n" + "none\n" * 5)
    with pytest.raises(SystemExit, match=r"^error: --drop_params 0\.5: no set of sub-blocks drops at least that share"):
        evo_drop.main(command(sparsity=None, drop_params=0.5, legal_to_drop_path=path))
