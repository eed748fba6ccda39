"""Mixtures of experts: every expert's matrices are layers, from the database to the reloaded export."""
import argparse
import inspect
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM

import evo_quant
import evo_unstructured
import export
import exports
import families
import finish
import plain_solvers
from database import gptq, sparsegpt
from database.exported import exportable_levels
from database.hessian import LEAST_TOKENS
from database.store import Database
from database.trained import ExpertsWeight
from utils.data import calibration_documents
from utils.experts import ExpertLayer
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


def family(mixture):
    return json.loads((mixture / "config.json").read_text())["model_type"]


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
    database, decoder = Database.open(tmp_path / "db"), load_decoder(str(mixture), device="cpu")  # 64 and more
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


def searched(model, output, kind, *flags):
    """The levels that a search of two generations has found, as it was run by the command line."""
    script = {"quant": evo_quant, "sparse": evo_unstructured}[kind]
    summary = script.main([
        "--model_name_or_path", str(model), f"--{kind}_weights_path", str(model / kind), "--calibration_data",
        f"{model}/text.jsonl", "--calibration_tokens", "512", "--calibration_sequence_length", "64", "--generations",
        "2", "--offspring", "6", "--survivors_per_selection", "2", "1", "--tokens_per_selection", "64", "128",
        "--initially_generated", "4", "--initial_tokens", "64", "--no_eval", "--output_dir", str(output), *flags])
    return summary["levels"]


@torch.no_grad()
def expected_logits(model, levels, database, tokens):
    """Of the model with every level's weights written into its parameters, by their own names."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    gate_name, up_name, _ = MIXTURES[whole.config.model_type][1]
    for name, level in levels.items():
        weight, parts = database.weight(name, level), name.split(".")
        if "experts" not in parts:
            whole.get_submodule(name).weight.copy_(weight)
            continue
        experts, expert = whole.get_submodule(".".join(parts[:-2])), int(parts[-2])
        fused = parts[-1] in (gate_name, up_name)
        matrix = (experts.gate_up_proj if fused else experts.down_proj)[expert]
        if whole.config.model_type == "gpt_oss":
            matrix = matrix.T[("gate_proj", "up_proj").index(parts[-1])::2] if fused else matrix.T
        elif fused:
            matrix = matrix.chunk(2)[(gate_name, up_name).index(parts[-1])]
        matrix.copy_(weight)
    return whole(input_ids=tokens).logits


def test_what_a_search_finds_is_tied_meets_its_budget_and_comes_back_from_every_export(mixture, tmp_path, capsys):
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    database, config = Database.open(mixture / "quant"), tmp_path / "run" / "evo-kl-configuration-3.txt"
    levels = searched(mixture, tmp_path / "run", "quant", "--target_bitwidth", "3")
    weights = {name: math.prod(database.shape(name)) for name in levels}
    assert sum(weights[name] * level for name, level in levels.items()) == 3 * sum(weights.values())
    for role in MIXTURES[family(mixture)][1]:
        for block in range(2):
            assert len({levels[f"model.layers.{block}.mlp.experts.{expert}.{role}"] for expert in range(4)}) == 1
    stored = sum(database.bits(name, level, overhead=True) for name, level in levels.items())
    parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(mixture).parameters())
    bits = (stored + 32 * (parameters - sum(weights.values()))) / parameters
    said = capsys.readouterr().out
    assert f"whole model: {bits:.4f} bits a weight with scales and zeros" in said

    command = ["--model_name_or_path", str(mixture), "--quant_weights_path", str(mixture / "quant"),
               "--quant_config_path", str(config), "--device", "cpu"]
    expected = expected_logits(mixture, levels, database, tokens)
    export.main([*command, "--save_dir", str(tmp_path / "dense"), "--format", "dense"])
    assert torch.equal(exports.reload(tmp_path / "dense", tokens)["logits"], expected)
    if family(mixture) == "gpt_oss":           # whose checkpoints hold experts merged
        assert "transformers reads no quantized experts of GptOssForCausalLM" in said
        with pytest.raises(SystemExit, match="reads no quantized experts of GptOssForCausalLM; use --format dense"):
            export.main([*command, "--save_dir", str(tmp_path / "packed")])
        assert not (tmp_path / "packed").exists()
        return
    export.main([*command, "--save_dir", str(tmp_path / "packed")])
    assert torch.allclose(exports.reload(tmp_path / "packed", tokens)["logits"], expected, atol=1e-5)
    names = safe_open(tmp_path / "packed" / "model.safetensors", "pt").keys()
    role = MIXTURES[family(mixture)][1][1]
    assert [name for name in names if f"experts.3.{role}.weight_packed" in name] and not any(
        "gate_up_proj" in name for name in names)


@pytest.mark.parametrize("mixture", ["gpt_oss"], indirect=True)
def test_a_sparse_search_comes_back_from_its_export(mixture, tmp_path):
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    levels = searched(mixture, tmp_path / "run", "sparse")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["database_sha256"] == Database.open(mixture / "sparse").sha256
    assert sum(levels.values()) == 0 and any(levels.values())
    export.main(["--model_name_or_path", str(mixture), "--sparse_weights_path", str(mixture / "sparse"), "--device",
                 "cpu", "--sparse_config_path", str(tmp_path / "run" / "final_configuration.txt"),
                 "--save_dir", str(tmp_path / "sparse")])
    expected = expected_logits(mixture, levels, Database.open(mixture / "sparse"), tokens)
    assert torch.equal(exports.reload(tmp_path / "sparse", tokens)["logits"], expected)


@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
def test_what_exports_cannot_hold_or_count_is_refused(mixture, tmp_path):
    with pytest.raises(SystemExit, match="--budget_file_gb: a file has all of a mixture's experts in the width of the"):
        searched(mixture, tmp_path / "run", "quant", "--budget_file_gb", "0.1", "--for_format", "compressed-tensors")
    build("quant", mixture, tmp_path / "db", "--quantizable_modules", "self_attn", "--calibration_tokens", "64")
    with pytest.raises(SystemExit, match=r"lacks model\.layers\.0\.mlp\.experts\.0\.gate_proj"):
        export.main(["--model_name_or_path", str(mixture), "--quant_weights_path", str(tmp_path / "db"), "--device",
                     "cpu", "--quant_config_path", "3", "--save_dir", str(tmp_path / "packed")])


@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
def test_levels_of_experts_that_their_one_scheme_cannot_hold_are_not_searched(mixture, tmp_path, capsys):
    build("quant", mixture, tmp_path / "db", "--bitwidth_options", "7", "8", "--calibration_bitwidth", "7",
          "--calibration_tokens", "64")
    levels = exportable_levels(Database.open(tmp_path / "db"), "compressed-tensors")
    assert {name: known for name, known in levels.items() if ".experts." in name} and all(
        known == ([7] if ".experts." in name else [7, 8]) for name, known in levels.items())
    assert "asymmetric integers of 8 bits, which need 9" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"experts\.0\..* has asymmetric integers of 8 bits, which need 9 .*--bounds"):
        export.main(["--model_name_or_path", str(mixture), "--quant_weights_path", str(tmp_path / "db"), "--device",
                     "cpu", "--quant_config_path", "8", "--save_dir", str(tmp_path / "packed")])
    export.main(["--model_name_or_path", str(mixture), "--quant_weights_path", str(tmp_path / "db"), "--device",
                 "cpu", "--quant_config_path", "7", "--save_dir", str(tmp_path / "packed")])


@pytest.mark.parametrize("mixture", ["gpt_oss"], indirect=True)
@torch.no_grad()
def test_finishing_trains_each_experts_matrices_and_keeps_their_format(mixture, tmp_path):
    layers = load_decoder(str(mixture)).layers
    for parameter in {layer.parameter for layer in layers.values() if isinstance(layer, ExpertLayer)}:
        own = {name: layer for name, layer in layers.items() if getattr(layer, "parameter", None) is parameter}
        assert torch.equal(ExpertsWeight(own, {}).value(), parameter)
    finish.main(["--model_name_or_path", str(mixture), "--quant_weights_path", str(mixture / "quant"),
                 "--quant_config_path", "2", "--calibration_data", f"{mixture}/text.jsonl", "--calibration_tokens",
                 "512", "--calibration_sequence_length", "64", "--steps", "30", "--batch_size", "4", "--device", "cpu",
                 "--save_dir", str(tmp_path / "finished")])
    before, after = Database.open(mixture / "quant"), Database.open(tmp_path / "finished")
    assert all(after.levels(name) == [2] and after.codes(name, 2)[0].max() < 4 for name in before.layers)
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    errors = [0.0, 0.0]
    for document in calibration_documents(f"{mixture}/text.jsonl", load_tokenizer(mixture), 512, 64)[:4]:
        dense = model(input_ids=document[None]).logits
        for i, database in enumerate((before, after)):
            logits = expected_logits(mixture, dict.fromkeys(before.layers, 2), database, document[None])
            errors[i] += float((logits - dense).square().sum())
    assert errors[1] < 0.8 * errors[0]
