"""Triton kernels that unpack a level: same functions as `unpack_sparse` and `unpack_quantized` of packing.py, which are
their check. A program owns neighbouring weights, of one row where scales are looked up; nothing but the packed level is
read, and nothing but the weight is written, in the dtype that it is to have."""
import torch
import triton
import triton.language as tl

TILE = 1024                      # weights of a program


def unpack_quantized(packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, group_size: int,
                     out: torch.Tensor | None = None) -> torch.Tensor:
    """scale * (code - zero): float32 [out, in] and exact, or rounded to the dtype of `out`, which is written then. One
    launch."""
    codes, scales, zeros = packed["codes"], packed["scales"].contiguous(), packed["zeros"].contiguous()
    weight = torch.empty(shape, dtype=torch.float32, device=codes.device) if out is None else out
    (rows, columns), (scale_rows, groups) = shape, scales.shape
    tile = min(TILE, triton.next_power_of_2(columns))
    _unpack_quantized[(rows, triton.cdiv(columns, tile))](
        codes, scales, zeros, weight, rows * columns, columns, groups if scale_rows > 1 else 0,
        group_size if groups > 1 else columns, bits, tile)
    return weight


def unpack_sparse(packed: dict[str, torch.Tensor], shape: tuple[int, int], out: torch.Tensor | None = None
                  ) -> torch.Tensor:
    """Weight [out, in], zero where pruned, in the dtype of the stored values or that of `out`, which is written then:
    every tile's number of kept weights, and from their sums where in the values each tile begins."""
    mask, values = packed["mask"], packed["values"]
    weight = torch.empty(shape, dtype=values.dtype, device=values.device) if out is None else out
    tiles = triton.cdiv(weight.numel(), TILE)
    kept = torch.empty(tiles, dtype=torch.int32, device=mask.device)
    _count_kept[(tiles,)](mask, kept, len(mask), TILE // 8)
    _unpack_sparse[(tiles,)](mask, values, kept.cumsum(0) - kept, weight, weight.numel(), TILE)
    return weight


def try_out(device: torch.device) -> None:
    """Compile and launch all kernels on a few weights; raises what that raises."""
    codes, weight = torch.zeros(16, dtype=torch.uint8, device=device), torch.empty(2, 8, device=device)
    grid = {"scales": torch.ones(2, 1, dtype=torch.float16, device=device), "zeros": codes[:2, None]}
    unpack_quantized({"codes": codes, **grid}, (2, 8), 8, 8, weight)
    unpack_sparse({"mask": codes[:2], "values": weight.flatten()[:0].half()}, (2, 8), weight)
    torch.cuda.synchronize(device)


@triton.jit
def _plane(codes, start, n, inside, WIDTH: tl.constexpr):
    """The bits of weights `n` in the plane of WIDTH bits that begins at byte `start`."""
    per_byte: tl.constexpr = 8 // WIDTH
    byte = tl.load(codes + start + n // per_byte, mask=inside, other=0).to(tl.int32)
    return (byte >> (n % per_byte * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def _unpack_quantized(codes, scales, zeros, weight, count, columns, row_stride, GROUP_SIZE: tl.constexpr,
                      BITS: tl.constexpr, TILE: tl.constexpr):
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    n = tl.program_id(0) * columns + column
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
    at = tl.program_id(0) * row_stride + column // GROUP_SIZE    # a shift: dividing by a variable would take longest
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
