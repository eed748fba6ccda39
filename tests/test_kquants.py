"""K-quants: bytes as GGUF has them, codes as a plain sweep gives them, and the searched mixture in llama.cpp.

What reads files with others' code needs the packages of requirements-gguf.txt, and says so where it is skipped.
"""
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import evo_quant
import export
import families
import finish
from baselines import dp
from database import gptq, import_levels, kquant
from database.exported import layer_bytes
from database.solver import inverse_factor
from database.store import Database
from exports import save_model
from formats.kquants import TYPES, block_bytes, decode, dequantize, encode, fitting, grids, level_of
from test_formats_gguf import differences, needs_gguf, needs_llama_cpp, rounded
from utils.configs import read_level_config, write_level_config

BLOCKS = [kind for kind in TYPES if kind != "F16"]
BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5, "Q4_0": 4.5, "Q5_0": 5.5,
        "Q5_1": 6}
LARGE, SMALL = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"], ["Q4_0", "Q5_0", "Q5_1", "Q8_0"]


# ---- bytes -----------------------------------------------------------------------------------------------------------


@needs_gguf
@pytest.mark.parametrize("kind", BLOCKS)
def test_bytes_are_decoded_as_the_gguf_package_does_to_the_bit(kind):
    import gguf
    number = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[number] == (TYPES[kind].block, block_bytes(kind))
    assert level_of(kind) == BITS[kind]
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (5, 3 * block_bytes(kind)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, number)
    found = dequantize(kind, torch.from_numpy(data)).numpy()
    finite = np.isfinite(expected)
    assert found.shape == (5, 3 * TYPES[kind].block) and finite.mean() > 0.8
    assert np.array_equal(found[finite], expected[finite])
    assert torch.equal(encode(kind, decode(kind, torch.from_numpy(data))), torch.from_numpy(data))


@pytest.mark.parametrize("columns, kinds", [
    (512, LARGE), (96, ["Q4_0", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q8_0"]), (48, ["F16"] * 6)])
def test_rows_that_blocks_do_not_divide_take_llama_cpps_fallback(columns, kinds):
    assert [fitting(kind, columns) for kind in LARGE] == kinds


# ---- codes -----------------------------------------------------------------------------------------------------------


def layer(columns: int):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(12, columns, generator=generator) * (0.5 + torch.rand(12, 1, generator=generator))
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs[:, 1::2] += inputs[:, ::2]
    return weight, inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("kinds, columns", [(LARGE, 512), (SMALL, 96)])
def test_codes_are_those_of_a_plain_sweep_over_the_same_grids(kinds, columns):
    weight, hessian = layer(columns)
    packed, dequantized, damping = kquant.quantize(weight, hessian, kinds)
    u = inverse_factor(hessian, damping)[0]
    for kind, data, stored in zip(kinds, packed, dequantized.split(12, dim=1)):
        assert torch.equal(dequantize(kind, data), stored.T)
        parts = decode(kind, data)
        scale, minimum = (grid.double().repeat_interleave(TYPES[kind].group, 1) for grid in grids(kind, parts))
        w = weight.double().clone()
        differ = 0
        for j in range(columns):
            code = torch.where(scale[:, j] == 0, 0, (w[:, j] + minimum[:, j]) / scale[:, j]).round()
            code = code.clamp(0, 2**TYPES[kind].bits - 1)
            differ += int((code != parts.codes[:, j]).sum())
            error = (w[:, j] - scale[:, j] * parts.codes[:, j] + minimum[:, j]) / u[j, j]
            w[:, j:] -= error[:, None] * u[j, j:]
        assert differ <= 2, kind                                 # float32 rounds a tie otherwise now and then


@pytest.mark.parametrize("kind", BLOCKS)
def test_grids_fit_better_than_the_range_of_every_group(kind):
    """Against scales and minima that take in all of a group's weights and need not be integers: more than any block can
    hold, but without a search."""
    weight, _ = layer(512)
    [data], _, _ = kquant.quantize(weight, torch.eye(512), [kind])
    form = TYPES[kind]
    groups = weight.unflatten(1, (-1, form.group))
    if form.middle is None:
        low = groups.amin(-1, keepdim=True).clamp(max=0)
        step = (groups.amax(-1, keepdim=True) - low) / form.top
        plain = ((groups - low) / step).round() * step + low
    else:
        step = groups.abs().amax(-1, keepdim=True) / (form.middle - 1)
        plain = (groups / step).round() * step
    error = (dequantize(kind, data) - weight).square().sum()
    allowed = 1.02 if kind in ("Q6_K", "Q8_0") else 1.0          # there is next to nothing to search for, only to round
    assert error < allowed * (plain.flatten(1) - weight).square().sum()


def test_more_than_rounding_to_nearest_is_gained_by_the_sweep():
    weight, hessian = layer(512)
    swept, nearest = (dequantize("Q2_K", kquant.quantize(weight, h, ["Q2_K"])[0][0]) - weight
                      for h in (hessian, torch.eye(512)))
    assert (swept @ hessian * swept).sum() < 0.9 * (nearest @ hessian * nearest).sum()


# ---- databases, searches and files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """Folder of a Llama with rows of 256, which K-quants hold, of 96 and of 48, which they do not."""
    return save_model(tmp_path_factory.mktemp("model"), families.build("llama", vocab_size=len(tokenizer), **dict(
        hidden_size=256, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=64)), tokenizer)


def data(folder: str, text: str) -> list[str]:
    return ["--model_name_or_path", folder, "--calibration_data", text, "--calibration_sequence_length", "32",
            "--calibration_tokens", "512"]


@pytest.fixture(scope="module")
def database(model, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("databases") / "k"
    gptq.main(gptq.make_parser().parse_args([*data(model, text), "--grid", "k-quant", "--bitwidth_options", "2", "3",
                                             "4", "5", "6", "8", "--save_dir", str(folder)]))
    return Database.open(folder)


def test_levels_are_called_by_their_real_bits(database):
    for name in database.layers:
        down = name.endswith("down_proj")
        assert database.levels(name) == ([4.5, 5.5, 6, 8.5] if down else [2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5])
        out, columns = database.shape(name)
        for level in database.levels(name):
            assert database.bits(name, level) == database.bits(name, level, overhead=True) == level * out * columns
            assert layer_bytes(database, name, level, "gguf") == database.packed(name, level)["blocks"].nbytes
        errors = [database.error(name, level) for level in database.levels(name)]
        assert errors == sorted(errors, reverse=True)


@needs_llama_cpp
def test_a_searched_mixture_is_the_same_model_in_llama_cpp(model, database, text, tmp_path):
    """llama.cpp rounds the inputs of K-quants to 8 bits, 256 at a time: that is all that may differ."""
    import gguf
    summary = evo_quant.main([
        *data(model, text), "--quant_weights_path", str(database.path), "--target_bitwidth", "4.1", "--no_eval",
        "--init", "measured", "--initial_tokens", "64", "--generations", "1", "--offspring", "4",
        "--survivors_per_selection", "1", "--tokens_per_selection", "64", "--output_dir", str(tmp_path / "run")])
    config = str(tmp_path / "run" / "evo-kl-configuration-4.1.txt")
    levels = read_level_config(config)
    assert summary["levels"] == levels and len(set(levels.values())) > 2
    sizes = {name: database.bits(name, level) for name, level in levels.items()}
    weights = sum(out * columns for out, columns in map(database.shape, levels))
    assert 4.0 < sum(sizes.values()) / weights <= 4.1
    types = tmp_path / "types.txt"
    export.main(["--model_name_or_path", model, "--quant_weights_path", str(database.path), "--quant_config_path",
                 config, "--format", "gguf", "--tensor_types", str(types), "--save_dir", str(tmp_path / "out")])
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    blocks = [tensor for name, tensor in found.items() if name.startswith("blk.") and tensor.data.dtype == np.uint8]
    assert 8 * sum(tensor.n_bytes for tensor in blocks) == sum(sizes.values())
    assert types.read_text().split() == [f"^{name}$={tensor.tensor_type.name.lower()}".replace(".", "\\.")
                                         for name, tensor in found.items() if tensor in blocks]
    searched = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, level in levels.items():
        searched.get_submodule(name).weight.data.copy_(database.weight(name, level))
        searched.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs: rounded(*inputs) if module.in_features % 256 else rounded_k(*inputs))
    _, middle, largest = differences(tmp_path / "out" / "model.gguf", searched)
    assert middle < 1e-3 and largest < 0.03                  # now and then a tie is rounded the other way


@needs_gguf
def test_gguf_files_of_k_quants_are_taken_over_byte_for_byte(model, database, text, tmp_path):
    files, kinds = [], ("Q2_K", "Q5_K", "Q8_0")          # the last is 8.5 bits beside K-quants, not 8
    for kind in kinds:
        write_level_config(tmp_path / f"{kind}.txt", {
            name: level_of(fitting(kind, database.shape(name)[1])) for name in database.layers})
        export.main(["--model_name_or_path", model, "--quant_weights_path", str(database.path), "--quant_config_path",
                     str(tmp_path / f"{kind}.txt"), "--format", "gguf", "--save_dir", str(tmp_path / kind)])
        files.append(str(tmp_path / kind / "model.gguf"))
    import_levels.main(import_levels.make_parser().parse_args([
        *data(model, text), "--checkpoints", *files, "--save_dir", str(tmp_path / "imported")]))
    imported = Database.open(tmp_path / "imported")
    for name in database.layers:
        assert imported.levels(name) == [level_of(fitting(kind, database.shape(name)[1])) for kind in kinds]
        for level in imported.levels(name):
            assert imported.type(name, level) == database.type(name, level)
            assert torch.equal(imported.packed(name, level)["blocks"], database.packed(name, level)["blocks"])


def test_what_counts_its_bits_otherwise_is_not_imported_beside_k_quants(monkeypatch):
    of_k_quants = SimpleNamespace(k_quant="Q4_K", path=Path("k.gguf"), format="GGUF")
    other = SimpleNamespace(k_quant=None, path=Path("other"), format="GPTQ")
    monkeypatch.setattr(import_levels, "open_checkpoint", lambda path, config: {"k": of_k_quants, "other": other}[path])
    monkeypatch.setattr(import_levels, "fingerprint", lambda found: "0" * 64)
    import_levels.open_checkpoints({}, SimpleNamespace(checkpoints=["other"]), None)
    with pytest.raises(ValueError, match="^--checkpoints other: levels are called by the bits of their codes there"):
        import_levels.open_checkpoints({}, SimpleNamespace(checkpoints=["k", "other"]), None)


def rounded_k(inputs: torch.Tensor) -> tuple[torch.Tensor]:
    """Activations as Q8_K holds them: 8-bit integers with a float32 scale for every 256."""
    blocks = inputs.unflatten(-1, (-1, 256))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = -largest / 127
    return ((blocks / scale).round().clamp(max=127) * scale).flatten(-2)


def test_baselines_and_uniform_levels_take_fractions_of_a_bit(model, database, tmp_path):
    result = dp.main(["--model_name_or_path", model, "--quant_weights_path", str(database.path), "--target_bitwidth",
                      "4.25", "--save_dir", str(tmp_path)])
    assert 4.2 < result["solutions"][0]["achieved"] <= 4.25
    assert set(read_level_config(tmp_path / "dp-manifest-4.25.txt").values()) <= set(BITS.values())


def test_finishing_trains_the_codes_and_keeps_the_grids(model, database, text, tmp_path, capsys):
    levels = {name: 4.5 if name.endswith("down_proj") else 2.625 for name in database.layers}
    write_level_config(tmp_path / "levels.txt", levels)
    finish.main([*data(model, text), "--quant_weights_path", str(database.path), "--quant_config_path",
                 str(tmp_path / "levels.txt"), "--steps", "20", "--batch_size", "4", "--save_dir",
                 str(tmp_path / "db")])
    finished = Database.open(tmp_path / "db")
    for name, level in levels.items():
        kind = database.type(name, level)
        before, after = (decode(kind, source.packed(name, level)["blocks"]) for source in (database, finished))
        assert not torch.equal(before.codes, after.codes)
        assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:]) if a is not None)
    first, last = map(float, re.findall(r"block 2/2: relative error (\S+) -> (\S+);", capsys.readouterr().out)[0])
    assert last < first


@pytest.mark.parametrize("flags, message", [
    (["--group_size", "128"], "--group_size: K-quants have groups"), (["--mse"], "--mse: K-quants"),
    (["--bitwidth_options", "3", "7"], "--bitwidth_options 3 7: the K-quants are of 2, 3, 4, 5, 6, 8 bits")])
def test_what_k_quants_do_not_have_is_refused(model, text, tmp_path, flags, message):
    args = gptq.make_parser().parse_args([*data(model, text), "--grid", "k-quant", *flags, "--save_dir",
                                          str(tmp_path / "db")])
    with pytest.raises(ValueError, match=message):
        gptq.main(args)


@pytest.mark.parametrize("format", ["compressed-tensors", "mlx"])
def test_only_gguf_holds_k_quants(model, database, tmp_path, format):
    with pytest.raises(SystemExit, match="blocks, and only --format gguf holds those"):
        export.main(["--model_name_or_path", model, "--quant_weights_path", str(database.path), "--quant_config_path",
                     "4.5", "--format", format, "--save_dir", str(tmp_path / "out")])
