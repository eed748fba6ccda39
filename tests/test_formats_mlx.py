"""MLX exports: stock mlx-lm loads the searched model, its weights to the bit.

Needs the optional packages of requirements-mlx.txt; without them these tests say so and are skipped.
"""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import families
from database.exported import exportable_levels, layer_bytes
from database.store import Database
from exports import save_model, write_database, write_levels
from utils.configs import write_drop_config

needs_mlx = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("mlx", "mlx_lm"))), reason=(
    "no MLX is installed to load the export: make test-runtimes, or pip install -r requirements-mlx.txt"))
SIZES = dict(hidden_size=64, intermediate_size=128, max_position_embeddings=64)
BITS = [2, 3, 4, 5, 6, 8]


def export_mlx(tmp_path, folder: str, levels, group_size: int, choose, *flags: str):
    """(export's folder, its report, the database)."""
    database = write_database(tmp_path / "db", folder, "gptq", levels, group_size)
    config = write_levels(tmp_path / "levels.txt", database, choose)
    report = export.main(["--model_name_or_path", folder, "--quant_weights_path", database, "--quant_config_path",
                          config, "--save_dir", str(tmp_path / "out"), *(flags or ("--format", "mlx"))])
    return tmp_path / "out", report, Database.open(database)


def load(folder: Path):
    """mlx-lm's model."""
    from mlx_lm.utils import load_model
    return load_model(folder)[0]


def weight(model, name: str) -> np.ndarray:
    """What MLX multiplies with, float32 [out, in]."""
    import mlx.core as mx
    for part in name.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return np.array(mx.dequantize(model.weight, model.scales, model.biases, group_size=model.group_size,
                                  bits=model.bits).astype(mx.float32))


@needs_mlx
@pytest.mark.parametrize("family, group_size, overrides", [
    ("llama", 64, dict(tie_word_embeddings=True)), ("mistral", 64, dict(sliding_window=None)),
    ("llama", 32, dict(rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                                            high_freq_factor=4.0, original_max_position_embeddings=16))),
    ("qwen2", 32, dict(use_sliding_window=False, layer_types=None)), ("qwen3", 128, dict(hidden_size=128)),
    ("phi3", 64, {}), ("olmo2", 32, {}),
    ("phi3", 64, dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)))])
def test_mlx_computes_what_the_searched_model_does(tmp_path, tokenizer, family, group_size, overrides):
    import mlx.core as mx
    model = families.build(family, **SIZES | dict(vocab_size=len(tokenizer)) | overrides)
    out, report, database = export_mlx(tmp_path, save_model(tmp_path / "m", model, tokenizer), BITS, group_size,
                                       lambda number, name: BITS[number % len(BITS)], "--format", "mlx",
                                       "--max_shard_size", "100KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    loaded = load(out)
    for number, name in enumerate(database.layers):
        expected = database.weight(name, BITS[number % len(BITS)])
        assert np.array_equal(weight(loaded, name), expected.numpy()), name
        model.get_submodule(name).weight.data.copy_(expected)
    tokens = torch.randint(3, len(tokenizer), (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(-1)
    found = torch.from_numpy(np.array(loaded(mx.array(tokens.numpy())).astype(mx.float32))).log_softmax(-1)
    assert float((found - expected).abs().max()) < 1e-3
    stored = sum(part.nbytes for path in out.glob("*.safetensors") for key, part in mx.load(str(path)).items()
                 if key.removesuffix(".weight").removesuffix(".scales").removesuffix(".biases") in database.layers)
    weights = sum(database.weight(name, 2).numel() for name in database.layers)
    assert report["bits_a_weight"]["stored"] == 8 * stored / weights
    assert stored == sum(layer_bytes(database, name, BITS[number % len(BITS)], "mlx")
                         for number, name in enumerate(database.layers))


@needs_mlx
def test_half_precision_scales_round_and_dropped_halves_are_zero(tmp_path, tokenizer):
    model = families.build("llama", dtype=torch.float16, vocab_size=len(tokenizer), **SIZES)
    write_drop_config(tmp_path / "drop.txt", [(False, True), (False, False), (True, False), (True, True)])
    out, report, database = export_mlx(
        tmp_path, save_model(tmp_path / "m", model, tokenizer), [4], 32, lambda number, name: 4, "--format",
        "mlx-float16", "--drop_config", str(tmp_path / "drop.txt"))
    loaded, name = load(out), "model.layers.0.self_attn.q_proj"
    found, expected = weight(loaded, name), database.weight(name, 4).numpy()
    assert 0 < np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert report["blocks"]["exported"] == 3 and "rounds the biases" in report["notes"][0]
    assert not weight(loaded, "model.layers.0.mlp.down_proj").any() and weight(
        loaded, "model.layers.1.mlp.down_proj").any()


@pytest.mark.parametrize("family, bits, size, overrides, message", [
    ("llama", 7, 32, {}, "q_proj has 7 bits, and MLX has 2, 3, 4, 5, 6, 8"),
    ("llama", 4, 16, {}, "rows of 64 in groups of 16"), ("llama", 4, 48, {}, "groups of 48"),
    ("mistral", 4, 32, {}, "sliding window of 8"), ("opt", 4, 32, {}, "opt models have not been tried"),
    ("llama", 4, 32, dict(hidden_act="gelu"), "this model's have gelu"),
    ("qwen3", 4, 32, dict(attention_bias=True), "has no place for biases in the attention of qwen3"),
    ("phi3", 4, 32, dict(head_dim=32), "takes the heads of phi3 models to have 16 columns")])
def test_what_mlx_does_not_have_is_refused_before_the_model_is_loaded(tmp_path, tokenizer, monkeypatch, family, bits,
                                                                      size, overrides, message):
    model = families.build(family, **SIZES | dict(vocab_size=len(tokenizer)) | overrides)
    folder = save_model(tmp_path / "m", model, tokenizer)
    monkeypatch.setattr(export, "load_decoder", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as error:
        export_mlx(tmp_path, folder, [bits], size, lambda number, name: bits)
    assert message in str(error.value)


def test_levels_that_mlx_does_not_have_are_left_out_of_a_search(tmp_path, tokenizer, capsys):
    folder = save_model(tmp_path / "m", families.build("llama", vocab_size=len(tokenizer), **SIZES | dict(
        intermediate_size=80)), tokenizer)
    wide = Database.open(write_database(tmp_path / "wide", folder, "gptq", [2, 3, 7], 32,
                                        layers=lambda name: "down_proj" not in name))
    assert set(map(tuple, exportable_levels(wide, "mlx").values())) == {(2, 3)}
    assert "7 bits, and MLX has" in capsys.readouterr().out
    odd = Database.open(write_database(tmp_path / "odd", folder, "gptq", [2, 3], 32))
    with pytest.raises(ValueError, match="down_proj has rows of 80 in groups of 32"):
        exportable_levels(odd, "mlx")
