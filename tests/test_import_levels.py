"""Levels of other tools: whatever format held them, the database has their integers, and their weights to the bit."""
import argparse
import heapq
import importlib.util
import inspect
import json
import math
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import eval_config
import evo_quant
import export
import families
import finish
import plain_solvers
from database import build, gptq, import_levels
from database.exported import exportable_levels, layer_bytes
from database.store import Database
from exports import reload, save_model
from formats import compressed_tensors, gguf
from formats.compressed_tensors import Quantized, Scheme
from formats.gguf import decode, encode
from utils.configs import write_drop_config
from utils.data import calibration_documents
from utils.model import load_config, load_decoder, load_tokenizer

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason=(
    "the gguf package is not installed: pip install -r requirements-gguf.txt"))
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
UP = "model.layers.1.mlp.up_proj"


class Layer(NamedTuple):
    codes: torch.Tensor          # uint8 [out, in]
    scales: torch.Tensor         # [out, groups]
    zeros: torch.Tensor          # [out, groups]
    group: torch.Tensor          # of every column

    @property
    def weight(self) -> torch.Tensor:
        return (self.codes.float() - self.zeros[:, self.group]) * self.scales.float()[:, self.group]


def rounded(weight: torch.Tensor, bits: int, group_size: int, dtype=torch.float16, sym: bool = False) -> Layer:
    """Rounding to nearest, from minimum to maximum of a group."""
    columns = weight.shape[1]
    group = torch.arange(columns) // group_size
    parts = [weight[:, group == g] for g in range(int(group[-1]) + 1)]
    low, high = (torch.stack([pick(part) for part in parts], dim=1) for pick in (
        lambda part: part.amin(1).clamp(max=0), lambda part: part.amax(1).clamp(min=0)))
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / (2**bits - 1)).to(dtype)
    zeros = torch.full_like(low, 2**(bits - 1)) if sym else (-low / scales.float()).round().clamp(1, 2**bits - 1)
    codes = (weight / scales.float()[:, group]).round().add(zeros[:, group]).clamp(0, 2**bits - 1)
    return Layer(codes.to(torch.uint8), scales, zeros, group)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of every row of codes, the first code in the lowest bits: as one long number a row, in bytes."""
    rows = []
    for row in codes.tolist():
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), dtype="<i4"))
    return torch.from_numpy(np.stack(rows))


def write_gptq(folder, model, layers: dict[str, Layer], bits: int, version: int = 2, g_idx: bool = True,
               config: dict | None = None) -> str:
    """A checkpoint as AutoGPTQ (version 1) and GPTQModel (2) lay it out."""
    shutil.copytree(model, folder)
    tensors = load_file(f"{folder}/model.safetensors")
    for name, layer in layers.items():
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = words(layer.codes, bits).T.contiguous()
        tensors[f"{name}.qzeros"] = words(layer.zeros.T - int(version == 1), bits)
        tensors[f"{name}.scales"] = layer.scales.T.contiguous()
        if g_idx:
            tensors[f"{name}.g_idx"] = layer.group.int()
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    described = json.loads(Path(f"{folder}/config.json").read_text())
    described["quantization_config"] = config or {
        "quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": "gptq" + "_v2" * (version == 2)}
    Path(f"{folder}/config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """Folder of a Llama whose layers' sizes are multiples of 32, and some text."""
    folder = families.save_llama(tmp_path_factory.mktemp("model"), tokenizer, **SIZES)
    Path(f"{folder}/text.jsonl").write_text("".join(
        json.dumps({"text": inspect.getsource(module)}) + "\n" for module in (argparse, heapq, json, shutil)))
    return folder


@pytest.fixture(scope="module")
def weights(model):
    """Layer -> weight, of all linear layers of the blocks."""
    return {name: layer.weight.data for name, layer in
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_modules()
            if isinstance(layer, torch.nn.Linear) and ".layers." in name}


@pytest.fixture(scope="module")
def levels(weights):
    """bits -> layer -> how it is rounded; groups and dtypes differ from bitwidth to bitwidth."""
    return {bits: {name: rounded(weight, bits, size or weight.shape[1], dtype) for name, weight in weights.items()}
            for bits, size, dtype in ((2, 32, torch.float16), (3, 40, torch.float16), (4, None, torch.bfloat16),
                                      (8, 16, torch.float32))}


@pytest.fixture(scope="module")
def checkpoints(model, levels, tmp_path_factory):
    """A GPTQ checkpoint of each of `levels`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [write_gptq(folder / f"W{bits}", model, layers, bits, version=1 + bits % 2)
            for bits, layers in levels.items()]


@pytest.fixture(scope="module")
def imported(model, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("databases") / "imported"
    run(model, folder, checkpoints)
    return folder


def run(model, folder, checkpoints, *flags):
    import_levels.main(import_levels.make_parser().parse_args([
        *common(model, folder), *flags, "--checkpoints", *map(str, checkpoints)]))
    return Database.open(folder)


def common(model, folder) -> list[str]:
    return ["--model_name_or_path", str(model), "--save_dir", str(folder), "--calibration_data", f"{model}/text.jsonl",
            "--calibration_tokens", "512", "--calibration_sequence_length", "32"]


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def check_holds(database: Database, bits: int, layers: dict[str, Layer]) -> None:
    assert database.layers == list(layers)
    for name, layer in layers.items():
        codes, scales, zeros = database.codes(name, bits)
        group = torch.arange(codes.shape[1]) // database.group_size(name, bits)
        assert torch.equal(codes, layer.codes) and scales.dtype == layer.scales.dtype
        assert torch.equal(scales[:, group], layer.scales[:, layer.group])
        assert torch.equal(zeros[:, group].float(), layer.zeros[:, layer.group])
        assert torch.equal(database.weight(name, bits), layer.weight)
        assert database.bits(name, bits) == bits * codes.numel()
        stored = 8 * sum(part.nbytes for part in database.packed(name, bits).values())
        assert database.bits(name, bits, overhead=True) == stored


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_gptq_checkpoints_are_taken_over_to_the_bit(imported, levels):
    database = Database.open(imported)
    assert all(database.levels(name) == [2, 3, 4, 8] for name in database.layers)
    for bits, layers in levels.items():
        check_holds(database, bits, layers)
    assert {database.group_size(UP, bits) for bits in levels} == {32, 40, 64, 16}


@pytest.mark.parametrize("version, config", [
    (1, {"quant_method": "gptq", "bits": 2, "group_size": 32}),
    (2, {"quant_method": "auto-round", "bits": 2, "group_size": 32, "packing_format": "auto_round"}),
    (1, {"quant_method": "auto-round", "bits": 2, "group_size": 32, "packing_format": "auto_round:auto_gptq"})])
def test_layouts_without_group_indices_and_auto_rounds_own(model, levels, tmp_path, version, config):
    written = write_gptq(tmp_path / "W2", model, levels[2], 2, version, False, config)
    check_holds(run(model, tmp_path / "db", [written]), 2, levels[2])


def test_autogptqs_configuration_in_a_file_of_its_own(model, levels, tmp_path):
    written = write_gptq(tmp_path / "W3", model, levels[3], 3, 1, True)
    config = json.loads(Path(f"{written}/config.json").read_text())
    Path(f"{written}/quantize_config.json").write_text(json.dumps({"bits": config.pop("quantization_config")["bits"]}))
    Path(f"{written}/config.json").write_text(json.dumps(config))
    check_holds(run(model, tmp_path / "db", [written]), 3, levels[3])


def test_groups_in_another_order_are_put_in_the_columns_order(model, levels, tmp_path):
    shuffled = {}
    for name, layer in levels[2].items():                    # the same layer: its groups only have other numbers
        count = layer.scales.shape[1]
        scales, zeros = (torch.empty_like(t).index_copy_(1, torch.arange(count).flip(0), t)
                         for t in (layer.scales, layer.zeros))
        shuffled[name] = Layer(layer.codes, scales, zeros, count - 1 - layer.group)
        assert torch.equal(shuffled[name].weight, layer.weight)
    written = write_gptq(tmp_path / "W2", model, shuffled, 2)
    check_holds(run(model, tmp_path / "db", [written]), 2, levels[2])


@pytest.mark.parametrize("widths, flags", [
    ([2, 5, 8], ["--group_size", "32"]), ([3, 7], ["--group_size", "16"]), ([4, 6], []), ([2, 4], ["--sym"])])
def test_compressed_tensors_exports_come_back_as_they_were(model, tmp_path, widths, flags):
    gptq.main(gptq.make_parser().parse_args([
        *common(model, tmp_path / "built"), "--perchannel", *flags, "--calibration_bitwidth", str(widths[0]),
        "--bitwidth_options", *map(str, widths)]))
    built = Database.open(tmp_path / "built")
    written = [export_level(model, built.path, bits, tmp_path / f"W{bits}") for bits in widths]
    database = run(model, tmp_path / "db", written)
    assert all(database.levels(name) == widths for name in database.layers)
    for name in built.layers:
        for bits in widths:
            assert database.group_size(name, bits) == built.group_size(name, bits)
            assert all(map(torch.equal, database.codes(name, bits), built.codes(name, bits)))
            assert torch.equal(database.weight(name, bits), built.weight(name, bits))


def export_level(model, database, bits: int, folder, form: str = "compressed-tensors") -> str:
    export.main(["--model_name_or_path", str(model), "--quant_weights_path", str(database), "--quant_config_path",
                 str(bits), "--save_dir", str(folder), "--format", form])
    return str(folder)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, bits", [("Q4_0", 4), ("Q5_0", 5), ("Q8_0", 8)])
def test_decoding_is_the_inverse_of_encoding(kind, bits):
    layer = rounded(torch.randn(6, 96, generator=torch.Generator().manual_seed(bits)), bits, 32, sym=True)
    written = Quantized(layer.codes, layer.scales, layer.zeros.to(torch.uint8), bits, 32)
    found, data = encode(written)
    read = decode(kind, data)
    assert found == kind and read[3:] == written[3:]
    assert all(map(torch.equal, read[:3], written[:3]))


def write_gguf(path, model, kinds) -> str:
    """The model as a GGUF file, its layers quantized by the gguf package; kinds(name of a tensor) -> type."""
    import gguf
    config = AutoModelForCausalLM.from_pretrained(model).config
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in load_file(f"{model}/model.safetensors").items():
        name = gguf_name(name)
        if name is None or tensor.dim() == 1 and "norm" in name:
            writer.add_tensor(name or "output_norm.weight", tensor.numpy())
            continue
        rows = neighbours(tensor, name, config)
        kind = kinds(name) if tensor.dim() == 2 else "F32"
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(rows.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a tensor of the blocks; None for what lies outside them."""
    parts = name.split(".")
    known = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}
    return f"blk.{parts[2]}.{known[parts[-2]]}.{parts[-1]}" if parts[1] == "layers" else {
        "model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}.get(name)


def neighbours(tensor: torch.Tensor, name: str, config) -> torch.Tensor:
    """Rows of q and k as llama.cpp's converter permutes them."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
        name.split(".")[-2] if "blk" in name else None)
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


@needs_gguf
def test_gguf_files_are_taken_over_to_the_bit(model, tmp_path):
    import gguf
    kinds = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
    files = [write_gguf(tmp_path / f"{kind}.gguf", model, lambda name, kind=kind: kind) for kind in kinds.values()]
    database = run(model, tmp_path / "db", files)
    config = AutoModelForCausalLM.from_pretrained(model).config
    for file, bits in zip(files, kinds):
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for name in database.layers:
            tensor = tensors[gguf_name(f"{name}.weight")]
            theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            ours = database.weight(name, bits)
            assert torch.equal(neighbours(ours, tensor.name, config), theirs), name
            assert database.group_size(name, bits) == 32 and database.levels(name) == [4, 5, 8]
    again = run(model, tmp_path / "again", [export_level(model, tmp_path / "db", 4, tmp_path / "out", "gguf")
                                            + "/model.gguf"])
    assert all(torch.equal(again.weight(name, 4), database.weight(name, 4)) for name in database.layers)


def with_minimum(weight: torch.Tensor, bits: int, exact: bool) -> tuple[torch.Tensor, bytes]:
    """(weight, bytes) of a layer in Q4_1 or Q5_1, written number by number; `exact` minima are scale times integer."""
    values, data = torch.empty_like(weight), []
    for row, numbers in enumerate(weight.tolist()):
        for start in range(0, len(numbers), 32):
            block = numbers[start:start + 32]
            scale = 2.0 ** math.ceil(math.log2((max(block) - min(block)) / (2**bits - 1)))
            least = math.floor(min(block) / scale) * scale if exact else float(np.float16(min(block)))
            codes = [max(0, min(2**bits - 1, round((number - least) / scale))) for number in block]
            values[row, start:start + 32] = torch.tensor([scale * code + least for code in codes])
            data += [np.float16([scale, least]).tobytes()]
            if bits == 5:
                data += [sum((code >> 4) << i for i, code in enumerate(codes)).to_bytes(4, "little")]
            data += [bytes((low & 15) | (high & 15) << 4 for low, high in zip(codes[:16], codes[16:]))]
    return values, b"".join(data)


@pytest.mark.parametrize("bits", [4, 5])
def test_minima_that_are_scale_times_an_integer_become_zeros(bits):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    values, data = with_minimum(weight, bits, exact=True)
    layer = decode(f"Q{bits}_1", np.frombuffer(data, dtype=np.uint8).reshape(5, -1))
    group = torch.arange(64) // 32
    assert len(layer.zeros.unique()) > 2 and layer.bits == bits
    assert torch.equal((layer.codes.float() - layer.zeros[:, group]) * layer.scales[:, group], values)


@pytest.mark.parametrize("bits", [4, 5])
def test_other_minima_are_refused(bits):
    _, data = with_minimum(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), bits, exact=False)
    with pytest.raises(ValueError, match=rf"Q{bits}_1 holds scale \* code \+ minimum, and in row 0, block 0 the"):
        decode(f"Q{bits}_1", np.frombuffer(data, dtype=np.uint8).reshape(5, -1))


@needs_gguf
@pytest.mark.parametrize("kinds, sentence", [
    (lambda name: "Q4_1" if name == "blk.1.ffn_up.weight" else "Q4_0",
     f"{UP}: Q4_1, but model.layers.0.self_attn.q_proj has Q4_0; a level is the same in all layers"),
    (lambda name: "F32" if name == "blk.1.ffn_up.weight" else "Q8_0", f"{UP}: of type F32, which is not one of Q4_0"),
    (lambda name: "Q4_1", r"model.layers.0.self_attn.q_proj: Q4_1 holds scale \* code \+ minimum")])
def test_gguf_files_that_are_not_uniform_or_not_integers(model, tmp_path, kinds, sentence):
    file = write_gguf(tmp_path / "W4.gguf", model, kinds)
    with pytest.raises(ValueError, match=f"^--checkpoints {file}: {sentence}"):
        run(model, tmp_path / "db", [file])
    assert not (tmp_path / "db" / "manifest.json").exists()


def test_without_the_gguf_package_it_is_asked_for(model, tmp_path, monkeypatch):
    (tmp_path / "W4.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="--checkpoints .*W4.gguf: the gguf package .*requirements-gguf.txt"):
        run(model, tmp_path / "db", [tmp_path / "W4.gguf"])


# ---- the database ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_errors_are_measured_on_the_uncompressed_models_inputs(model, imported):
    database, whole = Database.open(imported), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layer, inputs = whole.get_submodule(UP), []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for document in calibration_documents(f"{model}/text.jsonl", load_tokenizer(model), 512, 32):
        whole(input_ids=document[None], use_cache=False)
    x = torch.cat(inputs)
    assert len(x) == 512
    for bits in database.levels(UP):
        error = plain_solvers.relative_error(layer.weight, database.weight(UP, bits), x.T @ x)
        assert database.error(UP, bits) == pytest.approx(error, rel=1e-3)
    assert database.error(UP, 2) > database.error(UP, 3) > database.error(UP, 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exported_again_it_has_the_same_codes_and_scales_and_loads_to_the_bit(model, imported, levels, tmp_path, bits):
    out = export_level(model, imported, bits, tmp_path / "out")
    assert load_file(f"{out}/model.safetensors")[f"{UP}.weight_scale"].dtype == levels[bits][UP].scales.dtype
    check_holds(run(model, tmp_path / "again", [out]), bits, levels[bits])
    loaded = reload(out, torch.randint(3, 90, (2, 8)))
    for name, layer in levels[bits].items():
        assert torch.equal(loaded[f"weight {name}.weight"], layer.weight), name


def test_a_model_that_is_quantized_already_is_refused_where_its_weights_are_needed(model, imported, text, tmp_path):
    packed = export_level(model, imported, 4, tmp_path / "packed")
    write_drop_config(tmp_path / "drop.txt", [(False, True), *[(False, False)] * (load_config(packed).num_hidden_layers
                                                                                 - 1)])
    own = ["--model_name_or_path", packed, "--save_dir", str(tmp_path / "out")]
    calibration = ["--calibration_data", text, "--calibration_tokens", "64", "--calibration_sequence_length", "32"]
    drop = ["--drop_config", str(tmp_path / "drop.txt")]
    for run_program in (lambda: export.main([*own, *drop]), lambda: finish.main([*own, *drop, *calibration,
                                                                                  "--batch_size", "2"]),
                        lambda: gptq.main(gptq.make_parser().parse_args([*own, *calibration]))):
        with pytest.raises((SystemExit, ValueError), match="quantized already .compressed-tensors., and stay so; give"):
            run_program()


def test_sizes_are_promised_by_what_each_level_is(model, tmp_path):
    """Not by a flag: an imported database has none that says that its zeros are in the middle, or wider scales."""
    weight = {name: layer.weight.data for name, layer in load_decoder(model, device="cpu").layers.items()}
    made = {bits: {name: rounded(value, bits, 32, dtype, sym=sym) for name, value in weight.items()}
            for bits, dtype, sym in ((4, torch.float16, True), (8, torch.float16, True), (3, torch.float32, False))}
    imported = run(model, tmp_path / "db", [write_gptq(tmp_path / f"W{bits}", model, layers, bits, version=2)
                                            for bits, layers in made.items()])
    for bits in made:
        pack = Quantized(*imported.codes(UP, bits), bits, imported.group_size(UP, bits))
        packed = compressed_tensors.pack(UP, pack, Scheme(bits, pack.symmetric, 32))
        assert layer_bytes(imported, UP, bits, "compressed-tensors") == sum(part.nbytes for part in packed.values())
        kind, data = encode(pack)
        if kind == "F32":
            with pytest.raises(ValueError, match=f"{UP} has scales that float16 cannot hold"):
                layer_bytes(imported, UP, bits, "gguf")
        else:
            assert layer_bytes(imported, UP, bits, "gguf") == gguf.padded(data.nbytes)
    assert exportable_levels(imported, "gguf")[UP] == [4, 8]
    finish.main(["--model_name_or_path", model, "--quant_weights_path", str(imported.path), "--quant_config_path", "3",
                 "--calibration_data", f"{model}/text.jsonl", "--calibration_tokens", "128",
                 "--calibration_sequence_length", "32", "--batch_size", "2", "--steps", "1", "--save_dir",
                 str(tmp_path / "finished")])
    finished = Database.open(tmp_path / "finished")
    assert finished.scales(UP, 3) == (torch.float16, True) and exportable_levels(finished, "gguf")[UP] == [3]


def test_scales_that_loading_rounds_are_said_and_those_that_gguf_cannot_hold_written_as_f32(
        model, checkpoints, tmp_path, capsys):
    half, imported = tmp_path / "half", tmp_path / "imported"
    shutil.copytree(model, half)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(half)
    run(half, imported, checkpoints)                 # other weights than the ones they were rounded from
    export_level(half, imported, 4, tmp_path / "exact")
    assert "rounds them" not in capsys.readouterr().out
    export_level(half, imported, 8, tmp_path / "rounded")
    assert "Scales are float32, and loading in bfloat16" in capsys.readouterr().out
    layer = rounded(torch.randn(4, 64), 4, 32, torch.bfloat16, sym=True)
    written = Quantized(layer.codes, layer.scales, layer.zeros.to(torch.uint8), 4, 32)
    assert torch.equal(decode("Q4_0", encode(written)[1]).scales.float(), layer.scales.float())
    assert encode(written._replace(scales=layer.scales * 1e-9)) == ("F32", "scales that float16 cannot hold")


def test_a_search_and_an_evaluation_run_on_it(model, imported, weights, levels, text, tmp_path):
    shutil.copytree(imported, tmp_path / "db")               # which gets a copy of the configuration
    summary = evo_quant.main([
        "--model_name_or_path", model, "--quant_weights_path", str(tmp_path / "db"), "--target_bitwidth", "3",
        "--count_overhead", "--calibration_data", text, "--calibration_tokens", "512", "--calibration_sequence_length",
        "64", "--generations", "1", "--offspring", "4", "--survivors_per_selection", "2", "1", "--tokens_per_selection",
        "128", "256", "--initially_generated", "2", "--initial_tokens", "128", "--eval_datasets", text, "--output_dir",
        str(tmp_path / "run")])
    database, found = Database.open(imported), summary["levels"]
    assert len(set(found.values())) > 1
    size = sum(weight.numel() for weight in weights.values())
    assert sum(database.bits(name, bits, overhead=True) for name, bits in found.items()) <= 3 * size
    mixed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, bits in found.items():
        mixed.get_submodule(name).weight.data.copy_(levels[bits][name].weight)
    plain = save_model(tmp_path / "mixed", mixed, load_tokenizer(model))
    expected = eval_config.main(["--model_name_or_path", plain, "--eval_datasets", text])["dense"][text]["ppl"]
    assert summary["evaluation"]["search"][text]["ppl"] == pytest.approx(expected, rel=1e-6)
    [configuration] = (tmp_path / "run").glob("evo-*.txt")
    flags = ["--model_name_or_path", model, "--quant_config_path", str(configuration), "--quant_weights_path"]
    finish.main([*flags, str(imported), "--calibration_data", text, "--calibration_tokens", "128",
                 "--calibration_sequence_length", "32", "--batch_size", "2", "--steps", "1", "--save_dir",
                 str(tmp_path / "finished")])
    for folder, own in ((imported, True), (tmp_path / "finished", False)):       # whose quality was measured
        export.main([*flags, str(folder), "--format", "dense", "--save_dir", str(tmp_path / f"out-{own}")])
        card = (tmp_path / f"out-{own}" / "README.md").read_text()
        assert ("Not measured" in card) != own and (f"{expected:,.2f}" in card) == own


def test_finished_it_counts_the_scales_that_are_stored_then(model, imported, text, tmp_path):
    """In half precision, whatever they were imported in: at 8 bits float32, at 4 bfloat16."""
    for bits, spared in ((8, 16), (4, 0)):
        finish.main(["--model_name_or_path", model, "--quant_weights_path", str(imported), "--quant_config_path",
                     str(bits), "--calibration_data", text, "--calibration_tokens", "128",
                     "--calibration_sequence_length", "32", "--batch_size", "2", "--steps", "1", "--save_dir",
                     str(tmp_path / str(bits))])
        before, after = Database.open(imported), Database.open(tmp_path / str(bits))
        for name in after.layers:
            stored = after.packed(name, bits)
            overhead = after.bits(name, bits, overhead=True) - after.bits(name, bits)
            assert overhead == 8 * (stored["scales"].nbytes + stored["zeros"].nbytes)
            assert before.bits(name, bits, overhead=True) - after.bits(name, bits, overhead=True) == (
                spared * stored["scales"].numel())


# ---- killed and resumed ----------------------------------------------------------------------------------------------


def test_killed_and_resumed_it_is_the_same_and_other_checkpoints_are_refused(
        model, imported, checkpoints, levels, tmp_path, monkeypatch, capsys):
    read = import_levels.read_levels

    def dying(checkpoints, name, *args):
        if name == UP:
            raise KeyboardInterrupt
        return read(checkpoints, name, *args)

    monkeypatch.setattr(import_levels, "read_levels", dying)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "db", checkpoints)
    monkeypatch.undo()
    half = contents(tmp_path / "db")
    other = write_gptq(tmp_path / "W2", model, {name: layer._replace(codes=layer.codes ^ 1)
                                               for name, layer in levels[2].items()}, 2, version=1)
    with pytest.raises(ValueError, match=r"--save_dir .*differs in --checkpoints \['W2 \(gptq, sha256"):
        run(model, tmp_path / "db", [other, *checkpoints[1:]])
    assert contents(tmp_path / "db") == half
    run(model, tmp_path / "db", checkpoints[::-1])                       # in any order
    assert "block 1/2: already built" in capsys.readouterr().out
    assert contents(tmp_path / "db") == contents(imported)
    monkeypatch.setattr(build, "decoder_of", lambda *args: pytest.fail("loaded the model"))
    run(model, tmp_path / "db", checkpoints)


# ---- refusals --------------------------------------------------------------------------------------------------------


def edited(checkpoint: str, folder, edit) -> str:
    """A copy of a checkpoint after edit(tensors)."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(f"{folder}/model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/model.safetensors",
              metadata={"format": "pt"})
    return str(folder)


def drop_layer(tensors):
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{UP}.{part}"]


def dequantize_layer(tensors):
    drop_layer(tensors)
    tensors[f"{UP}.weight"] = torch.zeros(96, 64)


def widen_layer(tensors):
    for part, dim in (("qweight", 0), ("qzeros", 1)):
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"].repeat_interleave(2, dim)


def scatter_groups(tensors):
    tensors[f"{UP}.g_idx"] = torch.arange(64, dtype=torch.int32) % 2


def shorten_layer(tensors):
    tensors[f"{UP}.qweight"] = tensors[f"{UP}.qweight"][:, :64]


def spoil_scales(tensors):
    tensors[f"{UP}.scales"][0, 0] = torch.inf


def store_a_zero_of_zero(tensors):
    tensors[f"{UP}.qzeros"][0, 0] |= 3


def scale_a_norm(tensors):
    tensors["model.layers.1.post_attention_layernorm.weight"] *= 1.1


@pytest.mark.parametrize("edit, sentence", [
    (drop_layer, f"{UP}: no qweight of it"), (dequantize_layer, f"{UP}: not quantized"),
    (widen_layer, f"{UP}: 4 bits, but model.layers.0.self_attn.q_proj has 2 bits; a level is the same in all layers"),
    (scatter_groups, f"{UP}: its groups are of columns that are not neighbours"),
    (shorten_layer, rf"{UP}: \[64, 64\], but \[96, 64\] in the model; give a checkpoint of this model"),
    (spoil_scales, f"{UP}: NaN or infinite scales"),
    (store_a_zero_of_zero, f"{UP}: a zero is stored as 3, .*write it again as gptq_v2"),
    (scale_a_norm, "model.layers.1.post_attention_layernorm.weight: not the model's own")])
def test_layers_that_are_not_as_they_should_be_are_named_before_anything_is_written(
        model, levels, tmp_path, edit, sentence):
    written = edited(write_gptq(tmp_path / "whole", model, levels[2], 2, version=1), tmp_path / "W2", edit)
    with pytest.raises(ValueError, match=f"^--checkpoints {written}: {sentence}"):
        run(model, tmp_path / "db", [written])
    assert not (tmp_path / "db" / "manifest.json").exists()


def test_a_layer_can_be_left_out(model, checkpoints, tmp_path):
    written = edited(checkpoints[0], tmp_path / "W2", dequantize_layer)
    database = run(model, tmp_path / "db", [written], "--quantizable_modules", r".*(?<!layers\.1\.mlp\.up)_proj$")
    assert len(database.layers) == 13 and UP not in database.layers


def test_weights_of_another_model_are_refused(model, weights, tmp_path):
    generator = torch.Generator().manual_seed(9)
    others = {name: rounded(torch.randn(weight.shape, generator=generator), 4, 32) for name, weight in weights.items()}
    written = write_gptq(tmp_path / "W4", model, others, 4)
    with pytest.raises(ValueError, match=f"^model.layers.0.self_attn.q_proj: --checkpoints {written}: its weights are "
                                         f"nothing like the model's"):
        run(model, tmp_path / "db", [written])


def test_two_checkpoints_of_equal_bits_are_refused(model, checkpoints, levels, tmp_path):
    with pytest.raises(ValueError, match=f"^--checkpoints {checkpoints[0]}: given twice"):
        run(model, tmp_path / "db", [checkpoints[0], checkpoints[0]])
    other = write_gptq(tmp_path / "other", model, levels[2], 2)
    with pytest.raises(ValueError, match=f"^--checkpoints {checkpoints[0]} {other}: both have 2 bits, "):
        run(model, tmp_path / "db", [checkpoints[0], other])


def test_compressed_tensors_words_of_before_0_18_are_refused(model, imported, tmp_path):
    def pad(tensors):                                        # ten 3-bit codes a word
        tensors[f"{UP}.weight_packed"] = torch.zeros(96, 7, dtype=torch.int32)

    written = edited(export_level(model, imported, 3, tmp_path / "out"), tmp_path / "W3", pad)
    with pytest.raises(ValueError, match=rf"^--checkpoints {written}: {UP}: weight_packed \[96, 7\] does not hold "
                                         rf"\[96, 64\] codes of 3 bits as .* since 0.18"):
        run(model, tmp_path / "db", [written])


@pytest.mark.parametrize("config, sentence", [
    (None, r"not in a format that is read here \(no quantization_config in config.json\)"),
    ({"quant_method": "awq", "bits": 4}, "not in a format that is read here .quant_method awq"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "not in a format .*checkpoint_format marlin"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "not in a .*format nvfp4"),
    ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "not in a .* auto_round:auto_awq")])
def test_formats_that_are_not_read_are_named(model, tmp_path, monkeypatch, config, sentence):
    monkeypatch.setattr(build, "decoder_of", lambda *args: pytest.fail("loaded the model"))
    shutil.copytree(model, tmp_path / "W4")
    described = json.loads((tmp_path / "W4" / "config.json").read_text())
    if config:
        (tmp_path / "W4" / "config.json").write_text(json.dumps(described | {"quantization_config": config}))
    with pytest.raises(ValueError, match=f"^--checkpoints {tmp_path}/W4: {sentence}"):
        run(model, tmp_path / "db", [tmp_path / "W4"])


def test_folders_and_files_that_cannot_be_read_are_named(model, checkpoints, tmp_path):
    with pytest.raises(ValueError, match=f"^--checkpoints {tmp_path}/nowhere: not a folder"):
        run(model, tmp_path / "db", [tmp_path / "nowhere"])
    shutil.copytree(checkpoints[0], tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"^--checkpoints {tmp_path}/cut: model.safetensors cannot be read"):
        run(model, tmp_path / "db", [tmp_path / "cut"])
    file.unlink()
    with pytest.raises(ValueError, match=f"^--checkpoints {tmp_path}/cut: has no safetensors files"):
        run(model, tmp_path / "db", [tmp_path / "cut"])
