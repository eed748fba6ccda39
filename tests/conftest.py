"""Set-up of all tests: one thread, no network, and one small checkpoint with a tokenizer of its own."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"   # before transformers and datasets are imported

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import families  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")                         # a slow machine fails no test


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return families.train_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """Folder of a random Llama of six blocks with its tokenizer, as `from_pretrained` reads it."""
    return families.save_llama(tmp_path_factory.mktemp("llama"), tokenizer, num_hidden_layers=6)
