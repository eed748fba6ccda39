"""A depth-pruned model regrouped into fewer blocks computes what it computed before, in every family."""
import random
from copy import deepcopy

import pytest
import torch

import families
from exports import MIXED_TYPES, six_blocks
from formats.regroup import pair_up, regroup
from utils.decoder import Decoder


def test_kept_sub_blocks_stay_in_order_and_blocks_are_fewest():
    rng = random.Random(0)
    fewer = 0
    for _ in range(300):
        dropped = [(rng.random() < 0.4, rng.random() < 0.4) for _ in range(rng.randint(1, 12))]
        kept = [(index, half) for index, state in enumerate(dropped) for half in (0, 1) if not state[half]]
        pairs = pair_up(dropped)
        assert [(pair[half], half) for pair in pairs for half in (0, 1) if pair[half] is not None] == kept
        reference = sum(not all(state) for state in dropped)         # blocks that zeroing leaves, whole ones removed
        assert len(pairs) <= max(reference, 1)
        fewer += len(pairs) < reference
        # two neighbours that could share a block would be one too many
        assert not any(attn is not None and mlp is None and attn2 is None for (attn, mlp), (attn2, _) in
                       zip(pairs, pairs[1:]))
    assert fewer > 100


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_random_configurations_regroup_in_every_family(family):
    decoder = Decoder(six_blocks(family) if family not in ("gpt2", "falcon") else families.build(family))
    tokens = torch.randint(families.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
    rng = random.Random(family)
    for _ in range(3):
        dropped = [(rng.random() < 0.4, rng.random() < 0.4) for _ in decoder.blocks]
        for block, state in zip(decoder.blocks, dropped):
            block.drop(*state)
        regrouped = regroup(decoder, dropped)
        with torch.no_grad():
            assert torch.equal(regrouped.model(input_ids=tokens).logits, decoder.model(input_ids=tokens).logits)
        if family not in ("gpt_neox", "falcon"):
            assert regrouped.pairs == pair_up(dropped)


def test_blocks_of_unlike_kinds_follow_their_halves():
    """Block 1 has a plain MLP, the others experts: the index in mlp_only_layers moves with the MLP."""
    decoder = Decoder(families.build("qwen2_moe"))
    dropped = [(False, True), (True, False), (False, False), (True, True)]
    for block, state in zip(decoder.blocks, dropped):
        block.drop(*state)
    regrouped = regroup(decoder, dropped)
    assert regrouped.pairs == [(0, 1), (2, 2)] and regrouped.model.config.mlp_only_layers == [0]


def test_windows_longer_than_any_probe_follow_the_attention():
    """With a window of 4096 no short text shows which attention slides; the settings do."""
    decoder = Decoder(six_blocks("gemma2", sliding_window=4096, max_position_embeddings=8192))
    dropped = [(True, True), *[(False, False)] * 5]
    decoder.blocks[0].drop(True, True)
    model = regroup(decoder, dropped).model
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [None, None, 4096, None, 4096]


def test_a_config_that_cannot_follow_keeps_all_blocks(monkeypatch):
    """No text shorter than the window shows that the wrong attentions slide, yet it is not taken for the same model."""
    def unfollowed(config, pairs, num_blocks):
        config = deepcopy(config)
        config.layer_types, config.num_hidden_layers = config.layer_types[:len(pairs)], len(pairs)
        return config

    monkeypatch.setattr("formats.regroup.follow", unfollowed)
    decoder = Decoder(six_blocks("gemma2", sliding_window=4096, max_position_embeddings=8192))
    decoder.blocks[0].drop(True, True)
    regrouped = regroup(decoder, [(True, True), *[(False, False)] * 5])
    assert len(regrouped.pairs) == 6 and regrouped.model.config.layer_types == MIXED_TYPES
