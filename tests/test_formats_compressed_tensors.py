"""Quantized exports: compressed-tensors and plain transformers read the database's integers and weights to the bit."""
import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

import export
import families
from database import packing
from database.store import Database
from exports import greedy, random_quantized, reload, save_model, write_database, write_levels
from formats.compressed_tensors import Quantized, Scheme, choose_schemes, pack, quantization_config, unevenly_packed
from utils.configs import read_level_config, write_drop_config

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3"]
BITS = [2, 3, 4, 5, 6, 7, 8]
TOKENS = torch.randint(3, families.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
DROPPED = [(False, True), (True, False), (True, True), (True, False)]


def export_quantized(tmp_path: Path, model_folder: str, database: str, config: str, *flags: str) -> tuple[Path, dict]:
    out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    report = export.main(["--model_name_or_path", model_folder, "--quant_weights_path", database, "--quant_config_path",
                          config, "--save_dir", str(out), *flags])
    return out, report


def searched_weights(database: str, config: str) -> dict[str, torch.Tensor]:
    opened = Database.open(database)
    levels = dict.fromkeys(opened.layers, int(config)) if config.isdigit() else read_level_config(config)
    return {name: opened.weight(name, level) for name, level in levels.items()}


def searched_model(model, weights: dict[str, torch.Tensor]):
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tokenizer):
    """A Llama, its folder, a database with every bitwidth in ragged groups, and a configuration that uses them all."""
    tmp_path = tmp_path_factory.mktemp("mixed")
    model = families.build("llama")
    folder = save_model(tmp_path / "m", model, tokenizer)
    database = write_database(tmp_path / "db", folder, "gptq", BITS, group_size=20)
    return model, folder, database, write_levels(tmp_path / "levels.txt", database, lambda number, name: 2 + number % 7)


@pytest.mark.parametrize("family, group_size, sym", [
    ("llama", 20, False), ("qwen2", 16, False), ("qwen3", None, False), ("gemma2", 16, True), ("phi3", 32, False),
    ("gpt_neox", 16, False)])
def test_reloaded_model_is_the_searched_one(tmp_path, tokenizer, family, group_size, sym):
    model = families.build(family)
    folder = save_model(tmp_path / "m", model, tokenizer)
    database = write_database(tmp_path / "db", folder, "gptq", BITS, group_size, sym)
    config = write_levels(tmp_path / "levels.txt", database, lambda number, name: 2 + number % 7)
    out, _ = export_quantized(tmp_path, folder, database, config)
    weights = searched_weights(database, config)
    loaded = reload(out, TOKENS)
    for name, weight in weights.items():
        assert torch.equal(loaded[f"weight {name}.weight"], weight), name
    searched = searched_model(model, weights)
    with torch.no_grad():
        assert (loaded["logits"] - searched(TOKENS).logits).abs().max() <= 1e-5
    expected = greedy(searched, TOKENS[:1, :8])
    assert torch.equal(loaded["cached"], expected) and torch.equal(loaded["uncached"], expected)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("out, columns, group_size", [(32, 64, 32), (33, 50, 7), (5, 31, 8), (7, 130, 128), (3, 9, 9)])
def test_compressed_tensors_reads_back_the_databases_codes(bits, sym, out, columns, group_size):
    packed = random_quantized(torch.zeros(out, columns), bits, group_size, sym, torch.Generator().manual_seed(bits))
    codes, scales, zeros = packing.unpack_codes(packed, (out, columns), bits)
    layer = Quantized(codes, scales, zeros, bits, group_size)
    scheme = choose_schemes({"layer": layer}, promote=False)["layer"]
    assert scheme.bits == bits and scheme.symmetric == sym
    tensors = {name.removeprefix("layer."): tensor for name, tensor in pack("layer", layer, scheme).items()}
    read = unpack_from_int32(tensors["weight_packed"], bits, torch.Size(tensors["weight_shape"].tolist()))
    assert torch.equal(read.short() + 2**(bits - 1), codes.short())
    config = quantization_config({"layer": scheme}, [])["config_groups"]["group_0"]
    theirs = QuantizationScheme(targets=["layer"], weights=QuantizationArgs(**config["weights"]))
    tensors["weight_scale"] = tensors["weight_scale"].float()                # as a float32 model holds them
    weight = PackedQuantizationCompressor.decompress(tensors, theirs)["weight"]
    assert torch.equal(weight, packing.dequantize(codes, scales, zeros, group_size))


def test_codes_in_the_file_are_the_databases(tmp_path, mixed):
    _, folder, path, config = mixed
    out, _ = export_quantized(tmp_path, folder, path, config)
    database, tensors = Database.open(path), load_file(out / "model.safetensors")
    for name, bits in read_level_config(config).items():
        codes, _, zeros = database.codes(name, bits)
        read = unpack_from_int32(tensors[f"{name}.weight_packed"], bits, codes.shape)
        assert torch.equal(read.short() + 2**(bits - 1), codes.short())
        assert f"{name}.weight" not in tensors and tensors[f"{name}.weight_scale"].dtype == torch.float16
        groups = tensors[f"{name}.weight_scale"].shape[1]
        read = unpack_from_int32(tensors[f"{name}.weight_zero_point"], bits, (len(codes), groups), packed_dim=0)
        columns = torch.arange(groups) * (codes.shape[1] // groups)       # the file's groups divide the database's
        assert torch.equal(read.short() + 2**(bits - 1), zeros[:, columns // database.group_size(name, bits)].short())


def test_promotion_changes_no_weight_and_makes_vllms_rule_hold(tmp_path, mixed, capsys):
    _, folder, database, config = mixed
    _, before = export_quantized(tmp_path, folder, database, config)
    assert "does not hold" in capsys.readouterr().out and not before["vllm_fused_rule"]
    out, report = export_quantized(tmp_path, folder, database, config, "--fuse", "promote")
    assert "holds" in capsys.readouterr().out and report["vllm_fused_rule"]
    loaded = reload(out, TOKENS)
    for name, weight in searched_weights(database, config).items():
        assert torch.equal(loaded[f"weight {name}.weight"], weight), name
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    bits = {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}
    levels = read_level_config(config)
    for block in range(families.NUM_BLOCKS):
        for names in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            names = [f"model.layers.{block}.{name}" for name in names]
            assert {bits[name] for name in names} == {max(levels[name] for name in names)}
    assert report["bits_a_weight"]["codes"] == before["bits_a_weight"]["codes"]
    assert report["bits_a_weight"]["stored"] > before["bits_a_weight"]["stored"]


def test_layers_are_packed_in_the_widths_that_a_runtime_takes(tmp_path, mixed, capsys):
    _, folder, database, config = mixed
    levels = read_level_config(config)
    _, before = export_quantized(tmp_path, folder, database, config)
    out, report = export_quantized(tmp_path, folder, database, config, "--pack_bits", "8", "4")
    loaded = reload(out, TOKENS)
    for name, weight in searched_weights(database, config).items():
        assert torch.equal(loaded[f"weight {name}.weight"], weight), name
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]} == {
        name: 4 if bits <= 4 else 8 for name, bits in levels.items()}
    assert report["bits_a_weight"]["codes"] == before["bits_a_weight"]["codes"]
    assert report["bits_a_weight"]["stored"] > before["bits_a_weight"]["stored"]
    for flags, expected in ((["4"], "--pack_bits 4: none holds a layer of 5 bits"),
                            (["4", "9"], "--pack_bits 9: the format packs 2 to 8 bits"),
                            (["4", "--format", "dense"], "--pack_bits 4: is for --format compressed-tensors")):
        with pytest.raises(SystemExit, match=re.escape(expected)):
            export_quantized(tmp_path, folder, database, config, "--pack_bits", *flags)


def test_symmetric_and_asymmetric_members_fuse_to_asymmetric():
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, bits, sym in (("a.q_proj", 3, True), ("a.k_proj", 3, False), ("a.v_proj", 2, True),
                            ("a.gate_proj", 4, True), ("a.up_proj", 6, True), ("a.o_proj", 2, True)):
        packed = random_quantized(torch.zeros(32, 32), bits, 16, sym, generator)
        layers[name] = Quantized(*packing.unpack_codes(packed, (32, 32), bits), bits, 16)
    schemes = choose_schemes(layers, promote=True)
    assert {schemes[f"a.{name}"] for name in ("q_proj", "k_proj", "v_proj")} == {Scheme(3, False, 16)}
    assert {schemes[f"a.{name}"] for name in ("gate_proj", "up_proj")} == {Scheme(6, True, 16)}
    assert schemes["a.o_proj"] == Scheme(2, True, 16)
    for name, layer in layers.items():
        tensors = {part.removeprefix(f"{name}."): tensor for part, tensor in pack(name, layer, schemes[name]).items()}
        group = quantization_config({name: schemes[name]}, [])["config_groups"]["group_0"]
        theirs = QuantizationScheme(targets=[name], weights=QuantizationArgs(**group["weights"]))
        tensors["weight_scale"] = tensors["weight_scale"].float()
        assert torch.equal(PackedQuantizationCompressor.decompress(tensors, theirs)["weight"],
                           packing.dequantize(layer.codes, layer.scales, layer.zeros, 16)), name


def test_a_fused_layer_quantized_in_part_breaks_the_rule():
    layer = Quantized(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32, 1).half(),
                      torch.zeros(32, 1, dtype=torch.uint8), 4, 32)
    schemes = choose_schemes({"a.q_proj": layer, "a.k_proj": layer}, promote=True)
    assert unevenly_packed(["a.q_proj", "a.k_proj"], schemes) == []
    assert unevenly_packed(["a.q_proj", "a.k_proj", "a.v_proj"], schemes) == [["a.q_proj", "a.k_proj", "a.v_proj"]]


@pytest.mark.parametrize("form", ["compressed-tensors", "dense"])
def test_dropped_and_quantized_together(tmp_path, tokenizer, mixed, form):
    _, folder, database, config = mixed
    write_drop_config(tmp_path / "drop.txt", DROPPED)
    out, report = export_quantized(tmp_path, folder, database, config, "--drop_config", str(tmp_path / "drop.txt"),
                                   "--format", form, *(["--fuse", "promote"] if form != "dense" else []))
    quantized = searched_model(families.build("llama"), searched_weights(database, config))
    searched = families.dropped_copy(quantized, DROPPED)
    loaded = reload(out, TOKENS)
    with torch.no_grad():
        assert (loaded["logits"] - searched(TOKENS).logits).abs().max() <= (1e-5 if form != "dense" else 0)
    expected = greedy(searched, TOKENS[:1, :8])
    assert torch.equal(loaded["cached"], expected) and torch.equal(loaded["uncached"], expected)
    assert report["blocks"]["exported"] == 2                 # attention 0 with MLP 1; MLP 3 beside a zero attention
    if form == "compressed-tensors":
        assert report["vllm_fused_rule"]
        packed = load_file(out / "model.safetensors")["model.layers.1.self_attn.q_proj.weight_packed"]
        assert packed.shape == (32, 2)                       # the zeros are of 2 bits: 32 codes in two words


def test_level_instead_of_a_file_and_sizes_from_what_was_written(tmp_path, tokenizer):
    folder = save_model(tmp_path / "m", families.build("llama"), tokenizer)
    database = write_database(tmp_path / "db", folder, "gptq", [3], 16, layers=lambda name: "mlp" in name)
    out, report = export_quantized(tmp_path, folder, database, "3")
    tensors = load_file(out / "model.safetensors")
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if ".weight_" in name)
    weights = 4 * 3 * 32 * 48
    assert report["bits_a_weight"] == {"codes": 3.0, "stored": 8 * stored / weights}
    assert "model.layers.0.self_attn.q_proj.weight" in tensors           # not in the database: as it was
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"] and "model.layers.0.self_attn.q_proj" in config["ignore"]
    loaded = reload(out, TOKENS)
    for name, weight in searched_weights(database, "3").items():
        assert torch.equal(loaded[f"weight {name}.weight"], weight)


def test_bfloat16_export_says_what_rounds_and_is_exact_in_float32(tmp_path, tokenizer, capsys):
    model = families.build("qwen3", dtype=torch.bfloat16, tie_word_embeddings=True)
    folder = save_model(tmp_path / "m", model, tokenizer)
    database = write_database(tmp_path / "db", folder, "gptq", [4], 16)
    out, _ = export_quantized(tmp_path, folder, database, "4")
    assert "loading in bfloat16" in capsys.readouterr().out
    assert "loading in bfloat16" in (out / "README.md").read_text()
    loaded = reload(out, TOKENS, dtype="float32")
    for name, weight in searched_weights(database, "4").items():
        assert torch.equal(loaded[f"weight {name}.weight"], weight)
