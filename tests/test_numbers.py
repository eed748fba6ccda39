"""Numbers at their limits: overflow and NaN, documents and minibatches that are too small, spaces of one candidate."""
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, OPTConfig, Phi3Config

import evo_drop
import evo_quant
import evo_unstructured
import families
from database import gptq, sparsegpt
from test_fitness import documents, drop, random_candidates
from utils.data import (
    calibration_documents,
    check_minibatches,
    default_sequence_length,
    draw_minibatch,
    evaluation_documents,
    sequence_length,
)
from utils.decoder import Decoder
from utils.errors import RunError
from utils.fitness import Fitness, assemble, microbatches
from utils.model import load_decoder

TEXT = ["--calibration_sequence_length", "32", "--calibration_tokens", "256", "--calibration_data"]
SEARCH = ["--no_eval", "--initially_generated", "3", "--initial_tokens", "64", "--generations", "2", "--offspring", "3",
          "--survivors_per_selection", "2", "1", "--tokens_per_selection", "64", "96"]


# ---- overflow and NaN ------------------------------------------------------------------------------------------------


def changed_checkpoint(checkpoint: str, folder: Path, change) -> str:
    """A copy of the checkpoint with `change` made to its state dict."""
    shutil.copytree(checkpoint, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_weights_that_are_not_numbers_are_named_before_the_search(checkpoint, text, tmp_path):
    name = "model.layers.3.mlp.up_proj.weight"
    broken = changed_checkpoint(checkpoint, tmp_path / "model", lambda state: state[name][1].fill_(math.nan))
    with pytest.raises(SystemExit, match=f"^error: {name}: NaN or infinite weights; check the checkpoint"):
        evo_drop.main(["--model_name_or_path", broken, "--sparsity", "0.34", *TEXT, text, *SEARCH, "--output_dir",
                       str(tmp_path / "run")])


def test_a_model_that_overflows_in_half_precision_is_refused_and_fine_in_another(checkpoint, tmp_path):
    large = changed_checkpoint(checkpoint, tmp_path / "model",
                               lambda state: [state[f"model.layers.1.mlp.{layer}_proj.weight"].mul_(3_000)
                                              for layer in ("up", "down")])
    with pytest.raises(ValueError, match="LlamaForCausalLM: gives NaN in torch.float16; use --dtype bfloat16 or"):
        load_decoder(large, "float16", "cpu")
    load_decoder(large, "bfloat16", "cpu")


def test_a_model_that_overflows_on_the_calibration_text_alone_is_refused():
    decoder = Decoder(families.build("llama"))
    embedding = decoder.model.get_input_embeddings().weight
    embedding[5] = math.inf
    texts = documents()
    texts[4][7] = 5
    with pytest.raises(RunError, match="hidden states are NaN or infinite in torch.float32; use --dtype bfloat16"):
        Fitness(decoder, texts, drop(decoder))


@pytest.mark.parametrize("strategy", ["plus", "comma"])
def test_parents_stay_where_all_offspring_diverge(strategy):
    parents, offspring = [(0, 1), (1, 0)], [(2, -1), (-1, 2), (3, -2)]

    def measure(candidates, num_tokens):
        return sorted(((0.5 if candidate in parents else math.inf, candidate) for candidate in candidates),
                      key=lambda pair: pair[0])

    for module in (evo_drop, evo_unstructured, evo_quant):
        survivors = module.select(offspring, parents, [(3, 64), (2, 96)], measure, strategy)
        assert [candidate for _, candidate in survivors] == parents


def test_comma_forgets_the_parents_and_plus_does_not():
    parents, offspring = [(0, 0)], [(1, -1), (2, -2)]

    def measure(candidates, num_tokens):
        return sorted((float(candidate[0]), candidate) for candidate in candidates)

    for module in (evo_drop, evo_unstructured, evo_quant):
        assert module.select(offspring, parents, [(2, 64), (1, 96)], measure, "plus") == [(0.0, (0, 0))]
        assert module.select(offspring, parents, [(2, 64), (1, 96)], measure, "comma") == [(1.0, (1, -1))]


def test_a_search_with_no_finite_start_is_refused(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Fitness, "sums", lambda self, candidates, minibatch, _: torch.full(
        (len(minibatch), len(candidates), 1), math.nan))
    with pytest.raises(SystemExit, match="^error: --fitness_fn kl: not finite for any start; use --dtype bfloat16"):
        evo_drop.main(["--model_name_or_path", checkpoint, "--sparsity", "0.34", *TEXT, text, *SEARCH, "--output_dir",
                       str(tmp_path / "run")])


def test_identical_candidates_have_identical_fitness_and_are_run_once():
    decoder = Decoder(families.build("llama"))
    fitness = Fitness(decoder, documents(), drop(decoder))
    [candidate] = random_candidates(1)
    [value] = fitness.measure([candidate])
    blocks = fitness.blocks_run
    assert fitness.measure([candidate] * 5) == [value] * 5
    assert fitness.blocks_run == 2 * blocks


# ---- documents and minibatches ---------------------------------------------------------------------------------------


def test_empty_documents_and_those_of_one_token_are_left_out(tokenizer, tmp_path):
    texts = ["", " ", "\n", *["some words of text"] * 30, ""]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lengths = [len(d) for d in calibration_documents(str(tmp_path), tokenizer, 100, 32)]
    assert min(lengths) >= 2 and sum(lengths) == 100
    assert min(len(d) for d in evaluation_documents(str(tmp_path), tokenizer, 100, 32)) >= 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", " ")))
    with pytest.raises(ValueError, match=r"--calibration_tokens 100: .*empty holds only 0 training tokens"):
        calibration_documents(str(tmp_path / "empty"), tokenizer, 100, 32)


@given(st.lists(st.sampled_from([2, 2, 2, 3, 5, 9]), min_size=1, max_size=12), st.integers(0, 10**6), st.data())
def test_any_number_of_tokens_is_drawn_unless_all_documents_have_two(lengths, seed, data):
    texts = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    num_tokens = data.draw(st.integers(2, sum(lengths)))
    if set(lengths) == {2} and num_tokens % 2:
        with pytest.raises(ValueError, match=f"--tokens_per_selection {num_tokens}: an odd number"):
            check_minibatches(texts, [2, num_tokens])
        return
    check_minibatches(texts, [2, num_tokens])
    minibatch = draw_minibatch(texts, num_tokens, random.Random(seed))
    assert sum(length for _, length in minibatch) == num_tokens
    assert all(2 <= length <= lengths[i] for i, length in minibatch)
    assert len({i for i, _ in minibatch}) == len(minibatch)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=25), st.integers(1, 200), st.sampled_from([0, 1, 1_000_000]))
def test_packing_holds_every_document_once_and_predicts_within_each(lengths, max_tokens, packed_rows):
    texts = [torch.full((length,), i) for i, length in enumerate(lengths)]
    seen = []
    for rows in microbatches(list(enumerate(lengths)), max_tokens, packed_rows):
        tokens = [sum(length for _, length in row) for row in rows]
        assert len(set(tokens)) == 1 and (sum(tokens) <= max_tokens or len(rows) == 1)
        assert tokens[0] <= max(lengths)
        if packed_rows == 0:
            assert all(len(row) == 1 for row in rows)
        input_ids, position_ids, predicting = assemble(texts, rows)
        flat = input_ids.flatten()
        assert torch.equal(flat[predicting], flat[predicting + 1])     # the next token is of the same document
        assert len(predicting) == sum(length - 1 for row in rows for _, length in row)
        if position_ids is not None:
            assert int((position_ids == 0).sum()) == sum(map(len, rows))
        seen += [document for row in rows for document in row]
    assert sorted(seen) == list(enumerate(lengths))


def test_an_odd_step_on_documents_of_two_tokens_is_refused_before_the_model_is_loaded(checkpoint, text, tmp_path,
                                                                                     monkeypatch):
    monkeypatch.setattr("utils.inputs.load_decoder", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match="--tokens_per_selection 65: an odd number, but all calibration"):
        evo_drop.main(["--model_name_or_path", checkpoint, "--sparsity", "0.34", "--calibration_data", text,
                       "--calibration_sequence_length", "2", "--calibration_tokens", "256", *SEARCH[:-2], "64", "65",
                       "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize("config", [OPTConfig(max_position_embeddings=64), GPT2Config(n_positions=64)])
def test_lengths_beyond_the_models_positions_are_refused(config):
    assert sequence_length(None, config, "--eval_sequence_length") == sequence_length(64, config, "--flag") == 64
    with pytest.raises(ValueError, match="--eval_sequence_length 65: more than the model's 64 positions"):
        sequence_length(65, config, "--eval_sequence_length")


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize("config, limit", [
    (Phi3Config(max_position_embeddings=64, original_max_position_embeddings=16, hidden_size=32, num_attention_heads=4,
                pad_token_id=0, rope_parameters=LONGROPE), 16),
    (LlamaConfig(max_position_embeddings=64, rope_parameters=LONGROPE | {"original_max_position_embeddings": 32}), 32),
    (LlamaConfig(max_position_embeddings=64, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}), 32)])
def test_lengths_at_which_the_rotary_embedding_changes_are_refused(config, limit):
    assert default_sequence_length(config) == sequence_length(limit, config, "--flag") == limit
    with pytest.raises(ValueError, match=f"--eval_sequence_length {limit + 1}: the model's rotary embedding .* beyond "
                                         f"{limit} positions, .*; give at most {limit}"):
        sequence_length(limit + 1, config, "--eval_sequence_length")


def test_rotary_embeddings_that_stay_the_same_allow_all_positions():
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16}
    for config in (LlamaConfig(max_position_embeddings=64, rope_parameters=llama3), Phi3Config(
            max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0)):
        assert default_sequence_length(config) == sequence_length(64, config, "--flag") == 64


def test_a_longrope_model_is_one_function_up_to_its_default_length():
    model = families.build("phi3", original_max_position_embeddings=16, rope_parameters=LONGROPE)
    tokens = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(0))

    def first_logits(length: int) -> torch.Tensor:
        return families.plain_logits(model, [tokens[:length]])[0][:8]

    length = default_sequence_length(model.config)
    assert torch.allclose(first_logits(8), first_logits(length), atol=1e-5)
    assert not torch.allclose(first_logits(8), first_logits(length + 1), atol=1e-2)


@pytest.mark.parametrize("convention", ["wikitext2", "c4"])
def test_less_than_one_window_is_refused_naming_both_flags(convention, tokenizer, tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": "some words of text"}) + "\n" for _ in range(40)))
    name = f"{convention}:{tmp_path}"
    assert [len(d) for d in evaluation_documents(name, tokenizer, 64, 64)] == [64]
    with pytest.raises(ValueError, match=f"--eval_tokens 63: {name} comes in windows of --eval_sequence_length 64"):
        evaluation_documents(name, tokenizer, 63, 64)


# ---- spaces of one candidate, or nearly ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer, text):
    """(model of one block, its sparse database, its quantized database)."""
    folder = tmp_path_factory.mktemp("tiny")
    model = families.save_llama(folder / "model", tokenizer, num_hidden_layers=1)
    build = ["--model_name_or_path", model, *TEXT, text]
    sparsegpt.main(sparsegpt.make_parser().parse_args(
        [*build, "--sparsity", "0.5", "--num_levels", "2", "--weights_diff", "50", "--save_dir", f"{folder}/sparse"]))
    gptq.main(gptq.make_parser().parse_args(
        [*build, "--bitwidth_options", "2", "3", "4", "--calibration_bitwidth", "3", "--save_dir", f"{folder}/quant"]))
    return model, f"{folder}/sparse", f"{folder}/quant"


@pytest.mark.parametrize("more", [["--max_level", "0"], ["--max_level", "0", "--screen", "4"],
                                  ["--max_total_deviation", "1", "--strategy", "comma"]])
def test_sparsity_space_of_one_candidate_ends_with_it(tiny, text, tmp_path, more, capsys):
    summary = evo_unstructured.main(["--model_name_or_path", tiny[0], "--sparse_weights_path", tiny[1], *TEXT, text,
                                     *SEARCH, *more, "--output_dir", str(tmp_path / "run")])
    assert set(summary["levels"].values()) == {0}
    assert "no other candidate meets the budget: nothing to search" in capsys.readouterr().out


@pytest.mark.parametrize("target, level", [("2", 2), ("4", 4)])
def test_bits_all_at_the_bound_end_with_it(tiny, text, tmp_path, target, level):
    summary = evo_quant.main(["--model_name_or_path", tiny[0], "--quant_weights_path", tiny[2], *TEXT, text, *SEARCH,
                              "--target_bitwidth", target, "--output_dir", str(tmp_path / "run")])
    assert set(summary["levels"].values()) == {level}


@settings(max_examples=200)
@given(st.integers(1, 8), st.integers(0, 2**32), st.data())
def test_dropped_numbers_hold_under_any_switches(num_blocks, seed, data):
    entire, paired = data.draw(st.booleans()), num_blocks % 2 == 0 and data.draw(st.booleans())
    arguments = ["--model_name_or_path", "x", "--sparsity", str(data.draw(st.integers(1, 99)) / 100)]
    arguments += ["--drop_entire_block"] * entire + ["--drop_two_consecutive"] * paired
    space = evo_drop.build_space(evo_drop.parse_arguments(arguments), [(3, 5)] * num_blocks)
    rng = random.Random(seed)
    candidate = evo_drop.random_candidate(space, rng)
    assert space.feasible(candidate)
    for _ in range(10):
        child = evo_drop.mutate(space, [candidate], 3, rng)
        assert child is None or space.feasible(child)
        candidate = child or candidate
    if sum(candidate) in (0, len(space.units)):
        assert evo_drop.switch(space, candidate, rng) is None


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8), st.integers(1, 99),
       st.integers(0, 2**32))
def test_dropped_parameters_hold_under_any_switches(sizes, percent, seed):
    arguments = ["--model_name_or_path", "x", "--drop_params", str(percent / 100)]
    space = evo_drop.build_space(evo_drop.parse_arguments(arguments), sizes)
    rng, total = random.Random(seed), sum(map(sum, sizes))
    candidate = next(filter(None, (evo_drop.random_candidate(space, rng) for _ in range(20))), None)
    assume(candidate)
    for _ in range(10):
        dropped = space.dropped_size(candidate)
        assert percent / 100 * total - 1e-6 <= dropped < percent / 100 * total + min(map(min, sizes)) + 1
        candidate = evo_drop.mutate(space, [candidate], 3, rng) or candidate
