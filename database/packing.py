"""Packed levels: bit planes for quantized codes, a bitmask and the kept values for sparse weights.

Every tensor is flattened row by row; a plane of `width` bits puts 8 / width neighbouring values into a byte, lowest
bits first, and only the last byte of a plane is padded. A b-bit code is split into planes of 8, 4, 2 and 1 bits (the
binary digits of b, widest plane first, holding the code's lowest bits), so it costs exactly b bits on disk and on the
device.
"""
import torch
import torch.nn.functional as F

from utils.kernels import kernels

KERNELS = "database.unpack_kernels"
Packed = dict[str, torch.Tensor]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of any shape, each below 2**bits (1 to 8), to uint8 [bytes]."""
    codes = codes.flatten()
    packed = []
    for width in _plane_widths(bits):
        per_byte = 8 // width
        plane = F.pad(codes & (2**width - 1), (0, -len(codes) % per_byte))
        packed.append(sum((plane[k::per_byte] << (k * width) for k in range(1, per_byte)), plane[::per_byte]))
        codes = codes >> width if width < 8 else codes
    return torch.cat(packed)


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes packed by `pack_bits`, uint8 [count]."""
    codes = packed.new_zeros(count)
    start = shift = 0
    for width in _plane_widths(bits):
        size = packed_bytes(count, width)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane = (packed[start:start + size, None] >> shifts) & (2**width - 1)
        codes |= plane.flatten()[:count] << shift
        start += size
        shift += width
    return codes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: every plane is padded to whole bytes."""
    return sum(-(-count * width // 8) for width in _plane_widths(bits))


def pack_sparse(weight: torch.Tensor, keep: torch.Tensor) -> Packed:
    """Bitmask of `keep` (bool [out, in]) and the kept weights, in their dtype; a kept weight may be zero."""
    return {"mask": pack_bits(keep.to(torch.uint8), 1), "values": weight.masked_select(keep)}


def unpack_sparse(packed: Packed, shape: tuple[int, int], out: torch.Tensor | None = None) -> torch.Tensor:
    """Weight [out, in], zero where pruned, in the dtype of the stored values; or in that of `out` (contiguous), which
    is written then."""
    if module := kernels(KERNELS, packed["mask"].device):
        return module.unpack_sparse(packed, shape, out)
    keep = unpack_bits(packed["mask"], 1, shape[0] * shape[1]).bool()
    weight = packed["values"].new_zeros(keep.shape)
    weight = weight.masked_scatter_(keep, packed["values"]).view(shape)
    return weight if out is None else out.copy_(weight)


def pack_quantized(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> Packed:
    """codes uint8 [out, in]; scales float16 and zeros uint8 [out or 1, groups], one row where all outputs share it."""
    return {"codes": pack_bits(codes, bits), "scales": scales, "zeros": zeros}


def unpack_quantized(packed: Packed, shape: tuple[int, int], bits: int, group_size: int,
                     out: torch.Tensor | None = None) -> torch.Tensor:
    """scale * (code - zero), float32 [out, in] and exact; or rounded to the dtype of `out` (contiguous), which is
    written then."""
    if module := kernels(KERNELS, packed["codes"].device):
        return module.unpack_quantized(packed, shape, bits, group_size, out)
    codes = unpack_bits(packed["codes"], bits, shape[0] * shape[1]).view(shape)
    weight = dequantize(codes, packed["scales"], packed["zeros"], group_size)
    return weight if out is None else out.copy_(weight)


def unpack_codes(packed: Packed, shape: tuple[int, int], bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [out, in], scales float16 [out, groups], zeros uint8 [out, groups])."""
    codes = unpack_bits(packed["codes"], bits, shape[0] * shape[1]).view(shape)
    return codes, packed["scales"].expand(shape[0], -1), packed["zeros"].expand(shape[0], -1)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int) -> torch.Tensor:
    """scale * (code - zero), float32 [out, in] and exact; columns `group_size` at a time share a column of `scales`."""
    columns = codes.shape[1]
    if scales.shape[1] > 1:
        scales, zeros = (t.repeat_interleave(group_size, dim=1)[:, :columns] for t in (scales, zeros))
    return (codes.float() - zeros).mul_(scales)


def _plane_widths(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]
