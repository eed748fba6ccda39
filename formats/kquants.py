"""GGUF's block types with their bytes: the K-quants, and what llama.cpp takes for rows that their 256 does not divide.

A row is cut into blocks and a block into groups of neighbouring columns. A weight is scale * code - minimum, or in
types without minima scale * (code - middle). K-quants have a group's scale and minimum as small integers, times one
float16 each of the block; other types have those alone.
"""
from typing import NamedTuple

import torch


class BlockType(NamedTuple):
    bits: int                                    # of a code
    block: int                                   # columns
    group: int                                   # columns that share a scale
    middle: int | None                           # the code of 0; None: groups have minima
    scales: tuple[int, int] | None               # least and greatest integer scale; None: of a group of its own, 1
    layout: str                                  # fields in the order of their bytes, see `_fields`
    planes: tuple[tuple[int, int], ...]          # bits of a code, lowest first: (how many, codes between two in a byte)

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1


TYPES = {
    "Q2_K": BlockType(2, 256, 16, None, (0, 15), "scales q0 d m", ((2, 32),)),
    "Q3_K": BlockType(3, 256, 16, 4, (-32, 31), "q1 q0 scales d", ((2, 32), (1, 32))),
    "Q4_K": BlockType(4, 256, 32, None, (0, 63), "d m scales q0", ((4, 32),)),
    "Q5_K": BlockType(5, 256, 32, None, (0, 63), "d m scales q1 q0", ((4, 32), (1, 32))),
    "Q6_K": BlockType(6, 256, 16, 32, (-128, 127), "q0 q1 scales d", ((4, 64), (2, 32))),
    "Q8_0": BlockType(8, 32, 32, 128, None, "d q0", ((8, 1),)),
    "Q4_0": BlockType(4, 32, 32, 8, None, "d q0", ((4, 16),)),
    "Q5_0": BlockType(5, 32, 32, 16, None, "d q1 q0", ((4, 16), (1, 1))),
    "Q5_1": BlockType(5, 32, 32, None, None, "d m q1 q0", ((4, 16), (1, 1))),
    "F16": BlockType(16, 1, 1, None, None, "", ()),
}
K_QUANTS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
# llama.cpp's, which has IQ4_NL of the same size instead of Q4_0
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class Blocks(NamedTuple):
    """One layer, or a type's level of it, as it is in a file."""
    kind: str
    data: torch.Tensor           # uint8 [out, bytes a row]

    @property
    def numel(self) -> int:
        return self.data.shape[0] * columns_of(self.kind, self.data.shape[1])

    @property
    def bits(self) -> float:
        return level_of(self.kind)


class Parts(NamedTuple):
    """What the bytes of a layer stand for."""
    codes: torch.Tensor                  # uint8 [out, in]
    d: torch.Tensor                      # float16 [out, blocks]: scale of the scales
    scales: torch.Tensor | None          # int16 [out, groups]
    m: torch.Tensor | None               # float16 [out, blocks]: scale of the minima
    minima: torch.Tensor | None          # int16 [out, groups]


def block_bytes(kind: str) -> int:
    return sum(_fields(kind).values()) or 2


def level_of(kind: str) -> float:
    """Bits a weight, everything counted: what the type is called as a level."""
    bits = 8 * block_bytes(kind) / TYPES[kind].block
    return int(bits) if bits.is_integer() else bits


def columns_of(kind: str, row_bytes: int) -> int:
    return row_bytes // block_bytes(kind) * TYPES[kind].block


def fitting(kind: str, columns: int) -> str:
    """The type itself, or the one that llama.cpp takes for rows of that many columns."""
    if columns % TYPES[kind].block:
        kind = _FALLBACK.get(kind, "F16")
    return "F16" if columns % TYPES[kind].block else kind


def encode(kind: str, parts: Parts) -> torch.Tensor:
    """The layer's bytes, uint8 [out, bytes a row]."""
    form, out = TYPES[kind], len(parts.codes)
    codes, shift = parts.codes ^ (128 if kind == "Q8_0" else 0), 0
    fields = {"d": parts.d, "m": parts.m, "scales": _pack_scales(kind, parts)}
    for number, (width, run) in enumerate(form.planes):
        plane = (codes >> shift & (1 << width) - 1).unflatten(1, (-1, 8 // width, run))
        fields[f"q{number}"] = sum(plane[:, :, k] << k * width for k in range(8 // width)).to(torch.uint8)
        shift += width
    blocks = codes.shape[1] // form.block
    return torch.cat([fields[name].contiguous().view(out, -1).view(torch.uint8).view(out, blocks, -1)
                      for name in form.layout.split()], dim=-1).flatten(1)


def decode(kind: str, data: torch.Tensor) -> Parts:
    """The inverse of `encode`."""
    form, out = TYPES[kind], len(data)
    sizes = _fields(kind)
    fields = dict(zip(sizes, data.view(out, -1, block_bytes(kind)).split(list(sizes.values()), dim=-1)))
    codes, shift = 0, 0
    for number, (width, run) in enumerate(form.planes):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)[:, None]
        plane = fields[f"q{number}"].flatten(1).unflatten(1, (-1, 1, run)) >> shifts & (1 << width) - 1
        codes = codes | plane.flatten(1) << shift
        shift += width
    d, m = (fields[name].contiguous().view(torch.float16)[..., 0] if name in fields else None for name in "dm")
    scales, minima = _unpack_scales(kind, fields.get("scales"))
    return Parts(codes ^ (128 if kind == "Q8_0" else 0), d, scales, m, minima)


def dequantize(kind: str, data: torch.Tensor) -> torch.Tensor:
    """float32 [out, in], in the order of operations that llama.cpp's and the gguf package's have."""
    if kind == "F16":
        return data.contiguous().view(torch.float16).float()
    form, parts = TYPES[kind], decode(kind, data)
    scale, minimum = grids(kind, parts)
    codes = parts.codes.float().unflatten(1, (-1, form.group))
    return codes.mul_(scale[..., None]).sub_(minimum[..., None]).flatten(1)


def grids(kind: str, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, minimum) of every group, float32 [out, groups]: a weight is scale * code - minimum, and exactly so."""
    form = TYPES[kind]
    groups = form.block // form.group
    scale = parts.d.float().repeat_interleave(groups, 1) * (1 if parts.scales is None else parts.scales)
    if form.middle is not None:
        return scale, scale * form.middle
    minimum = parts.m.float().repeat_interleave(groups, 1) * (-1 if parts.minima is None else parts.minima)
    return scale, minimum


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _fields(kind: str) -> dict[str, int]:
    """Bytes of a block's fields, in their order: float16 d and m, the groups' scales, planes of the codes."""
    form = TYPES[kind]
    sizes = {"d": 2, "m": 2, "scales": 16 if form.group == 16 and kind != "Q3_K" else 12}
    sizes |= {f"q{number}": form.block * width // 8 for number, (width, _) in enumerate(form.planes)}
    return {name: sizes[name] for name in form.layout.split()}


def _pack_scales(kind: str, parts: Parts) -> torch.Tensor | None:
    """uint8 [out, blocks, bytes]."""
    if parts.scales is None:
        return None
    form = TYPES[kind]
    s = (parts.scales + (32 if kind == "Q3_K" else 0)).to(torch.uint8).unflatten(1, (-1, form.block // form.group))
    if kind == "Q6_K":
        return s
    if kind == "Q3_K":                               # four low bits of each, then four times two high ones
        high = (s >> 4).unflatten(-1, (4, 4))
        return torch.cat([s[..., :8] & 15 | s[..., 8:] << 4, sum(high[..., k, :] << 2 * k for k in range(4))], dim=-1)
    m = parts.minima.to(torch.uint8).unflatten(1, (-1, form.block // form.group))
    if kind == "Q2_K":
        return s | m << 4
    return torch.cat([s[..., :4] | s[..., 4:] >> 4 << 6, m[..., :4] | m[..., 4:] >> 4 << 6,
                      s[..., 4:] & 15 | (m[..., 4:] & 15) << 4], dim=-1)


def _unpack_scales(kind: str, data: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(scales, minima), int16 [out, groups]."""
    if data is None:
        return None, None
    s, m = data, None
    if kind == "Q6_K":
        s = data.contiguous().view(torch.int8)
    elif kind == "Q3_K":
        high = torch.cat([data[..., 8:] >> 2 * k & 3 for k in range(4)], dim=-1)
        s = (torch.cat([data[..., :8] & 15, data[..., :8] >> 4], dim=-1) | high << 4).short() - 32
    elif kind == "Q2_K":
        s, m = data & 15, data >> 4
    else:
        low_s, low_m, both = data.unflatten(-1, (3, 4)).unbind(-2)
        s = torch.cat([low_s & 63, both & 15 | low_s >> 6 << 4], dim=-1)
        m = torch.cat([low_m & 63, both >> 4 | low_m >> 6 << 4], dim=-1)
    return s.short().flatten(1), None if m is None else m.short().flatten(1)
