"""--compile: blocks through torch.compile give what they give without it."""
import json
import os
import random
import shutil
from copy import deepcopy

import pytest
import torch
from torch._dynamo.utils import counters

import evo_drop
import families
from database.levels import LevelSwitcher
from database.store import Database
from test_fitness import MICROBATCH_TOKENS, MINIBATCH, documents, drop, random_candidates
from utils.decoder import Decoder
from utils.fitness import Fitness
from utils.model import load_decoder

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
                                    reason="torch.compile needs a C++ compiler")
TEXT = ["--calibration_data", "stdlib", "--calibration_sequence_length", "32", "--calibration_tokens", "512"]


@needs_compiler
def test_walk_over_dropped_and_packed_is_the_same():
    """Candidates drop halves of blocks and bring them back; microbatches are packed and not."""
    model = families.build("llama")
    plain, compiled = Decoder(deepcopy(model)), Decoder(model)
    graphs = counters["stats"]["unique_graphs"]
    compiled.compile_blocks()
    candidates, kinds = random_candidates(8), ("kl", "ppl")
    values = [Fitness(decoder, documents(), drop(decoder), microbatch_tokens=MICROBATCH_TOKENS
                      ).measure(candidates, MINIBATCH, kinds) for decoder in (plain, compiled)]
    for expected, value in zip(*values, strict=True):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert len({kl for kl, _ in values[1]}) > 4
    assert counters["stats"]["unique_graphs"] > graphs       # it was compiled


@needs_compiler
def test_walk_over_levels_is_the_same(checkpoint, databases):
    database, rng = Database.open(databases["quant"]), random.Random(0)
    values = []
    for compiled in (False, True):
        decoder = load_decoder(str(checkpoint), device="cpu", compile_blocks=compiled)
        switcher = LevelSwitcher(decoder, database, 1.0)
        if not values:
            candidates = [switcher.states({name: rng.choice(database.levels(name)) for name in database.layers})
                          for _ in range(6)]
        fitness = Fitness(decoder, documents(), switcher.set_block, microbatch_tokens=MICROBATCH_TOKENS)
        values.append([value for value, in fitness.measure(candidates, MINIBATCH)])
    assert values[1] == pytest.approx(values[0], rel=1e-5, abs=1e-7) and len(set(values[1])) == 6


@needs_compiler
def test_search_resumed_is_the_same_search(checkpoint, tmp_path):
    def run(name, generations):
        evo_drop.main(["--model_name_or_path", str(checkpoint), *TEXT, "--sparsity", "0.34", "--no_eval", "--compile",
                       "--offspring", "4", "--survivors_per_selection", "2", "1", "--tokens_per_selection", "64", "128",
                       "--initially_generated", "2", "--initial_tokens", "64", "--generations", str(generations),
                       "--output_dir", str(tmp_path / name)])
        return (tmp_path / name / "log.jsonl").read_bytes()
    whole = run("whole", 4)
    torch._dynamo.reset()                # a new process would have to compile again
    run("resumed", 2)
    torch._dynamo.reset()
    assert run("resumed", 4) == whole
    assert json.loads(whole.splitlines()[-1])["generation"] == 4


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore"), "InvalidCxxCompiler: No working.*"),
    (AssertionError(), "AssertionError")])
def test_where_compiling_fails_the_flag_is_named(error, reason, monkeypatch):
    def fails(*args, **kwargs):
        def call(*args, **kwargs):
            raise error
        return call
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(ValueError, match=rf"--compile: torch.compile fails here \({reason}\); .*leave"):
        Decoder(families.build("llama")).compile_blocks()
