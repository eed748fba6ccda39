"""Blocks, their attention and MLP are found by structure in every family; what cannot be taken apart is refused."""
import pytest
import torch
from torch import nn

import families
from families import ATTENTIONS, FAMILIES, MLPS, NUM_BLOCKS, VOCABULARY
from utils.decoder import Decoder

TOKENS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
STATES = [(True, False), (False, True), (True, True), (False, False)]


@torch.no_grad()
def logits(model, tokens=TOKENS) -> torch.Tensor:
    return model(input_ids=tokens).logits


# ---- structure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_the_modules_the_family_calls_so(family):
    model = families.build(family)
    decoder = Decoder(model)
    assert [block.module for block in decoder.blocks] == list(families.blocks_of(model))
    for index, block in enumerate(decoder.blocks):
        children = dict(block.module.named_children())
        assert block.index == index and model.get_submodule(block.name) is block.module
        assert block.attn.modules == [child for name, child in children.items() if name in ATTENTIONS]
        assert block.mlp.modules == [child for name, child in children.items() if name in MLPS]
        for sub_block in (block.attn, block.mlp):
            assert sub_block.size == sum(p.numel() for module in sub_block.modules for p in module.parameters()) > 0
        assert {name: layer for name, layer in block.layers.items() if isinstance(layer, nn.Module)} == {
            f"{block.name}.{name}": layer for name, layer in block.module.named_modules()
            if isinstance(layer, nn.Linear)}
    assert list(decoder.layers) == [name for block in decoder.blocks for name in block.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_equals_zeroed_parameters_and_can_be_undone(family):
    model = families.build(family)
    before, expected = logits(model), logits(families.dropped_copy(model, STATES))
    decoder = Decoder(model)
    assert torch.equal(logits(model), before), "taking the model apart changed it"
    for block, state in zip(decoder.blocks, STATES):
        block.drop(*state)
        block.drop(*state)                                               # twice is the same as once
        assert block.dropped == state
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert (expected - before).abs().max() > 0.1
    for block in decoder.blocks:
        block.drop(False, False)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "opt", "gpt_neox"])
@torch.no_grad()
def test_dropped_model_gives_the_same_with_a_cache(family):
    model = families.build(family)
    for block, state in zip(Decoder(model).blocks, STATES):
        block.drop(*state)                                               # the first attention among them
    whole = logits(model)
    first = model(input_ids=TOKENS[:, :15], use_cache=True)
    second = model(input_ids=TOKENS[:, 15:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_packed_only_where_that_is_exact(family):
    decoder = Decoder(families.build(family))
    assert decoder.packed_rows == (0 if family in ("opt", "falcon") else 1_000_000)
    if decoder.packed_rows:
        first, second = TOKENS[:1, :10], TOKENS[:1, 10:]
        restarting = torch.cat([torch.arange(10), torch.arange(14)])[None]
        packed = decoder._last_hidden_states(TOKENS[:1], restarting)
        alone = torch.cat([decoder._last_hidden_states(part) for part in (first, second)], dim=1)
        assert torch.allclose(packed, alone, atol=1e-4)
        joined = decoder._last_hidden_states(TOKENS[:1])
        assert (joined - alone)[:, 10:].abs().max() > 0.01            # unpacked, the second document sees the first


def test_packing_is_not_used_by_a_family_that_ignores_restarting_positions(monkeypatch):
    """A model whose positions do not keep documents apart is noticed, whatever its family."""
    model = families.build("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs))
    assert Decoder(model).packed_rows == 0


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "gpt_neox"])
def test_blocks_run_one_by_one_give_the_models_logits(family):
    model = families.build(family)
    expected = logits(model)
    decoder = Decoder(model)
    inputs = decoder.block_inputs(TOKENS)
    hidden_states = inputs.hidden_states
    for index in range(NUM_BLOCKS):
        hidden_states = decoder.run_block(index, hidden_states, inputs)
    assert torch.allclose(decoder.logits(hidden_states), expected, atol=1e-5)


def test_block_that_is_not_the_identity_without_its_sub_blocks_is_still_run(monkeypatch):
    model = families.build("llama")
    block = model.model.layers[0]
    forward = type(block).forward
    monkeypatch.setattr(type(block), "forward", lambda self, *args, **kwargs: 1.5 * forward(self, *args, **kwargs))
    decoder = Decoder(model)
    assert not decoder.identity_when_dropped
    inputs = decoder.block_inputs(TOKENS)
    decoder.blocks[0].drop(True, True)
    assert torch.allclose(decoder.run_block(0, inputs.hidden_states, inputs), 1.5 * inputs.hidden_states)


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_rwkv_is_refused_naming_the_block_and_what_was_found_in_it():
    model = families.build("rwkv", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"rwkv\.blocks\.0 \(RwkvBlock\): .*found attention, feed_forward"):
        Decoder(model)


def test_bloom_is_refused_because_its_sub_blocks_add_the_residual():
    model = families.build("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match=r"transformer\.h\.0 \(BloomBlock\): self_attention, mlp adds the residual"):
        Decoder(model)


def test_model_without_a_list_of_blocks_is_refused_naming_its_class():
    class NoBlocks(nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="NoBlocks: no decoder blocks found; expected get_decoder"):
        Decoder(NoBlocks())


def test_model_whose_blocks_pass_on_more_than_hidden_states_is_refused(monkeypatch):
    model = families.build("llama")
    counter = iter(range(10**6))
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda states: forward(states) + 100 * next(counter))
    with pytest.raises(ValueError, match="LlamaForCausalLM: running its 4 blocks one by one does not give"):
        Decoder(model)
