"""Where Triton's kernels cannot be launched, for whatever reason, one line says so and torch does their work."""
import subprocess
from types import SimpleNamespace

import pytest
import torch

from utils import kernels as loading

CUDA = torch.device("cuda")
FAILURES = [ImportError("No module named 'triton'"), RuntimeError("Failed to find C compiler. Please specify\n..."),
            subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/main.c", "-O3"]), AssertionError()]


@pytest.fixture(autouse=True)
def nothing_tried_yet():
    loading.kernels.cache_clear()
    yield
    loading.kernels.cache_clear()


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failing_launch_is_one_line_and_torchs_path(failure, monkeypatch, capsys):
    tried = []

    def try_out(device):
        tried.append(device)
        raise failure

    monkeypatch.setattr(loading, "import_module", lambda name: SimpleNamespace(try_out=try_out))
    assert loading.kernels("some.kernels", CUDA) is None and loading.kernels("some.kernels", CUDA) is None
    printed = capsys.readouterr().out
    assert tried == [CUDA] and printed.count("\n") == 1                 # tried once, said once
    assert printed.startswith("some.kernels: Triton's kernels do not run here (")
    assert str(failure).splitlines()[0] in printed if str(failure) else "AssertionError" in printed


def test_a_module_is_used_once_its_kernels_have_run(monkeypatch, capsys):
    module = SimpleNamespace(try_out=lambda device: None)
    monkeypatch.setattr(loading, "import_module", lambda name: module)
    assert loading.kernels("some.kernels", CUDA) is module and capsys.readouterr().out == ""


def test_a_cpu_never_asks_for_triton(monkeypatch):
    monkeypatch.setattr(loading, "import_module", None)
    assert loading.kernels("some.kernels", torch.device("cpu")) is None
