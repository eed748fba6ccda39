"""What stands in for dropped sub-blocks in a search for a model that will be finished."""
import json

import numpy as np
import pytest
import torch
from torch import nn

import evo_drop
import families
from benchmarks.families import FAMILIES
from test_evo_drop import BASE, EVALUATED, Killed, command, files, kill_at  # noqa: F401 (a fixture)
from utils.configs import read_drop_config
from utils.data import calibration_documents
from utils.decoder import Decoder
from utils.fitness import Fitness
from utils.measurements import Measurements
from utils.model import load_decoder, load_tokenizer
from utils.stand_ins import fit_stand_ins

DOCUMENTS = [torch.randint(3, families.VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
             for length in (24, 17, 24, 9)]


def seen(model, modules: list[nn.Module], documents) -> dict[nn.Module, tuple[np.ndarray, np.ndarray]]:
    """module -> (inputs, outputs), [tokens, channels], of the whole model's own forward."""
    kept = {module: ([], []) for module in modules}

    def keep(module, args, kwargs, output):
        for found, tensor in zip(kept[module], (args[0] if args else kwargs["hidden_states"],
                                                output if isinstance(output, torch.Tensor) else output[0])):
            found.append(tensor.reshape(-1, tensor.shape[-1]).double().numpy())

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    with torch.no_grad():
        for document in documents:
            model(input_ids=document[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {module: tuple(map(np.concatenate, found)) for module, found in kept.items()}


@pytest.mark.parametrize("family", [*families.FAMILIES, "falcon_h1", "lfm2"])
def test_stand_ins_are_the_least_squares_of_every_channel(family):
    model = families.build(family, **({} if family in families.FAMILIES else FAMILIES[family]))
    decoder = Decoder(model)
    fit_stand_ins(decoder, DOCUMENTS)
    halves = [half for block in decoder.blocks for half in (block.attn, block.mlp)]
    expected = seen(model, [module for half in halves for module in half.modules], DOCUMENTS)
    for half in halves:
        assert set(half.stand_ins) == set(half.modules)
        for module, (scale, shift) in half.stand_ins.items():
            x, y = expected[module]
            if x.shape != y.shape:                                       # OPT's fc1 and fc2
                assert scale is None and np.allclose(shift, y.mean(0), atol=1e-5)
                continue
            lines = [np.polyfit(x[:, channel], y[:, channel], 1) for channel in range(x.shape[1])]
            assert np.allclose(scale, [slope for slope, _ in lines], atol=1e-4)
            assert np.allclose(shift, [constant for _, constant in lines], atol=1e-4)


def test_only_the_first_documents_are_run():
    model = families.build("llama")
    fits = []
    for documents, num_tokens in ((DOCUMENTS, 30), (DOCUMENTS[:2], 10_000), (DOCUMENTS, 10_000)):
        decoder = Decoder(model)
        fit_stand_ins(decoder, documents, num_tokens)
        fits.append(decoder.blocks[1].mlp.stand_ins[decoder.blocks[1].mlp.modules[0]])
    assert all(torch.equal(a, b) for a, b in zip(*fits[:2])) and not torch.equal(fits[0][0], fits[2][0])


@torch.no_grad()
def test_dropped_module_returns_its_stand_in_or_zeros_and_comes_back():
    model = families.build("llama")
    decoder = Decoder(model)
    fit_stand_ins(decoder, DOCUMENTS)
    block, hidden_states = decoder.blocks[1], torch.randn(2, 5, 32)
    own = block.mlp.modules[0](hidden_states)
    scale, shift = block.mlp.stand_ins[block.mlp.modules[0]]
    expected = {(False, False): own, (False, True): own, (True, False): torch.zeros_like(own),
                (True, True): scale * hidden_states + shift}
    for state in [(True, True), (True, False), (True, True), (False, True), (True, False), (False, False)]:
        block.mlp.drop(*state)
        assert torch.allclose(block.mlp.modules[0](hidden_states), expected[state], atol=1e-6), state
    inputs = decoder.block_inputs(DOCUMENTS[0][None])
    block.drop(True, True)
    assert decoder.identity_when_dropped and decoder.run_block(1, inputs.hidden_states, inputs) is inputs.hidden_states
    block.drop(True, True, True)
    assert not torch.allclose(decoder.run_block(1, inputs.hidden_states, inputs), inputs.hidden_states, atol=1e-2)


def test_search_ranks_with_stand_ins_and_evaluates_without(command, checkpoint, text, tmp_path):  # noqa: F811
    plain = evo_drop.main(command("plain", **EVALUATED))
    summary = evo_drop.main(command("stood-in", for_finishing=True, save_dir=tmp_path / "model", **EVALUATED))
    assert summary["fitness"] != plain["fitness"]
    assert summary["evaluation"]["dense"] == plain["evaluation"]["dense"]
    winner = read_drop_config(tmp_path / "stood-in" / "layer_drop_config.txt")
    again = evo_drop.main(command("saved", model_name_or_path=tmp_path / "model", generations=0, **EVALUATED))
    saved, found = again["evaluation"]["dense"][text], summary["evaluation"]["search"][text]
    assert saved["ppl"] == pytest.approx(found["ppl"], rel=1e-5)         # what is saved has zeros, as evaluated
    assert found["kl"] > 1e-3
    *_, last = map(json.loads, (tmp_path / "stood-in" / "log.jsonl").read_text().splitlines())
    assert last["evaluation"] == summary["evaluation"]["search"]

    decoder = load_decoder(str(checkpoint), device="cpu")
    documents = calibration_documents(text, load_tokenizer(str(checkpoint)), BASE["calibration_tokens"],
                                      BASE["calibration_sequence_length"], 0)
    fit_stand_ins(decoder, documents)
    fitness = Fitness(decoder, documents, lambda i, state: decoder.blocks[i].drop(*state))
    (zeros,), (stood_in,) = fitness.measure([winner, [(*state, True) for state in winner]])
    assert stood_in < zeros


@pytest.mark.parametrize("call", [2, 5])
def test_killed_and_resumed_with_stand_ins_gives_the_same_files(call, command, tmp_path, monkeypatch):  # noqa: F811
    options = dict(for_finishing=True, init="measured", refine=1, screen=2)
    evo_drop.main(command("whole", **options))
    with monkeypatch.context() as patch:
        kill_at(patch, Measurements, "measure", call)
        with pytest.raises(Killed):
            evo_drop.main(command("killed", **options))
    evo_drop.main(command("killed", **options))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
