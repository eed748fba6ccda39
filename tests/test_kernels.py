"""Triton's kernels give what their torch twins give: on a GPU, or in Triton's interpreter (`make test-kernels`)."""
import os

import pytest
import torch

pytest.importorskip("triton", reason="make test-kernels installs Triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; make test-kernels runs the kernels without one", allow_module_level=True)

from database import kernels as sweep
from database import solver, unpack_kernels
from database.packing import pack_quantized, pack_sparse, unpack_quantized, unpack_sparse
from utils import kl_kernel
from utils.losses import log_probabilities, plain_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)


def rounded(weight, dtype):
    """As kernels round; the interpreter cuts bfloat16 off instead (compiled, see test_kernels_compiled.py, they do
    not)."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        weight = (weight.float().view(torch.int32) & -65536).view(torch.float32)
    return weight.to(dtype)


def on_device(packed):
    return {part: tensor.to(DEVICE) for part, tensor in packed.items()}


@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 1500)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_unpacked_as_by_torch(bits, shape):
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    for rows, group_size in ((shape[0], 32), (shape[0], shape[1]), (1, 16)):
        scales = torch.rand(rows, -(-shape[1] // group_size)).half()
        packed = pack_quantized(codes, scales, torch.randint(2**bits, scales.shape, dtype=torch.uint8), bits)
        expected = unpack_quantized(packed, shape, bits, group_size)
        unpacked = unpack_kernels.unpack_quantized(on_device(packed), shape, bits, group_size)
        assert unpacked.dtype == torch.float32 and torch.equal(unpacked.cpu(), expected)
        for dtype in HALF:
            out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
            assert unpack_kernels.unpack_quantized(on_device(packed), shape, bits, group_size, out) is out
            assert torch.equal(out.cpu(), rounded(expected, dtype))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (64, 128)])
@pytest.mark.parametrize("dtype", HALF)
def test_sparse_levels_are_unpacked_as_by_torch(shape, share, dtype):
    packed = pack_sparse(torch.randn(shape).to(dtype), torch.rand(shape) < share)
    expected = unpack_sparse(packed, shape)
    assert torch.equal(unpack_kernels.unpack_sparse(on_device(packed), shape).cpu(), expected)
    for other in HALF:
        out = torch.full(shape, torch.nan, dtype=other, device=DEVICE)
        unpack_kernels.unpack_sparse(on_device(packed), shape, out)
        assert torch.equal(out.cpu(), rounded(expected, other))


@pytest.mark.parametrize("columns, rows", [(1, 1), (7, 130), (16, 128)])
def test_columns_are_pruned_and_quantized_as_by_torch(columns, rows):
    generator = torch.Generator().manual_seed(columns)
    w, err = torch.randn(2, columns, rows, generator=generator).unbind()
    u = torch.randn(columns, columns, generator=generator).triu() * 0.1 + torch.eye(columns)
    keep = torch.rand(columns, rows, generator=generator) < 0.5
    scale = torch.rand(columns, rows, generator=generator) / 4 + 0.05
    top = torch.full((rows,), 7.0)
    zero = torch.randint(8, (columns, rows), generator=generator).float()
    codes = torch.zeros(columns, rows, dtype=torch.uint8)

    def both(name, *arguments):
        here, there = ([t.clone().to(device) for t in arguments] for device in ("cpu", DEVICE))
        there = [t[:1].clone().expand(rows) if t.dim() == 1 else t for t in there]       # top, of one bitwidth
        getattr(solver, name)(*here)
        getattr(sweep, name)(*there)
        return zip(here, (t.cpu() for t in there))

    for here, there in (*both("prune_columns", w, u, keep, err),
                        *both("quantize_columns", w, u, scale, zero, top, err, codes)):
        if here.dtype == torch.uint8:
            assert torch.equal(here, there)
        else:
            torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("vocabulary", [1, 96, 2048, 5000])
def test_divergence_is_that_of_log_probabilities(vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    teacher = (4 * torch.randn(6, vocabulary, generator=generator)).to(dtype)
    noise = torch.randn(6, vocabulary, generator=generator) * torch.tensor([0, 0.01, 0.1, 1, 1, 10])[:, None]
    logits = (teacher + noise).to(dtype)
    logits[4] += 50                                                      # the same distribution but for rounding
    values = kl_kernel.divergence(teacher.to(DEVICE), logits.to(DEVICE)).cpu()
    log_p, log_q = teacher.double().log_softmax(-1), logits.double().log_softmax(-1)
    exact = plain_kl(log_p, log_p.exp(), log_q)
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=3e-6)
    ours, theirs = log_probabilities(teacher), log_probabilities(logits)
    torch.testing.assert_close(values, plain_kl(ours, ours.exp(), theirs), rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_divergence_of_what_is_not_finite_is_not_finite(poison):
    teacher, logits = torch.randn(2, 2, 3000).unbind()
    logits[0, 2500] = poison
    values = kl_kernel.divergence(teacher.to(DEVICE), logits.to(DEVICE)).cpu()
    assert not values[0].isfinite() and values[1].isfinite()
