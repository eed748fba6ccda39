"""evo_unstructured.py and evo_quant.py: databases, level switching, budgets, and whole runs."""
import json
import math
import random
import re
import shutil
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_config
import evo_drop
import evo_quant
import evo_unstructured
import families
from database.levels import LevelSwitcher
from database.store import Database
from formats.compressed_tensors import fused_layers
from utils.configs import read_level_config, write_level_config
from utils.files import read_sealed, seal
from utils.fitness import Fitness, microbatches, walk_order
from utils.measurements import Measurements
from utils.model import load_decoder, weights_fingerprint
from utils.report import plot_search
from utils.units import Unit, build_units

TEXT = ["--calibration_data", "stdlib", "--calibration_sequence_length", "32"]
SEARCH = ["--no_eval", "--calibration_tokens", "1024", "--initial_tokens", "64", "--initially_generated", "4",
          "--offspring", "6", "--survivors_per_selection", "3", "1", "--tokens_per_selection", "64", "256",
          "--generations", "3"]


def flags(task: str, checkpoint, databases, folder, *more: str) -> list[str]:
    own = (["--sparse_weights_path", str(databases["sparse"])] if task == "sparse"
           else ["--quant_weights_path", str(databases["quant"])])
    if task == "quant" and "--target_bitwidth" not in more:
        own += ["--target_bitwidth", "2.5"]
    return ["--model_name_or_path", str(checkpoint), *TEXT, *SEARCH, *own, "--output_dir", str(folder), *more]


def program(task: str):
    return {"sparse": evo_unstructured, "quant": evo_quant}[task]


@pytest.fixture
def evaluated(monkeypatch):
    """Every candidate that any search of the test has run, as (level by layer, tokens)."""
    seen = []
    sums = Fitness.sums

    def recording(self, candidates, minibatch, kinds):
        seen.append((list(candidates), sum(length for _, length in minibatch)))
        return sums(self, candidates, minibatch, kinds)

    monkeypatch.setattr(Fitness, "sums", recording)
    return seen


def by_name(database: Database, candidate) -> dict[str, int]:
    """Level by layer of a walk's candidate: databases hold layers in the same order as blocks do."""
    return dict(zip(database.layers, (level for block in candidate for level in block), strict=True))


# ---- walk and cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sparse", "quant"])
@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_walk_with_level_cache_equals_fresh_models_with_dense_weights(checkpoint, databases, task, cache_gb):
    database = Database.open(databases[task])
    decoder = load_decoder(str(checkpoint), dtype="float32", device="cpu")
    teacher = deepcopy(decoder.model)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    documents = [torch.randint(3, decoder.config.vocab_size, (length,), generator=generator)
                 for length in (20, 20, 13, 7, 2)]
    switcher = LevelSwitcher(decoder, database, cache_gb)
    fitness = Fitness(decoder, documents, switcher.set_block)
    parent = {name: rng.choice(database.levels(name)) for name in database.layers}
    candidates = [parent | {name: rng.choice(database.levels(name)) for name in rng.sample(database.layers, 3)}
                  for _ in range(8)]
    values = fitness.measure([switcher.states(levels) for levels in candidates])

    teacher_logits = families.plain_logits(teacher, documents)
    for levels, (value,) in zip(candidates, values):
        fresh = deepcopy(teacher)
        for name, level in levels.items():
            fresh.get_submodule(name).weight.data = database.weight(name, level, dtype=torch.float32)
        plain = families.plain_values(teacher_logits, families.plain_logits(fresh, documents), documents)["kl"]
        assert plain > 0.01
        assert abs(value - plain) <= 1e-5 * plain + 1e-7


def test_a_layer_is_unpacked_only_when_its_level_changes(checkpoint, databases):
    database = Database.open(databases["quant"])
    decoder = load_decoder(str(checkpoint), dtype="float32", device="cpu")
    switcher = LevelSwitcher(decoder, database, 1.0)
    rng = random.Random(1)
    documents = [torch.randint(3, 90, (24,)) for _ in range(4)]
    fitness = Fitness(decoder, documents, switcher.set_block, microbatch_tokens=48)
    parent = {name: 3 for name in database.layers}
    candidates = [switcher.states(parent | {rng.choice(database.layers): 2, rng.choice(database.layers): 4})
                  for _ in range(6)]
    fitness.measure(candidates[:1])
    expected, loaded = 0, list(decoder.states)
    for _ in microbatches([(i, 24) for i in range(4)], 48, decoder.packed_rows):
        for i in walk_order(candidates, loaded):
            expected += sum(a != b for old, new in zip(loaded, candidates[i]) for a, b in zip(old, new))
            loaded = list(candidates[i])
    before = switcher.switches
    fitness.measure(candidates)
    assert switcher.switches - before <= expected          # later blocks of an abandoned prefix stay as they are
    assert switcher.switches - before >= len(set(candidates)) - 1


def test_walk_order_keeps_every_prefix_together_and_starts_with_what_is_loaded():
    rng = random.Random(0)
    candidates = [tuple(rng.choice("ab") for _ in range(6)) for _ in range(40)]
    order = walk_order(candidates, candidates[7])
    assert sorted(order) == list(range(40)) and candidates[order[0]] == candidates[7]
    for depth in range(7):
        prefixes = [candidates[i][:depth] for i in order]
        runs = 1 + sum(a != b for a, b in zip(prefixes, prefixes[1:]))
        assert runs == len(set(prefixes))


# ---- the search spaces -----------------------------------------------------------------------------------------------


@st.composite
def bit_spaces(draw):
    levels = draw(st.sampled_from([(2, 3, 4), (2, 3, 4, 8), (2, 3, 4, 5, 6), (3, 5)]))
    sizes = draw(st.lists(st.sampled_from([8, 16, 16, 48]), min_size=1, max_size=9))
    units = [Unit((f"layer{i}",), levels) for i in range(len(sizes))]
    bits = [{level: level * size for level in levels} for size in sizes]
    target = draw(st.floats(levels[0], levels[-1]))
    groups = {"size": [sizes.index(size) for size in sizes],
              "none": [0] * len(sizes)}[draw(st.sampled_from(["size", "none"]))]
    return evo_quant.Space(units, bits, groups, math.floor(target * sum(sizes)), 1), target


@settings(max_examples=200, deadline=None)
@given(bit_spaces(), st.integers(0, 2**32))
def test_bits_are_never_above_the_budget_and_short_by_less_than_a_step(case, seed):
    space, target = case
    rng = random.Random(seed)
    candidate = evo_quant.random_candidate(space, target, rng)
    for _ in range(20):
        slack = space.slack(candidate)
        assert slack >= 0
        steps = [costs[up] - costs[level] for costs, level, unit in zip(space.bits, candidate, space.units)
                 for up in [next((l for l in unit.levels if l > level), None)] if up is not None]
        assert not steps or slack < min(steps)
        child = evo_quant.mutate(space, [candidate], 3, rng)
        candidate = child or candidate


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([{2: 28, 3: 26, 4: 34}, {2: 18, 3: 26, 4: 34}]), min_size=1, max_size=8),
       st.floats(0, 1), st.integers(0, 2**32))
def test_bits_are_never_above_the_budget_where_fewer_cost_more(bits, share, seed):
    """As codes of 2 bits in small groups do beside those of 3 in large ones, with their scales."""
    least, most = (sum(pick(costs.values()) for costs in bits) for pick in (min, max))
    units = [Unit((f"layer{i}",), (2, 3, 4)) for i in range(len(bits))]
    space = evo_quant.Space(units, bits, [0] * len(bits), least + int(share * (most - least)), 1)
    rng = random.Random(seed)
    candidate = evo_quant.random_candidate(space, space.budget / (8 * len(bits)), rng)
    for _ in range(10):
        assert space.slack(candidate) >= 0
        candidate = evo_quant.mutate(space, [candidate], 3, rng) or candidate


def test_bits_move_within_groups_of_equal_size():
    units = [Unit((f"layer{i}",), (2, 3, 4)) for i in range(8)]
    sizes = [16] * 4 + [64] * 4
    space = evo_quant.Space(units, [{level: level * size for level in (2, 3, 4)} for size in sizes],
                            [0] * 4 + [4] * 4, 3 * sum(sizes), 1)
    rng = random.Random(0)
    candidate = (3,) * 8
    for _ in range(100):
        candidate = evo_quant.switch(space, candidate, rng)
        assert sum(candidate[:4]) == 12 and sum(candidate[4:]) == 12


def test_groups_are_chosen_in_proportion_to_their_units_whatever_can_be_raised_in_them():
    units = [Unit((f"layer{i}",), (2, 3, 4)) for i in range(8)]
    space = evo_quant.Space(units, [{level: level * 8 for level in (2, 3, 4)}] * 8, [0] * 6 + [6] * 2, 25 * 8, 1)
    rng = random.Random(0)
    candidate = (4, 4, 4, 4, 2, 2, 3, 2)                 # two of six can be raised, and both of two
    children = [evo_quant.switch(space, candidate, rng) for _ in range(4000)]
    assert all(space.feasible(child) for child in children)
    assert sum(child[6:] == candidate[6:] for child in children) / 4000 == pytest.approx(6 / 8, abs=0.03)
    lower = {tuple(b - a for a, b in zip(candidate, child)).index(1) for child in children}
    assert lower == {4, 5, 7}                              # the last but one could not be paid for


def test_a_saturated_group_is_passed_over_and_a_full_space_has_no_switch():
    units = [Unit(("a",), (2, 3)), Unit(("b",), (2, 3, 4)), Unit(("c",), (2, 3, 4))]
    space = evo_quant.Space(units, [{level: level * 8 for level in unit.levels} for unit in units], [0, 1, 1], 72, 1)
    assert {evo_quant.switch(space, (3, 3, 3), random.Random(seed)) for seed in range(20)} == {(3, 2, 4), (3, 4, 2)}
    full = evo_quant.Space(units[:1], [{2: 16, 3: 24}], [0], 24, 1)
    assert evo_quant.switch(full, (3,), random.Random(0)) is None
    assert evo_quant.draw_distinct(lambda: evo_quant.mutate(full, [(3,)], 3, random.Random(0)), 4, {(3,)}) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=8),
       st.one_of(st.none(), st.integers(0, 12)), st.integers(0, 2**32))
def test_sparsity_switches_keep_the_number_of_weights(shapes, deviation, seed):
    units = [Unit(tuple(f"layer{i}.{k}" for k in range(size)), tuple(range(-low, high + 1)))
             for i, (size, low, high) in enumerate(shapes)]
    space = evo_unstructured.Space(units, deviation)
    rng = random.Random(seed)
    candidate = (0,) * len(units)
    for _ in range(20):
        child = evo_unstructured.mutate(space, [candidate], 3, rng)
        if child is not None:
            levels = space.levels(child)
            assert sum(levels.values()) == 0
            assert all(level in unit.levels for unit, level in zip(units, child))
            assert deviation is None or sum(map(abs, levels.values())) <= deviation
            candidate = child


@pytest.mark.parametrize("deviation", [0, 2, 8])
def test_random_starts_hold_a_small_bound_on_the_total_deviation(deviation):
    space = evo_unstructured.Space([Unit((f"layer{i}",), tuple(range(-4, 5))) for i in range(40)], deviation)
    found = {evo_unstructured.random_candidate(space, random.Random(seed)) for seed in range(20)}
    assert all(space.feasible(candidate) for candidate in found)
    assert max(map(space.deviation, found)) == deviation and (len(found) > 10) == (deviation > 0)


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, more", [("sparse", []), ("sparse", ["--tie", "qkv,gate_up"]), ("quant", []),
                                        ("quant", ["--group_rule", "none", "--target_bitwidth", "3"]),
                                        ("quant", ["--count_overhead", "--target_bitwidth", "4.2"])])
def test_budget_recomputed_from_the_saved_file_is_the_promised_one(checkpoint, databases, tmp_path, task, more,
                                                                  evaluated):
    program(task).main(flags(task, checkpoint, databases, tmp_path / "run", *more))
    database = Database.open(databases[task])
    [file] = (tmp_path / "run").glob("*configuration*.txt")
    assert (databases[task] / file.name).read_bytes() == file.read_bytes()
    levels = read_level_config(file)
    size = sum(math.prod(database.shape(name)) for name in database.layers)
    if task == "sparse":
        promised = sum(database.kept(name, 0) for name in database.layers)
        for candidate in [levels] + [by_name(database, c) for batch, _ in evaluated for c in batch]:
            assert sum(database.kept(name, level) for name, level in candidate.items()) == promised
    else:
        target = float(more[-1]) if "--target_bitwidth" in more else 2.5
        overhead = "--count_overhead" in more
        for candidate in [levels] + [by_name(database, c) for batch, _ in evaluated for c in batch]:
            bits = sum(database.bits(name, level, overhead) for name, level in candidate.items())
            smallest = min(math.prod(database.shape(name)) for name in database.layers)
            assert target * size - smallest < bits <= target * size


@pytest.mark.parametrize("task", ["sparse", "quant"])
def test_ties_pins_and_bounds_hold_in_every_candidate(checkpoint, databases, tmp_path, task, evaluated):
    pin, low, high = ("-1", -1, 2) if task == "sparse" else ("4", 2, 3)
    program(task).main(flags(task, checkpoint, databases, tmp_path / "run", "--tie", "qkv,gate_up", "--pin",
                             f"model.layers.0.self_attn.*={pin}", "--bounds", f"*.down_proj={low}:{high}"))
    database = Database.open(databases[task])
    candidates = [by_name(database, candidate) for batch, _ in evaluated for candidate in batch]
    assert len(candidates) > 30
    for levels in candidates:
        for name, level in levels.items():
            block = name.rpartition(".")[0]
            if name.startswith("model.layers.0.self_attn."):
                assert level == int(pin)
            if name.endswith("down_proj"):
                assert low <= level <= high
            if name.endswith("q_proj"):
                assert level == levels[f"{block}.k_proj"] == levels[f"{block}.v_proj"]
            if name.endswith("gate_proj"):
                assert level == levels[f"{block}.up_proj"]


def test_tied_blocks_and_max_level_hold_in_every_candidate(checkpoint, databases, tmp_path, evaluated):
    evo_unstructured.main(flags("sparse", checkpoint, databases, tmp_path / "run", "--tie", "block", "--max_level", "1",
                                "--max_total_deviation", "28"))
    assert len(evaluated) > 5
    for batch, _ in evaluated:
        for candidate in batch:
            assert all(len(set(block)) == 1 for block in candidate)
            assert max(abs(level) for block in candidate for level in block) <= 1
            assert sum(abs(level) for block in candidate for level in block) <= 28


MEASURED = ["--init", "measured", "--screen", "3"]


@pytest.mark.parametrize("task, more, call", [("sparse", [], 4), ("quant", [], 4), ("sparse", MEASURED, 12),
                                              ("quant", MEASURED, 3)])
def test_same_seed_gives_the_same_bytes_and_a_killed_run_resumes_to_them(checkpoint, databases, tmp_path, monkeypatch,
                                                                         task, more, call):
    """The call of `sums` that kills: of a measured start, one for every block, then one for the start."""
    def result(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".txt", ".jsonl")
                and file.name != "timing.jsonl"}

    module = program(task)
    module.main(flags(task, checkpoint, databases, tmp_path / "whole", *more))
    module.main(flags(task, checkpoint, databases, tmp_path / "again", *more))
    calls, sums = 0, Fitness.sums

    def dying(self, *args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return sums(self, *args)

    monkeypatch.setattr(Fitness, "sums", dying)
    with pytest.raises(KeyboardInterrupt):
        module.main(flags(task, checkpoint, databases, tmp_path / "killed", *more))
    assert not list((tmp_path / "killed").glob("*.txt"))
    monkeypatch.setattr(Fitness, "sums", sums)
    module.main(flags(task, checkpoint, databases, tmp_path / "killed", *more))
    assert len(result(tmp_path / "whole")) == 2
    assert result(tmp_path / "whole") == result(tmp_path / "again") == result(tmp_path / "killed")


@pytest.mark.parametrize("task", ["sparse", "quant"])
def test_log_counts_candidates_times_tokens_and_for_the_parent_what_it_has_not_seen(checkpoint, databases, tmp_path,
                                                                                   task, evaluated, capsys):
    program(task).main(flags(task, checkpoint, databases, tmp_path / "run"))
    picture = math.prod(map(int, re.search(r"png: (\d+) parents on (\d+) more", capsys.readouterr().out).groups()))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert picture > 0
    assert log[-1]["tokens"] + picture == sum(len(batch) * tokens for batch, tokens in evaluated)
    spent = [b["tokens"] - a["tokens"] for a, b in zip(log, log[1:])]
    assert max(spent) <= 6 * 64 + (3 + 1) * 256 and sum(spent) < 3 * (6 * 64 + (3 + 1) * 256)


def test_paper_settings_for_sparsity_take_458752_tokens_a_generation(checkpoint, databases, tmp_path, monkeypatch):
    asked = []

    def measure(self, candidates, minibatch):
        asked.append(len(candidates) * sum(length for _, length in minibatch))
        return [random.Random(str(candidate)).random() for candidate in candidates], asked[-1]

    monkeypatch.setattr(Fitness, "_run_teacher", lambda *_: {})
    monkeypatch.setattr(Measurements, "measure", measure)
    monkeypatch.setattr(Fitness, "measure", lambda self, candidates, *_: [(0.0,) for _ in candidates])  # the picture
    evo_unstructured.main(["--model_name_or_path", str(checkpoint), "--calibration_data", "stdlib", "--no_eval",
                           "--sparse_weights_path", str(databases["sparse"]), "--generations", "2",
                           "--output_dir", str(tmp_path / "run")])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [b["tokens"] - a["tokens"] for a, b in zip(log, log[1:])] == [458752] * 2
    assert sum(asked[-3:]) == 458752


@pytest.mark.parametrize("task", ["sparse", "quant"])
def test_the_saved_winner_is_the_candidate_of_the_last_log_line_and_is_what_is_evaluated(checkpoint, databases,
                                                                                        tmp_path, task, monkeypatch):
    monkeypatch.setattr("utils.search.plot_search", plot_search)
    arguments = [a for a in flags(task, checkpoint, databases, tmp_path / "run") if a != "--no_eval"]
    summary = program(task).main([*arguments, "--eval_datasets", "stdlib", "--eval_tokens", "512", "--eval_every", "0",
                                  "--eval_sequence_length", "32"])
    [file] = (tmp_path / "run").glob("*configuration*.txt")
    assert summary["levels"] == read_level_config(file)
    monkeypatch.chdir(tmp_path)
    kind = "sparse" if task == "sparse" else "quant"
    results = eval_config.main(["--model_name_or_path", str(checkpoint), f"--{kind}_weights_path", str(databases[task]),
                                f"--{kind}_config_path", str(file), "--eval_datasets", "stdlib", "--eval_tokens", "512",
                                "--eval_sequence_length", "32", "--output", "results.json"])
    assert results["dense"]["stdlib"] == summary["evaluation"]["dense"]["stdlib"]
    for measure in ("ppl", "kl"):
        assert results["compressed"]["stdlib"][measure] == pytest.approx(
            summary["evaluation"]["search"]["stdlib"][measure], rel=1e-5)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "run" / "search.png").stat().st_size > 5000


@pytest.mark.parametrize("task", ["sparse", "quant"])
def test_a_search_goes_on_with_another_cache_but_not_with_another_text_or_database(checkpoint, databases, tmp_path,
                                                                                   task, text):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(text, rows)
    own = dict(databases) | {task: tmp_path / "db"}
    shutil.copytree(databases[task], own[task])

    def run(folder: str, generations: int, *more: str) -> dict:
        return program(task).main(flags(task, checkpoint, own, tmp_path / folder, "--calibration_data", str(rows),
                                        "--generations", str(generations), *more))

    run("run", 1)
    run("run", 2, "--level_cache_gb", "0")
    whole = run("whole", 2)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[::-1]))
    with pytest.raises(SystemExit, match=f"error: --calibration_data: not what it was when the run in {tmp_path}/run"):
        run("run", 3)
    rows.write_text("".join(lines))
    built = (own[task] / "manifest.json").read_text()
    manifest = read_sealed(own[task] / "manifest.json")
    manifest["flags"]["rel_damp"] = 0.5
    (own[task] / "manifest.json").write_text(seal(manifest))
    for generations in (2, 3):                           # finished, and to be extended
        with pytest.raises(SystemExit, match=f"error: --{task}_weights_path: not what it was"):
            run("run", generations)
    (own[task] / "manifest.json").write_text(built)
    assert run("run", 2)["levels"] == whole["levels"]                # finished: nothing is measured


@pytest.mark.parametrize("fitness", ["ppl", "sparse_kl"])
def test_other_fitness_functions_run_and_name_the_result(checkpoint, databases, tmp_path, fitness):
    evo_quant.main(flags("quant", checkpoint, databases, tmp_path / "run", "--fitness_fn", fitness))
    assert (tmp_path / "run" / f"evo-{fitness}-configuration-2.5.txt").exists()


@pytest.mark.parametrize("task, more, sentence", [
    ("quant", ["--target_bitwidth", "1.5"],
     "--target_bitwidth 1.5: the levels that are left allow averages from 2 to 8"),
    ("quant", ["--target_bitwidth", "nan"], "--target_bitwidth nan"),
    ("quant", ["--pin", "*.k_proj=5"], "--pin .*k_proj=5: .*has no such level"),
    ("quant", ["--pin", "nothing=4"], "--pin nothing=4: matches no layer"),
    ("quant", ["--bounds", "*=4"], "--bounds .*=4: not understood"),
    ("quant", ["--tie", "qk"], "--tie qk: qk is not a set of layers"),
    ("quant", ["--step_size", "0"], "--step_size 0: must be at least 1"),
    ("quant", ["--kl_topk", "0"], "--kl_topk 0: must be at least 1"),
    ("quant", ["--configuration_name", "../x.txt"], "--configuration_name ../x.txt: a file name"),
    ("quant", ["--quant_weights_path", "SPARSE"], "holds sparsegpt levels"),
    ("sparse", ["--sparse_weights_path", "nowhere"], "nowhere: no manifest.json"),
    ("sparse", ["--max_level", "-1"], "--max_level -1: must be 0 or more"),
    ("sparse", ["--pin", "*=1"], "leave no allocation"),
])
def test_bad_input_ends_in_one_sentence(checkpoint, databases, tmp_path, task, more, sentence):
    more = [str(databases["sparse"]) if word == "SPARSE" else word for word in more]
    with pytest.raises(SystemExit, match=sentence):
        program(task).main(flags(task, checkpoint, databases, tmp_path / "run", *more))


@pytest.mark.parametrize("more, sentence", [
    (["--target_bitwidth", "9"], "--target_bitwidth 9.0: the levels that are left allow averages from"),
    (["--device", "gpu"], "--device gpu: ")])
def test_what_needs_no_text_is_told_before_any_is_read(checkpoint, databases, tmp_path, monkeypatch, more, sentence):
    monkeypatch.setattr("utils.search.documents_of", lambda *_: pytest.fail("calibration text was read"))
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        evo_quant.main([*flags("quant", checkpoint, databases, tmp_path / "run"), *more])


def test_a_budget_out_of_reach_is_told_before_the_model_is_run(checkpoint, databases, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.search.Fitness", lambda *_, **__: pytest.fail("the uncompressed model was run"))
    with pytest.raises(SystemExit, match="--pin, .* leave no allocation that keeps as many weights as level 0"):
        evo_unstructured.main([*flags("sparse", checkpoint, databases, tmp_path / "run"), "--pin", "*=1"])


def test_other_weights_of_the_same_configuration_are_refused(checkpoint, databases, tokenizer, tmp_path):
    """Another seed, say, or a fine-tuned model: by the database and by a run that is resumed."""
    other = families.save_llama(tmp_path / "other", tokenizer, num_hidden_layers=6, seed=1)
    configuration = ["--quant_weights_path", str(databases["quant"]), "--quant_config_path", "3", "--no_perplexity",
                     "--tasks", "any"]
    for main, arguments in ((eval_config.main, ["--model_name_or_path", other, *configuration]),
                            (evo_quant.main, flags("quant", other, databases, tmp_path / "run"))):
        with pytest.raises(SystemExit, match=f"{databases['quant']}: built for .*, whose weights differ from this"):
            main(arguments)
    model = shutil.copytree(checkpoint, tmp_path / "model")
    drop = ["--model_name_or_path", str(model), *TEXT, *SEARCH, "--sparsity", "0.34", "--output_dir",
            str(tmp_path / "depth")]
    evo_drop.main([*drop, "--generations", "1"])
    checkpoint_file = tmp_path / "depth" / "checkpoint.json"
    saved = read_sealed(checkpoint_file)
    shutil.copy(f"{other}/model.safetensors", model)
    with pytest.raises(SystemExit, match="--model_name_or_path: not what it was when the run in"):
        evo_drop.main([*drop, "--generations", "2"])
    del saved["inputs"]["model_name_or_path"]        # a run that an earlier version began, which knew no fingerprints
    checkpoint_file.write_text(seal(saved))
    evo_drop.main([*drop, "--generations", "2"])
    old = shutil.copytree(databases["quant"], tmp_path / "old")
    manifest = read_sealed(old / "manifest.json")
    assert manifest.pop("model_sha256") != weights_fingerprint(other)
    (old / "manifest.json").write_text(seal(manifest))
    Database.open(old).check_weights(weights_fingerprint(other))


def test_a_fingerprint_does_not_depend_on_how_tensors_are_split_and_sees_every_one(tmp_path):
    model = families.build("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    found = weights_fingerprint(str(tmp_path / "one"))
    assert weights_fingerprint(str(tmp_path / "many")) == found
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "one")
    assert weights_fingerprint(str(tmp_path / "one")) != found


def test_ties_know_the_layers_that_engines_fuse_in_latent_and_linear_attention():
    names = [f"model.layers.0.{name}" for name in ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa",
             "self_attn.o_proj", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b",
             "linear_attn.in_proj_a", "feed_forward.w1", "feed_forward.w3")]
    args = SimpleNamespace(tie="qkv,gate_up", pin=[], bounds=[])
    sets = [unit.names for unit in build_units([names], {name: [2, 3] for name in names}, args)]
    assert sets == [tuple(names[:2]), (names[2],), tuple(names[3:5]), tuple(names[5:7]), tuple(names[7:])]
    assert fused_layers(names) == [list(unit) for unit in sets if len(unit) > 1]


def test_configuration_that_does_not_fit_the_database_is_refused_with_three_lines(checkpoint, databases, tmp_path):
    database = Database.open(databases["quant"])
    levels = dict.fromkeys(database.layers, 3) | {name: 7 for name in database.layers[5:10]}
    write_level_config(tmp_path / "levels.txt", levels)
    with pytest.raises(SystemExit) as error:
        eval_config.main(["--model_name_or_path", str(checkpoint), "--quant_weights_path", str(databases["quant"]),
                          "--quant_config_path", str(tmp_path / "levels.txt"), "--eval_datasets", "stdlib"])
    assert str(error.value).count("no such level") == 3 and "and 2 more" in str(error.value)
