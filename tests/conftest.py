"""Set-up of all tests: one thread, no network, one small checkpoint with a tokenizer of its own, a small dataset."""
import json
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"   # before transformers and datasets are imported

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import families
from database import gptq, sparsegpt

settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")                         # a slow machine fails no test


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """They take longer than most searches here; tests of pictures have them back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.search.plot_search", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return families.train_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """Folder of a random Llama of six blocks with its tokenizer, as `from_pretrained` reads it."""
    return families.save_llama(tmp_path_factory.mktemp("llama"), tokenizer, num_hidden_layers=6)


@pytest.fixture(scope="session")
def databases(checkpoint, tmp_path_factory):
    """{"sparse": folder, "quant": folder}: built by the command-line programs on the small Llama."""
    folders = {kind: tmp_path_factory.mktemp("databases") / kind for kind in ("sparse", "quant")}
    build = ["--model_name_or_path", str(checkpoint), "--calibration_data", "stdlib",
             "--calibration_sequence_length", "32", "--calibration_tokens", "512"]
    sparsegpt.main(sparsegpt.make_parser().parse_args(
        [*build, "--sparsity", "0.5", "--num_levels", "3", "--weights_diff", "100",
         "--save_dir", str(folders["sparse"])]))
    gptq.main(gptq.make_parser().parse_args(
        [*build, "--bitwidth_options", "2", "3", "4", "8", "--calibration_bitwidth", "3", "--group_size", "16",
         "--perchannel", "--save_dir", str(folders["quant"])]))
    return folders


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """A small local dataset with both sides."""
    rng = random.Random(0)
    words = Path(random.__file__).read_text().split()
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(4, 40)))}) + "\n"
                            for _ in range(80)))
    return str(path)
