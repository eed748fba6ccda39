"""Triton kernels that unpack a level: same functions as `unpack_sparse` and `unpack_quantized` of packing.py, which are
their check. A program owns a tile of neighbouring weights; nothing but the packed level is read."""
import torch
import triton
import triton.language as tl

TILE = 1024                      # weights of a program


def unpack_quantized(packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, group_size: int
                     ) -> torch.Tensor:
    """scale * (code - zero), float32 [out, in] and exact: one launch."""
    codes, scales, zeros = packed["codes"], packed["scales"].contiguous(), packed["zeros"].contiguous()
    weight = torch.empty(shape, dtype=torch.float32, device=codes.device)
    count, (rows, groups) = weight.numel(), scales.shape
    _unpack_quantized[(triton.cdiv(count, TILE),)](
        codes, scales, zeros, weight, count, shape[1], groups, groups if rows > 1 else 0,
        group_size if groups > 1 else shape[1], bits, TILE)
    return weight


def unpack_sparse(packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """Weight [out, in] in the dtype of the stored values, zero where pruned: every tile's number of kept weights, and
    from their sums where in the values each tile begins."""
    mask, values = packed["mask"], packed["values"]
    weight = torch.empty(shape, dtype=values.dtype, device=values.device)
    tiles = triton.cdiv(weight.numel(), TILE)
    kept = torch.empty(tiles, dtype=torch.int32, device=mask.device)
    _count_kept[(tiles,)](mask, kept, len(mask), TILE // 8)
    _unpack_sparse[(tiles,)](mask, values, kept.cumsum(0) - kept, weight, weight.numel(), TILE)
    return weight


@triton.jit
def _plane(codes, start, n, inside, WIDTH: tl.constexpr):
    """The bits of weights `n` in the plane of WIDTH bits that begins at byte `start`."""
    per_byte: tl.constexpr = 8 // WIDTH
    byte = tl.load(codes + start + n // per_byte, mask=inside, other=0).to(tl.int32)
    return (byte >> (n % per_byte * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def _unpack_quantized(codes, scales, zeros, weight, count, columns, groups, row_stride, group_size, BITS: tl.constexpr,
                      TILE: tl.constexpr):
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = n < count
    code = tl.zeros([TILE], tl.int32)
    start = 0
    shift = 0
    if BITS & 8:
        code += _plane(codes, start, n, inside, 8)
        start += count
        shift += 8
    if BITS & 4:
        code += _plane(codes, start, n, inside, 4) << shift
        start += (count + 1) // 2
        shift += 4
    if BITS & 2:
        code += _plane(codes, start, n, inside, 2) << shift
        start += (count + 3) // 4
        shift += 2
    if BITS & 1:
        code += _plane(codes, start, n, inside, 1) << shift
    at = n // columns * row_stride + n % columns // group_size
    zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + at, mask=inside, other=0).to(tl.float32)
    tl.store(weight + n, (code.to(tl.float32) - zero) * scale, mask=inside)


@triton.jit
def _count_kept(mask, kept, count, TILE: tl.constexpr):
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(mask + n, mask=n < count, other=0).to(tl.int32)
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    tl.store(kept + tl.program_id(0), tl.sum((byte + (byte >> 4)) & 0x0f, 0))


@triton.jit
def _unpack_sparse(mask, values, begin, weight, count, TILE: tl.constexpr):
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = n < count
    keep = (tl.load(mask + n // 8, mask=inside, other=0).to(tl.int32) >> (n % 8)) & 1
    at = tl.load(begin + tl.program_id(0)) + tl.cumsum(keep, 0) - 1
    value = tl.load(values + at, mask=inside & (keep == 1), other=0.0)
    tl.store(weight + n, value, mask=inside)
