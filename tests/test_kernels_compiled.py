"""Triton's kernels, compiled ahead of time for an A100 and an H100, spill no register and use no local memory: needs
Triton, but no GPU (`make test-kernels`)."""
import os
import re
import subprocess
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="make test-kernels installs Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"_prune": ("*fp32", "*fp32", "*u8", "*fp32"),
            "_quantize": ("*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "*u8"),
            "_unpack_quantized": ("*u8", "*fp16", "*u8", "*bf16"),
            "_count_kept": ("*u8", "*i32"),
            "_unpack_sparse": ("*u8", "*bf16", "*i64", "*bf16"),
            "_divergence": ("*bf16", "*bf16", "*fp32")}
VARIANTS = [("database.kernels", "_prune", 4, {}), ("database.kernels", "_quantize", 4, {}),
            *[("database.unpack_kernels", "_unpack_quantized", 4, {"BITS": bits, "GROUP_SIZE": group_size})
              for bits in range(1, 9) for group_size in (128, 4096)],
            ("database.unpack_kernels", "_count_kept", 4, {"TILE": 128}),
            ("database.unpack_kernels", "_unpack_sparse", 4, {}), ("utils.kl_kernel", "_divergence", 8, {})]
USED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def compiled_to(module: str, name: str, warps: int, constants: dict[str, int], capability: int) -> str:
    """PTX of a kernel for sm_<capability>."""
    module = import_module(module)
    kernel = getattr(module, name)
    constants = {"TILE": module.TILE, **constants}
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    signature = dict(zip(arguments, (*POINTERS[name], *["i32"] * len(arguments))))
    source = ASTSource(kernel, {**signature, **dict.fromkeys(kernel.arg_names[len(arguments):], "constexpr")},
                       {(kernel.arg_names.index(key),): value for key, value in constants.items()
                        if key in kernel.arg_names})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]


def resources(code: str) -> dict[str, int]:
    """Registers a thread, and bytes of local memory, of a kernel's PTX."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(code)
        arch = re.search(r"\.target (\w+)", code)[1]
        said = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", f"-arch={arch}", str(ptx), "-o", os.devnull],
                              capture_output=True, text=True, check=True).stderr
    stack, stores, loads = map(int, USED.search(said).groups())
    return {"registers": int(re.search(r"Used (\d+) registers", said)[1]), "stack": stack, "stores": stores,
            "loads": loads}


@pytest.fixture(scope="module")
def table():
    """Rows of (kernel, its constants, capability, what it takes); printed when all have been compiled."""
    rows = []
    yield rows
    print("\n\n| kernel | constants | sm_80: registers, spills | sm_90: registers, spills |\n|---|---|--:|--:|")
    for key in dict.fromkeys((name, words) for name, words, _, _ in rows):
        found = {capability: used for *own, capability, used in rows if tuple(own) == key}
        cells = [f"{found[c]['registers']}, {found[c]['stores'] + found[c]['loads']}" if c in found else "–"
                 for c in (80, 90)]
        print(f"| {' | '.join([*key, *cells])} |")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("module, name, warps, constants", VARIANTS, ids=lambda value: str(value))
def test_no_kernel_spills_registers(module, name, warps, constants, capability, table):
    used = resources(compiled_to(module, name, warps, constants, capability))
    table.append((name, ", ".join(f"{key} {value}" for key, value in constants.items()) or "–", capability, used))
    assert used["registers"] > 0 and not used["stack"] and not used["stores"] and not used["loads"]


def test_a_spill_would_be_seen(monkeypatch):
    monkeypatch.setattr("utils.kl_kernel.TILE", 65536)                   # 256 values a thread, twice
    assert resources(compiled_to("utils.kl_kernel", "_divergence", 8, {}, 80))["stores"] > 0


def test_weights_are_rounded_to_nearest_in_bfloat16():
    code = compiled_to("database.unpack_kernels", "_unpack_quantized", 4, {"BITS": 4, "GROUP_SIZE": 128}, 80)
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", code) and "cvt.rz" not in code
