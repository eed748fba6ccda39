"""Mixtures of experts: every expert's matrices are layers, from the database to the reloaded export."""
import argparse
import inspect
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import evo_unstructured
import families
import plain_solvers
from database import gptq, sparsegpt
from database.hessian import LEAST_TOKENS
from database.store import Database
from utils.data import calibration_documents
from utils.model import load_decoder, load_tokenizer
from utils.units import Unit, build_units, level_map

BUILDS = {"quant": (gptq, ["--bitwidth_options", "2", "3", "4", "--calibration_bitwidth", "3", "--group_size", "16",
                           "--perchannel"]),
          "sparse": (sparsegpt, ["--sparsity", "0.5", "--num_levels", "2", "--weights_diff", "50"])}
TOKENS, LENGTH = 2048, 64
# family -> (configuration, names of an expert's gate, up and down)
MIXTURES = {"qwen3_moe": (dict(num_experts=4, moe_intermediate_size=48), ("gate_proj", "up_proj", "down_proj")),
            "mixtral": (dict(), ("w1", "w3", "w2")),
            "gpt_oss": (dict(num_local_experts=4, intermediate_size=48, sliding_window=8),
                        ("gate_proj", "up_proj", "down_proj"))}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory, tokenizer):
    """Folder of a small mixture with its tokenizer and some text, and the databases of it by kind."""
    options = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=16, max_position_embeddings=256, num_experts_per_tok=2,
                   experts_implementation=None, tie_word_embeddings=False, pad_token_id=0)
    folder = tmp_path_factory.mktemp(request.param)
    families.build(request.param, **options | MIXTURES[request.param][0]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": inspect.getsource(module)}) + "\n"
                                               for module in (argparse, json, random, shutil)))
    for kind in BUILDS:
        build(kind, folder, folder / kind)
    return folder


def build(kind, model, folder, *flags):
    module, options = BUILDS[kind]
    module.main(module.make_parser().parse_args([
        "--model_name_or_path", str(model), "--calibration_data", f"{model}/text.jsonl", "--calibration_tokens",
        str(TOKENS), "--calibration_sequence_length", str(LENGTH), "--save_dir", str(folder), *options, *flags]))


@torch.no_grad()
def expert_inputs(folder):
    """name -> (weight [out, in], inputs [tokens, in]) of every expert matrix of the first block, from what its experts
    module is given and what its parameters are."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts, given = model.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda module, args, kwargs: given.append((*args, *kwargs.values())),
                                      with_kwargs=True)
    for document in calibration_documents(f"{folder}/text.jsonl", load_tokenizer(folder), TOKENS, LENGTH):
        model(input_ids=document[None], use_cache=False)
    hidden, routed = (torch.cat([call[i].flatten(0, -2) for call in given]) for i in (0, 1))
    gate_name, up_name, down_name = MIXTURES[model.config.model_type][1]
    found = {}
    for expert in range(4):
        x = hidden[(routed == expert).any(-1)]
        fused, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        if model.config.model_type == "gpt_oss":     # [in, out], gate and up take turns, and there are biases
            gate, up, down = fused.T[::2], fused.T[1::2], down.T
            inside = experts._apply_gate(x @ fused + experts.gate_up_proj_bias[expert])
        else:
            gate, up = fused.chunk(2)
            inside = functional.silu(x @ gate.T) * (x @ up.T)
        folder_name = f"model.layers.0.mlp.experts.{expert}"
        found |= {f"{folder_name}.{gate_name}": (gate, x), f"{folder_name}.{up_name}": (up, x),
                  f"{folder_name}.{down_name}": (down, inside)}
    return found


def test_levels_are_those_of_gptq_and_sparsegpt_on_each_experts_own_tokens(mixture):
    quantized, pruned = Database.open(mixture / "quant"), Database.open(mixture / "sparse")
    inputs = expert_inputs(mixture)
    assert set(inputs) == {name for name in quantized.layers if ".layers.0." in name and "experts" in name}
    assert quantized.layers == pruned.layers == list(load_decoder(str(mixture)).layers)
    for name, (weight, x) in list(inputs.items())[3:9]:
        assert len(x) >= LEAST_TOKENS * x.shape[1]
        hessian = x.T.double() @ x.double() / len(x)
        for bits in (2, 4):
            expected, codes = plain_solvers.plain_gptq(weight, hessian, bits, 16)
            assert (quantized.codes(name, bits)[0] == codes).float().mean() > 0.99
            assert quantized.error(name, bits) == pytest.approx(
                plain_solvers.relative_error(weight, expected.float(), hessian.float()), rel=0.02)
        for level in (-2, 1):
            expected, keep = plain_solvers.plain_sparsegpt(weight, hessian, pruned.kept(name, level))
            assert torch.equal(pruned.weight(name, level) != 0, keep)
            assert torch.allclose(pruned.weight(name, level).double(), expected, atol=2e-3)


def test_an_expert_with_few_tokens_is_rounded_to_nearest_and_what_a_database_covers_is_said(mixture, tmp_path, capsys):
    build("quant", mixture, tmp_path / "db", "--calibration_tokens", "96")       # an expert sees about 48, of which it
    database, decoder = Database.open(tmp_path / "db"), load_decoder(str(mixture))       # needs 64 and more
    said, layers = capsys.readouterr().out, decoder.layers
    uncalibrated = [name for name in database.layers if not database.manifest["layers"][name].get("calibrated", True)]
    assert f"{len(uncalibrated)} of {len(layers)} layers saw too few calibration tokens" in said
    assert uncalibrated and all("experts" in name for name in uncalibrated)
    for name in uncalibrated:
        nearest = plain_solvers.round_to_nearest(layers[name].weight, 3, group_size=16)
        assert torch.allclose(database.weight(name, 3).double(), nearest, atol=1e-6)

    covered = sum(layer.weight.numel() for layer in layers.values())
    parameters = {name: parameter.numel() for block in decoder.blocks
                  for name, parameter in block.module.named_parameters(prefix=block.name)}
    others = ("bias", "norm.weight", "gate.weight", "router.weight", "sinks")
    assert covered == sum(size for name, size in parameters.items() if not name.endswith(others))
    assert f"{len(layers)} layers hold {covered / sum(parameters.values()):.2%} of the blocks' weights" in said


@pytest.mark.parametrize("tie, sizes", [("", [1, 4, 4, 4]), ("gate_up", [1, 8, 4]), ("experts", [1, 12]),
                                        ("single_experts", [1] * 13), ("gate_up,single_experts", [1] + [2, 1] * 4),
                                        ("block", [13])])
def test_a_blocks_experts_change_together_unless_they_are_untied(tie, sizes):
    blocks = [[f"layers.{i}.attn.q_proj", *(f"layers.{i}.mlp.experts.{expert}.{role}_proj" for expert in range(4)
                                            for role in ("gate", "up", "down"))] for i in range(2)]
    levels = {name: [2, 3] for names in blocks for name in names}
    units = build_units(blocks, levels, SimpleNamespace(tie=tie, pin=[], bounds=[]))
    assert [len(unit) for unit in units] == 2 * sizes
    assert sorted(name for unit in units for name in unit.names) == sorted(levels)
    rows, kinds = level_map(blocks, {name: 1.0 + (".3.up" in name) for name in levels})
    assert kinds == ["attn.q_proj", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"]
    assert rows == [[1, 1], [1, 1], [1.25, 1.25], [1, 1]]


def test_sparsity_moves_between_experts_and_between_other_layers():
    units = ([Unit((f"attn.{i}",), tuple(range(-2, 3))) for i in range(6)]
             + [Unit(tuple(f"{i}.experts.{expert}.up" for expert in range(100)), (-1, 0, 1)) for i in range(6)])
    space, rng = evo_unstructured.Space(units), random.Random(0)
    for _ in range(50):
        child = evo_unstructured.switch(space, (0,) * 12, rng)
        assert space.feasible(child) and sum(map(abs, child)) == 2
        assert not any(child[:6]) or not any(child[6:])
    # experts alone cannot give what they are to gain: other layers do, where there are enough
    mixed = evo_unstructured.Space([Unit((f"attn.{i}",), (-1, 0, 1)) for i in range(9)]
                                   + [Unit(tuple(f"experts.{expert}.up" for expert in range(3)), (0, 1))])
    children = [evo_unstructured.switch(mixed, (0,) * 10, rng) for _ in range(50)]
    assert any(child[9] for child in children) and all(map(mixed.feasible, children))
