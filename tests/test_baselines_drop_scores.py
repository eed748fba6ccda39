"""Each depth baseline against its published formula, written out on whole models, one document at a time: no walk."""
import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from baselines import drop_scores
from utils.configs import read_drop_config
from utils.data import calibration_documents
from utils.decoder import Decoder
from utils.fitness import Fitness


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(families.VOCABULARY, (length,), generator=generator) for length in (19, 30, 7, 30)]


@torch.no_grad()
def hidden_states(model, tokens):
    """Inputs of all blocks and the output of the last, [blocks + 1, tokens, hidden], as hooks see them."""
    states, blocks = [], families.blocks_of(model)
    hooks = [block.register_forward_pre_hook(lambda module, args: states.append(args[0][0].double()))
             for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(
        lambda module, args, out: states.append((out if isinstance(out, torch.Tensor) else out[0])[0].double())))
    model(input_ids=tokens[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(states)


def drop_switch(decoder):
    return lambda index, state: decoder.blocks[index].drop(*state)


def whole_blocks(dropped, count=families.NUM_BLOCKS):
    return [(i in dropped, i in dropped) for i in range(count)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "opt"])
def test_scores_across_blocks_are_those_of_shortgpt_gromov_and_weight_subcloning(family, documents):
    model = families.build(family, attn_implementation="eager")
    states = torch.cat([hidden_states(model, tokens) for tokens in documents], dim=1)
    norms = states.norm(dim=-1)
    decoder = Decoder(model)
    for length in (1, 3):
        cosine = (states[:-length] * states[length:]).sum(-1) / norms[:-length] / norms[length:]
        found = drop_scores.scores_across_blocks(decoder, documents, drop_scores.cosine_distance, length)
        assert found == pytest.approx((1 - cosine).mean(-1).tolist(), rel=1e-4)
    added = (states[1:] - states[:-1]).norm(dim=-1)
    found = drop_scores.scores_across_blocks(decoder, documents, drop_scores.norm_ratio)
    assert found == pytest.approx((added / norms[1:]).mean(-1).tolist(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_scores_at_the_end_and_from_the_output_are_those_of_a_model_without_the_block(family, documents):
    """L2 is taken of the last block's output: after the final norm, which rescales, it would be something else."""
    model = families.build(family, attn_implementation="eager")
    whole, whole_logits = [hidden_states(model, d)[-1] for d in documents], families.plain_logits(model, documents)
    l2, normalized, divergence, perplexity = [], [], [], []
    for i in range(families.NUM_BLOCKS):
        without = families.dropped_copy(model, whole_blocks([i]))
        distance = [(hidden_states(without, d)[-1] - h).norm(dim=-1) for d, h in zip(documents, whole)]
        l2.append(torch.cat(distance).mean().item())
        normalized.append(torch.cat([d / h.norm(dim=-1) for d, h in zip(distance, whole)]).mean().item())
        values = families.plain_values(whole_logits, families.plain_logits(without, documents), documents)
        divergence.append(values["kl"])
        perplexity.append(values["ppl"])
    decoder = Decoder(model)
    assert drop_scores.scores_at_the_end(decoder, documents, drop_scores.l2_distance) == pytest.approx(l2, rel=1e-4)
    assert drop_scores.scores_at_the_end(decoder, documents, drop_scores.l2_distance_normalized, 32) == pytest.approx(
        normalized, rel=1e-4)
    fitness = Fitness(decoder, documents, drop_switch(decoder))
    assert drop_scores.scores_from_output(fitness, "kl") == pytest.approx(divergence, rel=1e-4)
    assert drop_scores.scores_from_output(fitness, "ppl") == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_brute_force_finds_the_best_of_all_combinations(count, documents, monkeypatch):
    monkeypatch.setattr(drop_scores, "BATCH", 2)
    model = families.build("llama")
    for layer in (families.blocks_of(model)[0].self_attn.o_proj, families.blocks_of(model)[0].mlp.down_proj):
        layer.weight.data *= 0.01            # harmless to drop, so that the best is not in the last batch
        layer.bias.data *= 0.01
    logits = families.plain_logits(model, documents)
    values = {dropped: families.plain_values(logits, families.plain_logits(
        families.dropped_copy(model, whole_blocks(dropped)), documents), documents)["kl"]
        for dropped in itertools.combinations(range(families.NUM_BLOCKS), count)}
    decoder = Decoder(model)
    value, dropped = drop_scores.brute_force(Fitness(decoder, documents, drop_switch(decoder)), "kl", count)
    assert dropped == min(values, key=values.get) and dropped in list(values)[:-2]
    assert value == pytest.approx(values[dropped], rel=1e-4)


def test_scores_do_not_depend_on_which_were_measured_before(checkpoint, tmp_path):
    def scores(*methods):
        found = drop_scores.main(["--model_name_or_path", checkpoint, "--calibration_data", "stdlib",
                                  "--calibration_tokens", "200", "--calibration_sequence_length", "40", "--sparsities",
                                  "0.2", "0.4", "--scoring_method", *methods, "--save_dir", str(tmp_path)])
        return {method: result["scores"] for method, result in found.items()}

    alone = {method: scores(method)[method] for method in drop_scores.METHODS}
    assert scores(*drop_scores.METHODS, *reversed(drop_scores.METHODS)) == alone
    assert scores(*reversed(drop_scores.METHODS)) == alone


def test_drop_scores_writes_the_blocks_of_lowest_score(checkpoint, tmp_path):
    drop_scores.main(["--model_name_or_path", checkpoint, "--calibration_data", "stdlib", "--calibration_tokens", "200",
                      "--calibration_sequence_length", "40", "--scoring_method", "cosine_similarity",
                      "window_cosine_similarity", "l2", "--sparsities", "0.34", "0.5", "--save_dir", str(tmp_path)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    documents = calibration_documents("stdlib", tokenizer, 200, 40)
    states = torch.cat([hidden_states(model, tokens) for tokens in documents], dim=1)
    for sparsity, count in ((0.34, 2), (0.5, 3)):
        influence = (1 - torch.cosine_similarity(states[:-1], states[1:], dim=-1)).mean(-1)
        expected = whole_blocks(influence.argsort()[:count].tolist(), 6)
        assert read_drop_config(tmp_path / f"cosine_similarity-{sparsity}.txt", 6) == expected
        first = (1 - torch.cosine_similarity(states[:-count], states[count:], dim=-1)).mean(-1).argmin().item()
        expected = whole_blocks(range(first, first + count), 6)
        assert read_drop_config(tmp_path / f"window_cosine_similarity-{sparsity}.txt", 6) == expected
    assert (tmp_path / "l2-0.5.txt").exists()
    assert len(json.loads((tmp_path / "l2.json").read_text())["scores"]["blocks"]) == 6


def test_lowest_keeps_a_block_whose_score_is_not_a_number():
    assert drop_scores.lowest([0.5, math.nan, 0.1, 0.5], 3) == (0, 2, 3)
    assert drop_scores.lowest([0.5, math.nan, 0.1, 0.5], 2) == (0, 2)


@pytest.mark.parametrize("flags, message", [
    (["--sparsities", "1.5"], "--sparsities 1.5: fractions between 0 and 1"),
    (["--sparsities", "0.1"], "--sparsities 0.1: drops none of the 6 blocks; give at least 0.167"),
    (["--calibration_tokens", "1"], "--calibration_tokens 1: must be at least 2"),
    (["--brute_force"], "--brute_force: --scoring_method cosine_similarity only scores single blocks; use kl_div or"),
    (["--brute_force", "--scoring_method", "kl_div", "--sparsities", "0.5", "--brute_force_limit", "19"],
     "--brute_force: --sparsities 0.5 has 20 combinations of 3 of 6 blocks, 2,621,440 tokens; if that is meant, add "
     "--brute_force_limit 20"),
])
def test_drop_scores_refuses_bad_flags_in_one_sentence(flags, message, checkpoint, tmp_path):
    with pytest.raises(SystemExit) as stop:
        drop_scores.main(["--model_name_or_path", checkpoint, "--calibration_data", "stdlib", *flags, "--save_dir",
                          str(tmp_path)])
    assert str(stop.value).startswith(f"error: {message}")
