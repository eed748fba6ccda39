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


def outputs(decoder: Decoder, last: int) -> list[torch.Tensor]:
    """What block `last` gives of each document, [tokens, hidden]."""
    found = []
    for document in DOCUMENTS:
        inputs = decoder.block_inputs(document[None])
        hidden_states = inputs.hidden_states
        for index in range(last + 1):
            hidden_states = decoder.run_block(index, hidden_states, inputs)
        found.append(hidden_states[0])
    return found


@pytest.mark.parametrize("family", [*families.FAMILIES, "falcon_h1", "lfm2"])
def test_stand_ins_are_the_least_squares_of_every_channel_where_that_is_nearer_than_zeros(family):
    found = []
    model = families.build(family, **({} if family in families.FAMILIES else FAMILIES[family]))
    decoder = Decoder(model)
    fit_stand_ins(decoder, DOCUMENTS)
    halves = [(block, half) for block in decoder.blocks for half in (block.attn, block.mlp)]
    blocks = [block.module for block in decoder.blocks]
    expected = seen(model, [*blocks, *(module for _, half in halves for module in half.modules)], DOCUMENTS)
    for block, half in halves:
        lines = {}
        for module in half.modules:
            x, y = expected[module]
            slopes, constants = zip(*(np.polyfit(x[:, channel], y[:, channel], 1) for channel in range(x.shape[1]))
                                    ) if x.shape == y.shape else (None, y.mean(0))      # OPT's fc1 and fc2
            lines[module] = slopes and torch.tensor(slopes).float(), torch.tensor(constants).float()
        known, half.stand_ins = half.stand_ins, lines
        errors = []
        for stand_in in (False, True):
            half.drop(True, stand_in)
            errors.append(sum(float((output.double() - whole).square().sum()) for output, whole in zip(
                outputs(decoder, block.index), torch.tensor(expected[block.module][1]).split([*map(len, DOCUMENTS)]))))
            half.drop(False)
        assert bool(known) == (errors[1] < errors[0])
        for module, (scale, shift) in known.items():
            assert torch.allclose(shift, lines[module][1], atol=1e-4)
            assert scale is lines[module][0] or torch.allclose(scale, lines[module][0], atol=1e-4)
        found.append(bool(known))
    assert all(found) if family in ("llama", "opt", "lfm2") else any(found) or family == "gemma2", found


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
