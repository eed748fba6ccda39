"""The walk gives what running every candidate's whole model on every document alone gives, and runs no block twice."""
import math
import random
from collections import Counter
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

import families
from baselines.drop_scores import cosine_distance, scores_across_blocks
from families import FAMILIES, NUM_BLOCKS, VOCABULARY
from utils.decoder import Decoder
from utils.fitness import Fitness, assemble, microbatches
from utils.losses import log_probabilities

LENGTHS = [37, 2, 19, 23, 37, 3, 14, 30, 2]
MINIBATCH = [(7, 30), (1, 2), (4, 37), (3, 23), (0, 37), (6, 14), (5, 3), (8, 2), (2, 11)]      # the last one trimmed
MICROBATCH_TOKENS = 80                                                 # two rows of the longest document
NOTHING = ((False, False),) * NUM_BLOCKS
SINGLE_DROPS = [tuple((block == i and half == 0, block == i and half == 1) for block in range(NUM_BLOCKS))
                for i in range(NUM_BLOCKS) for half in (0, 1)]


def documents(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def random_candidates(count: int, seed: int = 0, num_blocks: int = NUM_BLOCKS) -> list:
    rng = random.Random(seed)
    return [tuple((rng.random() < 0.4, rng.random() < 0.4) for _ in range(num_blocks)) for _ in range(count)]


def drop(decoder: Decoder):
    """set_block of evo_drop.py."""
    return lambda index, state: decoder.blocks[index].drop(*(state or (False, False)))


def walk(model, texts, **options) -> Fitness:
    decoder = Decoder(deepcopy(model))
    return Fitness(decoder, texts, drop(decoder), **{"microbatch_tokens": MICROBATCH_TOKENS, **options})


def plain(model, candidates, texts, topk: int = 10) -> list[dict[str, float]]:
    teacher = families.plain_logits(model, texts)
    return [families.plain_values(teacher, families.plain_logits(families.dropped_copy(model, candidate), texts), texts,
                                  topk) for candidate in candidates]


def prefixes(candidates) -> set:
    """The candidates' trie: every distinct prefix is one run of one block."""
    return {candidate[:length] for candidate in candidates for length in range(1, len(candidate) + 1)}


def count_executions(decoder: Decoder) -> list[int]:
    """[index of the block] at every real execution, seen by a hook on the block's first norm: it runs whether or not
    sub-blocks are dropped, and does not when a block is only passed through."""
    executed: list[int] = []
    for block in decoder.blocks:
        norm = next(child for name, child in block.module.named_children() if "norm" in name or "ln" in name)
        norm.register_forward_hook(lambda *_, index=block.index: executed.append(index))
    return executed


# ---- equal to the plain way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_influence_is_the_baselines_block_influence_on_all_documents(family):
    model, texts = families.build(family), documents()
    plain_scores = scores_across_blocks(Decoder(deepcopy(model)), texts, cosine_distance, microbatch_tokens=10)
    for tokens in (MICROBATCH_TOKENS, 1000):
        assert walk(model, texts, microbatch_tokens=tokens).influence == pytest.approx(plain_scores, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_equals_every_document_alone_through_every_full_model(family):
    model = families.build(family)
    candidates = SINGLE_DROPS + random_candidates(3)
    texts = documents()
    expected = plain(model, candidates, [texts[i][:length] for i, length in MINIBATCH])
    fitness = walk(model, texts)
    measured = fitness.measure(candidates, MINIBATCH, ("kl", "ppl", "sparse_kl"))
    assert len(microbatches(MINIBATCH, MICROBATCH_TOKENS, fitness.decoder.packed_rows)) > 2
    for candidate, plainly, (kl, ppl, sparse_kl) in zip(candidates, expected, measured):
        assert plainly["kl"] > 0.01 or not any(map(any, candidate)), "costs too little to mean much"
        assert abs(kl - plainly["kl"]) <= 1e-5 * plainly["kl"] + 1e-7
        assert abs(sparse_kl - plainly["sparse_kl"]) <= 1e-5 * plainly["sparse_kl"] + 1e-7
        assert ppl == pytest.approx(plainly["ppl"], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_equals_the_plain_way_to_eight_digits_in_float64(family):
    model = families.build(family, dtype=torch.float64)
    candidates = random_candidates(3, seed=1)
    texts = documents()
    measured = walk(model, texts).measure(candidates, MINIBATCH, ("kl", "ppl", "sparse_kl"))
    for plainly, values in zip(plain(model, candidates, [texts[i][:length] for i, length in MINIBATCH]), measured):
        assert values == pytest.approx([plainly[kind] for kind in ("kl", "ppl", "sparse_kl")], rel=1e-8, abs=0)


def test_default_minibatch_is_every_document_whole_and_order_does_not_matter():
    model, texts, candidates = families.build("llama", dtype=torch.float64), documents(), random_candidates(4)
    expected = [values["kl"] for values in plain(model, candidates, texts)]
    fitness = walk(model, texts)
    assert [value for value, in fitness.measure(candidates)] == pytest.approx(expected, rel=1e-8)
    assert [value for value, in fitness.measure(candidates[::-1])] == pytest.approx(expected[::-1], rel=1e-8)


def test_uncompressed_model_has_divergence_zero_and_its_own_perplexity():
    model, texts = families.build("llama"), documents()
    (kl, ppl), = walk(model, texts).measure([NOTHING], kinds=("kl", "ppl"))
    assert abs(kl) < 1e-6
    assert ppl == pytest.approx(plain(model, [NOTHING], texts)[0]["ppl"], rel=1e-5)


@pytest.mark.parametrize("topk", [1, 3, VOCABULARY + 5])
def test_sparse_kl_follows_its_number_of_logits(topk):
    model, texts, candidates = families.build("llama", dtype=torch.float64), documents(), random_candidates(2)
    measured = walk(model, texts, kl_topk=topk).measure(candidates, kinds=("sparse_kl",))
    expected = plain(model, candidates, texts, topk=min(topk, VOCABULARY))
    assert [v for v, in measured] == pytest.approx([e["sparse_kl"] for e in expected], rel=1e-8, abs=1e-12)


def test_perplexity_of_a_long_document_never_has_all_its_logits_in_memory(monkeypatch):
    texts, sizes = documents((60, 37, 2)), []
    fitness = walk(families.build("llama"), texts)
    whole = [torch.cat([log_p for log_p, _ in fitness._teacher_distributions([[(i, len(tokens))]], ("ppl",))])
             for i, tokens in enumerate(texts)]
    loss = sum(F.nll_loss(log_p, tokens[1:], reduction="none").double().sum() for log_p, tokens in zip(whole, texts))
    monkeypatch.setattr(fitness, "_chunk_tokens", lambda: 8)
    monkeypatch.setattr(F, "nll_loss", lambda log_p, *args, nll_loss=F.nll_loss, **options: (
        sizes.append(len(log_p)), nll_loss(log_p, *args, **options))[1])
    assert fitness.teacher_perplexity() == pytest.approx(math.exp(loss / (59 + 36 + 1)), rel=1e-6)
    assert max(sizes) == 8 and sum(sizes) == 59 + 36 + 1


def test_perplexity_needs_no_teacher():
    model, texts, candidates = families.build("llama"), documents(), random_candidates(2)
    fitness = walk(model, texts, teacher=False)
    assert fitness.teacher == []
    measured = fitness.measure(candidates, kinds=("ppl",))
    assert [v for v, in measured] == pytest.approx([e["ppl"] for e in plain(model, candidates, texts)], rel=1e-5)


@pytest.mark.parametrize("microbatch_tokens", [1, 50, 100_000])
def test_microbatch_size_does_not_change_fitness(microbatch_tokens):
    model, texts, candidates = families.build("llama", dtype=torch.float64), documents(), random_candidates(3)
    expected = [values["kl"] for values in plain(model, candidates, texts)]
    measured = walk(model, texts, microbatch_tokens=microbatch_tokens).measure(candidates)
    assert [v for v, in measured] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_chunks_of_logits_do_not_change_fitness(family, monkeypatch):
    model, texts, candidates = families.build(family, dtype=torch.float64), documents(), random_candidates(3)
    expected = [(values["kl"], values["ppl"]) for values in plain(model, candidates, texts)]
    for chunk in (7, 10_000):                                          # many chunks; one longer than OPT's positions
        monkeypatch.setattr(Fitness, "_chunk_tokens", lambda self: chunk)
        measured = walk(model, texts, microbatch_tokens=10_000).measure(candidates, kinds=("kl", "ppl"))
        for values, plainly in zip(measured, expected):
            assert values == pytest.approx(plainly, rel=1e-8)


def test_divergence_of_a_half_precision_model_is_summed_in_float32():
    model, texts = families.build("llama").to(torch.bfloat16), documents()
    fitness = walk(model, texts)
    hidden = torch.cat([states[:-1] for states in fitness.teacher])
    assert hidden.dtype == torch.bfloat16
    assert log_probabilities(fitness._logits(hidden)).dtype == torch.float32
    for (kl,), plainly in zip(fitness.measure(SINGLE_DROPS), plain(model, SINGLE_DROPS, texts)):
        assert kl == pytest.approx(plainly["kl"], rel=0.05)               # packed attention rounds differently in bf16


@pytest.mark.parametrize("family, window", [("mistral", dict(sliding_window=None)),
                                            ("gemma2", dict(layer_types=["full_attention"] * NUM_BLOCKS)),
                                            ("gemma3", dict(layer_types=["full_attention"] * NUM_BLOCKS))])
def test_sliding_windows_bite(family, window):
    """The windows of these test models are shorter than the documents: without them the result is another one."""
    texts, candidates = documents(), random_candidates(2)
    sliding, full = (walk(families.build(family, **options), texts).measure(candidates) for options in ({}, window))
    assert all(abs(a - b) > 1e-3 * b for (a,), (b,) in zip(sliding, full))


# ---- the work done ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_distinct_prefix_is_run_once(family):
    fitness = walk(families.build(family), documents())
    candidates = random_candidates(24) + SINGLE_DROPS[:3] + SINGLE_DROPS[:1]                # one of them twice
    executed = count_executions(fitness.decoder)
    fitness.blocks_run = 0
    fitness.measure(candidates, MINIBATCH)
    batches = len(microbatches(MINIBATCH, MICROBATCH_TOKENS, fitness.decoder.packed_rows))
    trie = prefixes(candidates)
    assert len(trie) < 0.7 * len(candidates) * NUM_BLOCKS                          # there is something to share
    assert fitness.blocks_run == batches * len(trie)
    really_run = [len(prefix) - 1 for prefix in trie if prefix[-1] != (True, True)]  # a block with nothing in it is not
    assert len(really_run) < len(trie)
    assert Counter(executed) == {index: batches * count for index, count in Counter(really_run).items()}


def test_blocks_are_switched_only_where_a_candidate_differs():
    model, texts = families.build("llama"), documents([12, 12])
    decoder, switched = Decoder(model), []

    def set_block(index, state):
        switched.append((index, state))
        drop(decoder)(index, state)

    fitness = Fitness(decoder, texts, set_block)
    changed = SINGLE_DROPS[-1]                                            # differs from NOTHING in its last block
    fitness.measure([NOTHING, changed])
    assert switched == [*enumerate(NOTHING), (NUM_BLOCKS - 1, changed[-1])]
    switched.clear()
    fitness.measure([changed])
    assert switched == []


# ---- candidates that break -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_candidate_that_is_not_finite_has_infinite_fitness_and_spoils_no_other(poison):
    model, texts = families.build("llama"), documents()
    decoder = Decoder(model)
    weight = decoder.blocks[2].module.mlp.down_proj.weight
    loaded = weight.clone()

    def set_block(index, state):
        if index == 2:
            weight.copy_(loaded * (poison if state == 1 else 0.5 if state == 2 else 1))

    fitness = Fitness(decoder, texts, set_block)
    fine, broken, alone = (0, 0, 2, 0), (0, 0, 1, 0), (0, 0, 0, 0)
    kinds = ("kl", "ppl", "sparse_kl")
    values = fitness.measure([fine, broken, alone, broken], kinds=kinds)
    assert values[1] == values[3] == (math.inf,) * 3
    assert values[0] == fitness.measure([fine], kinds=kinds)[0]
    assert all(map(math.isfinite, values[0] + values[2]))


# ---- microbatches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed_rows", [0, 1, 1_000_000])
def test_microbatches_hold_every_document_once_without_padding(packed_rows):
    minibatch = MINIBATCH + [(9, 20), (10, 17)]                        # packs into several rows of 37 tokens
    batches = microbatches(minibatch, MICROBATCH_TOKENS, packed_rows)
    assert sorted(pair for batch in batches for row in batch for pair in row) == sorted(minibatch)
    for batch in batches:
        lengths = {sum(length for _, length in row) for row in batch}
        assert len(lengths) == 1
        assert len(batch) == 1 or len(batch) * lengths.pop() <= MICROBATCH_TOKENS
        assert max(map(len, batch)) == 1 or len(batch) <= packed_rows
    packed = [len(batch) for batch in batches if any(len(row) > 1 for row in batch)]
    assert max(packed, default=0) == min(packed_rows, 2)
    assert any(len(batch) > 1 for batch in batches)


def test_assembled_positions_restart_and_no_document_predicts_the_next():
    texts = documents()
    rows = [[(0, 37)], [(7, 30), (1, 2), (5, 3), (8, 2)]]
    input_ids, position_ids, predicting = assemble(texts, rows)
    assert input_ids.shape == position_ids.shape == (2, 37)
    assert position_ids[1].tolist() == [*range(30), 0, 1, 0, 1, 2, 0, 1]
    assert predicting.tolist() == [*range(36), *range(37, 66), 67, 69, 70, 72]
    targets = input_ids.flatten()[predicting + 1]
    assert targets.tolist() == torch.cat([texts[i][1:length] for row in rows for i, length in row]).tolist()
    assert assemble(texts, [[(0, 37)], [(4, 37)]])[1] is None                  # one document a row: the model's own
