"""Whole files as budgets: what export.py writes is never larger than promised, nor smaller by a step that was left."""
import importlib.util
from pathlib import Path

import pytest

import export
import families
from database.exported import exportable_levels, layer_bytes
from database.store import Database
from exports import save_model, search_bits, write_database

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason=(
    "the gguf package is not installed: pip install -r requirements-gguf.txt"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tokenizer):
    """(folder of a model, its database)."""
    folder = tmp_path_factory.mktemp("budget")
    model = save_model(folder / "m", families.build(
        "llama", vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, intermediate_size=128,
        max_position_embeddings=64), tokenizer)
    return model, Database.open(write_database(folder / "db", model, "gptq", [2, 3, 4, 5, 6, 8], 32))


def search(model: str, database: Database, text: str, out: Path, *flags: str) -> dict:
    return search_bits(model, database, text, out, "--init", "random", "--initially_generated", "2", *flags)


@pytest.mark.parametrize("format", ["compressed-tensors", "mlx", "mlx-float16", pytest.param("gguf", marks=needs_gguf)])
@pytest.mark.parametrize("flags, budget", [
    (["--budget_file_gb", "0.00026"], lambda parameters: 260_000),
    (["--target_bitwidth", "14", "--count_everything"], lambda parameters: 14 * parameters // 8)], ids=["GB", "bits"])
def test_file_is_as_large_as_promised(quantized, text, tmp_path, format, flags, budget):
    model, database = quantized
    levels = search(model, database, text, tmp_path, "--for_format", format, *flags)["levels"]
    report = export.main(["--model_name_or_path", model, "--quant_weights_path", str(database.path),
                          "--quant_config_path", str(tmp_path / "run" / "found.txt"), "--format", format, "--save_dir",
                          str(tmp_path / "out")])
    short = budget(report["parameters"]["exported"]) - report["bytes"]["exported"]
    steps, holds = [], exportable_levels(database, format)
    for name, level in levels.items():
        known = holds[name]
        sizes = [layer_bytes(database, name, other, format) for other in known]
        steps += [b - a for a, b, at in zip(sizes, sizes[1:], known) if at == level and b > a]
    assert 0 <= short < min(steps)


def test_budgets_out_of_reach_and_files_without_a_format_are_refused(quantized, text, tmp_path):
    with pytest.raises(SystemExit, match=r"--budget_file_gb 0.0001: .* allow files from 0.0002\d+ to 0.0003\d+ GB"):
        search(*quantized, text, tmp_path, "--budget_file_gb", "0.0001", "--for_format", "mlx")
    with pytest.raises(SystemExit, match="name its --format with --for_format"):
        search(*quantized, text, tmp_path, "--target_bitwidth", "9", "--count_everything")
    with pytest.raises(SystemExit, match="give one of the two"):
        search(*quantized, text, tmp_path)
