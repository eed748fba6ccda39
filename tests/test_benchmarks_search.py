"""benchmarks/search.py: all its ways of measuring a generation agree, and it fails where they would not."""
import itertools
import json
import random
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

import families
from benchmarks import search, ways
from benchmarks.search import Meter, flops, largest_difference, measure, readme_table
from utils.decoder import Decoder

METER = Meter(torch.device("cpu"), 1)


@pytest.fixture(autouse=True)
def matmul_peak():
    with patch.object(search, "seconds_a_flop", return_value=1e-10):       # half a second of work, 20 times
        yield


@pytest.fixture(autouse=True)
def nothing_compiled():
    """tests/test_compile.py does that."""
    with patch.object(search, "compiled", return_value=nullcontext()):
        yield


def generation(name, folder):
    """One of a small Llama with a packed minibatch, and offspring few enough for a test."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    texts = [torch.randint(3, families.VOCABULARY, (rng.randint(2, 40),), generator=generator) for _ in range(40)]
    script, budget = ways.SEARCHES[name]
    few = "--offspring 10 --survivors_per_selection 2 1 --tokens_per_selection 4096 65536"
    with patch.dict(ways.SEARCHES, {name: (script, f"{budget} {few}")}):
        return ways.play(name, Decoder(families.build("llama")), texts, 512, folder, one_block=False)


@pytest.mark.parametrize("name", ways.SEARCHES)
def test_all_ways_agree_and_sharing_spares_work(name, tmp_path):
    played = generation(name, tmp_path)
    result = measure(name, played, 1, METER)
    assert {"plain", "here", search.LATER, search.COMPILED, "prefixes shared",
            "documents packed"} <= result["costs"].keys()
    assert measure(name, played, 1, METER, whole=True)["costs"].keys() == {"plain", "here", search.LATER}
    assert result["difference"] <= 1e-4
    assert result["flops"] == flops(played, shared=False) > result["shared_flops"]
    assert sum(len(candidates) * sum(length for _, length in minibatch) for candidates, minibatch in played.steps
               ) == result["tokens"]
    (tmp_path / "small-cpu.json").write_text(json.dumps({name: {"divide": 512, **result}}))
    table = readme_table(tmp_path)
    assert f"small, cpu, tokens / 512: {name}" in table and "[below](#on-a-gpu)" in table


def test_seconds_are_the_median_of_turns_and_memory_the_most(tmp_path):
    played, calls = generation("evo_drop", tmp_path), itertools.count()

    class Scripted(Meter):
        def __call__(self, work):
            turn = min(next(calls) // 3, 2)                  # of three ways
            cost = {"seconds": (5.0, 1.0, 2.0)[turn], "host": (10, 30, 20)[turn], "device": 0}
            return super().__call__(work)[0], cost

    costs = measure("evo_drop", played, 3, Scripted(torch.device("cpu"), 1), whole=True)["costs"]
    assert len(costs) == 3
    for way, cost in costs.items():
        assert cost["seconds"] == 2.0 and cost["host"] == 30 + search.kept_bytes(played, way, "cpu")


def test_fitness_that_differs_ends_the_benchmark(tmp_path):
    played = generation("evo_drop", tmp_path)
    with patch.object(search, "here", lambda generation: [[v * 1.001 for v in step] for step in ways.here(generation)]):
        with pytest.raises(SystemExit, match="evo_drop, here: a fitness differs"):
            measure("evo_drop", played, 1, METER)
    for values in itertools.permutations([1.0, float("nan")]):
        assert largest_difference([values], [[1.0, 1.0]]) == largest_difference([[1.0, 1.0]], [values]) == float("inf")


def test_switched_off_means_switched_off(tmp_path):
    """Each patch changes what it names: blocks run, teacher's distributions computed, levels unpacked, rows packed."""
    played = generation("evo_quant", tmp_path)
    fitness, off = played.fitness, ways.without(played)

    def run(ingredient=None):
        played.forget_loaded()
        fitness.blocks_run = played.switcher.switches = 0
        with patch.object(fitness, "_logits", side_effect=fitness._logits) as heads:
            if ingredient is None:
                ways.here(played)
            else:
                with off[ingredient]:
                    ways.here(played)
        return {"blocks": fitness.blocks_run, "heads": heads.call_count, "switches": played.switcher.switches}

    whole = run()
    assert run("prefixes shared")["blocks"] > whole["blocks"]
    assert run("teacher shared")["heads"] > whole["heads"] > run("hidden states stored")["heads"]
    assert run("documents packed")["blocks"] > whole["blocks"]
    assert run("levels packed")["switches"] == 0 < whole["switches"]


def test_results_in_another_dtype_are_rows_of_their_own(tmp_path, monkeypatch):
    dtypes = []
    monkeypatch.setattr(search, "measure", lambda name, played, *rest: (
        dtypes.append(played.decoder.dtype), measure(name, played, *rest))[1])
    load = search.load                                  # as many tokens as a step needs, no more
    monkeypatch.setattr(search, "load", lambda model, device, _, dtype: load(model, device, 1024, dtype))
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr("sys.argv", [*"search.py --searches evo_drop --divide 1024 --repeats 1 --whole".split(),
                                         "--dtype", dtype, "--out", str(tmp_path)])
        search.main()
    assert dtypes == [torch.float32, torch.bfloat16]
    assert {file.name for file in tmp_path.iterdir()} == {"demo-cpu.json", "demo bfloat16-cpu.json"}
    assert "| demo bfloat16, cpu, tokens / 1024: evo_drop" in readme_table(tmp_path)


def test_parent_is_looked_up_where_earlier_generations_saw_the_document(tmp_path):
    played = generation("evo_drop", tmp_path)
    candidates, minibatch = played.steps[-1]
    (parent, seen), = played.seen
    known = {(index, length) for index, length, _ in seen} & set(minibatch)
    assert known and candidates[-1] == parent
    with patch.object(played.fitness, "sums", side_effect=played.fitness.sums) as sums:
        values = ways.parent_looked_up(played)
    assert largest_difference(values, ways.here(played)) <= 1e-6
    run = [document for call in sums.call_args_list if parent in call.args[0] for document in call.args[1]]
    assert set(run) == set(minibatch) - known
