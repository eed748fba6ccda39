"""Packed levels come back bit for bit, and take no more room than promised."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from database.packing import (
    dequantize,
    pack_bits,
    pack_quantized,
    pack_sparse,
    packed_bytes,
    unpack_bits,
    unpack_codes,
    unpack_sparse,
)


def nbytes(packed):
    return sum(tensor.nbytes for tensor in packed.values())


@settings(deadline=None, max_examples=150)
@given(bits=st.integers(1, 8), count=st.integers(0, 200), seed=st.integers(0, 10**6))
def test_codes_come_back_bit_for_bit(bits, count, seed):
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(count, bits)
    assert torch.equal(unpack_bits(packed, bits, count), codes)
    assert count * bits <= 8 * len(packed) < count * bits + 8 * 4       # at most a byte of padding a plane


@settings(deadline=None, max_examples=60)
@given(out=st.integers(1, 9), columns=st.integers(1, 33), group_size=st.integers(1, 40), bits=st.integers(1, 8),
       perchannel=st.booleans(), seed=st.integers(0, 10**6))
def test_quantized_levels_of_ragged_shapes(out, columns, group_size, bits, perchannel, seed):
    generator = torch.Generator().manual_seed(seed)
    groups, rows = -(-columns // group_size), out if perchannel else 1
    codes = torch.randint(2**bits, (out, columns), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, groups, generator=generator).half()
    zeros = torch.randint(2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    unpacked = unpack_codes(pack_quantized(codes, scales, zeros, bits), (out, columns), bits)
    for there, back in zip((codes, scales.expand(out, -1), zeros.expand(out, -1)), unpacked, strict=True):
        assert torch.equal(there, back)
    weight = dequantize(*unpacked, group_size)
    for i in range(out):
        for j in range(columns):
            scale, zero = unpacked[1][i, j // group_size].item(), unpacked[2][i, j // group_size].item()
            assert weight[i, j].item() == scale * (codes[i, j].item() - zero)


@settings(deadline=None, max_examples=60)
@given(out=st.integers(1, 17), columns=st.integers(1, 33), share=st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]),
       dtype=st.sampled_from([torch.float16, torch.bfloat16]), seed=st.integers(0, 10**6))
def test_sparse_levels_of_ragged_shapes(out, columns, share, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(out, columns, generator=generator) < share
    weight = torch.randn(out, columns, generator=generator).to(dtype)
    weight[0] = 0                                                        # a kept weight may be zero
    packed = pack_sparse(weight, keep)
    assert torch.equal(unpack_sparse(packed, (out, columns)), weight * keep)
    assert len(packed["values"]) == keep.sum()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_sparse_level_takes_a_bit_a_weight_and_16_a_kept_one(share):
    keep = torch.rand(256, 384) < share
    packed = pack_sparse(torch.randn(256, 384).half(), keep)
    assert 8 * nbytes(packed) <= 1.02 * (keep.numel() + 16 * int(keep.sum()))


def test_bitwidths_2_to_6_at_group_128_take_2_8_bytes_a_weight():
    out, columns = 256, 512
    total = 0
    for bits in (2, 3, 4, 5, 6):
        codes = torch.randint(2**bits, (out, columns), dtype=torch.uint8)
        scales = torch.ones(out, columns // 128, dtype=torch.float16)
        total += nbytes(pack_quantized(codes, scales, scales.to(torch.uint8), bits))
    assert total <= 2.8 * out * columns
