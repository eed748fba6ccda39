"""Packed documents that attend each by itself give what every document alone gives, and need no mask."""
from copy import deepcopy

import pytest
import torch

import families
from families import FAMILIES
from test_fitness import MINIBATCH, documents, drop, plain, random_candidates
from utils import attention
from utils.decoder import Decoder
from utils.fitness import Fitness, assemble, microbatches

WINDOWS = {"mistral", "qwen2", "gemma2", "gemma3"}                       # and what sdpa is not the attention of, or
MASKED = WINDOWS | {"falcon"}                                            # whose blocks take no further arguments


@pytest.fixture(autouse=True)
def transformers_own_sdpa_afterwards():
    interface = attention.ALL_ATTENTION_FUNCTIONS
    before = interface["sdpa"]
    yield
    interface.register("sdpa", before)


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_equals_every_document_alone(family):
    model, texts, candidates = families.build(family), documents(), random_candidates(4)
    decoder = Decoder(deepcopy(model), by_document=True)
    assert decoder.by_document == (family not in MASKED)
    fitness = Fitness(decoder, texts, drop(decoder), microbatch_tokens=120)
    measured = fitness.measure(candidates, MINIBATCH, ("kl", "ppl"))
    for (kl, ppl), plainly in zip(measured, plain(model, candidates, [texts[i][:n] for i, n in MINIBATCH])):
        assert abs(kl - plainly["kl"]) <= 1e-5 * plainly["kl"] + 1e-7
        assert ppl == pytest.approx(plainly["ppl"], rel=1e-5)


def test_rows_are_filled_up_to_a_microbatch():
    batches = microbatches(MINIBATCH, 120, 1_000_000, by_document=True)
    assert all(len(rows) == 1 for rows in batches)                       # 159 tokens in all
    assert sorted(sum(n for _, n in rows[0]) for rows in batches) == [39, 120]
    assert sorted(pair for rows in batches for row in rows for pair in row) == sorted(MINIBATCH)
    longer = microbatches(MINIBATCH, 30, 1_000_000, by_document=True)
    assert max(sum(n for _, n in row) for rows in longer for row in rows) == 37      # the longest document


@pytest.mark.parametrize("by_document, shape", [(True, (1, 1, 1, 1)), (False, (2, 1, 37, 37))])
def test_no_mask_of_tokens_squared_is_made(by_document, shape):
    decoder = Decoder(families.build("llama"), by_document=by_document)
    input_ids, position_ids, _ = assemble(documents(), [[(0, 37)], [(7, 30), (1, 2), (5, 3), (8, 2)]])
    inputs = decoder.block_inputs(input_ids, position_ids)
    assert all(arguments["attention_mask"].shape == shape for _, arguments in inputs.calls)
    alone = decoder.block_inputs(input_ids).calls[0][1]                  # one document a row: as transformers has it
    assert alone["attention_mask"] is None and "document_lengths" not in alone


def test_the_head_asks_for_no_mask():
    for family in FAMILIES:
        decoder = Decoder(families.build(family))
        hidden_states = torch.randn(1, 5, 32)
        logits = decoder.logits(hidden_states)
        decoder._unmasked, unmasked = {}, decoder._unmasked
        assert torch.equal(decoder.logits(hidden_states), logits) and (unmasked or family == "falcon"), family


def test_the_kernel_for_all_documents_is_given_their_bounds(monkeypatch):
    """With a stand-in for torch's kernel, which needs a GPU."""
    def varlen(query, key, value, cumulative, longest, scaling):
        assert cumulative.dtype == torch.int32 and longest == max(cumulative.diff())
        assert query.shape[1] == 2 * key.shape[1] and len(query) == cumulative[-1]
        calls.append(len(cumulative) - 1)
        return attention.by_document(query, key, value, cumulative.diff().tolist(), scaling)

    calls, texts, candidates = [], documents(), random_candidates(4)
    decoder = Decoder(families.build("llama"), by_document=True)
    fitness = Fitness(decoder, texts, drop(decoder), microbatch_tokens=120)
    expected = fitness.measure(candidates, MINIBATCH)
    monkeypatch.setattr(attention, "has_varlen", lambda device, dtype: True)
    monkeypatch.setattr(attention, "_varlen", varlen)
    assert fitness.measure(candidates, MINIBATCH) == expected and max(calls) > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [64, 128])
def test_torchs_kernel_agrees(size):
    assert attention.has_varlen(torch.device("cuda"), torch.bfloat16)
    lengths = [700, 1, 90]
    query, key, value = (torch.randn(791, heads, size, dtype=torch.bfloat16, device="cuda") for heads in (8, 2, 2))
    bounds = attention.bounds(torch.cat([torch.arange(n) for n in lengths])[None], query.device)
    found = attention._varlen(query, key, value, bounds["cu_seq_lens_q"], bounds["max_length_q"], size**-0.5)
    torch.testing.assert_close(found, attention.by_document(query, key, value, lengths, size**-0.5), atol=2e-2, rtol=0)


def test_a_row_of_several_documents_is_made_smaller_where_memory_runs_out(monkeypatch, capsys):
    texts, candidates = documents(), random_candidates(3)
    decoder = Decoder(families.build("llama"), by_document=True)
    fitness = Fitness(decoder, texts, drop(decoder), microbatch_tokens=160)
    expected = fitness.measure(candidates, MINIBATCH)
    run_block = Decoder.run_block

    def limited(self, index, hidden_states, inputs):
        if hidden_states.shape[1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_block(self, index, hidden_states, inputs)

    monkeypatch.setattr(Decoder, "run_block", limited)
    torch.testing.assert_close(torch.tensor(fitness.measure(candidates, MINIBATCH)), torch.tensor(expected))
    assert fitness.sizes == [160, 40] and capsys.readouterr().out.count("out of memory") == 2
