"""Quantized checkpoints that other tools wrote, read layer by layer: their integers, scales and zeros as they are.

compressed-tensors' pack-quantized format, GPTQ's (AutoGPTQ, GPTQModel, auto-round) and GGUF's blocks. Layers are
called what they are called in the model, and errors say what is wrong without the checkpoint's or the layer's name.
"""
import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import safe_open

from formats.gguf import ARCHITECTURES, BITS, decode, interleaved_heads, interleaved_rows, tensor_names
from formats.kquants import TYPES, Blocks, fitting, level_of
from utils.files import read_json

SCALES = (torch.float16, torch.bfloat16, torch.float32)
SAMPLES = 64                     # of every file that a fingerprint reads


class Stored(NamedTuple):
    """What a layer is stored as."""
    kind: str                    # in words, the same for all layers of a uniform checkpoint
    bits: float                  # of a code; of K-quants, and what stands in for them, a weight
    shape: tuple[int, int]       # (out, in)


class Grid(NamedTuple):
    """Of a layer: scale * (code - zero)."""
    scales: torch.Tensor         # [out, groups], float16, bfloat16 or float32
    zeros: torch.Tensor          # uint8 [out, groups], below 2**bits
    group_size: int              # neighbouring columns that share a scale; the last group may have fewer


class Checkpoint(Protocol):
    """Every method but `vector` raises ValueError for a layer that is missing, not quantized or not as expected."""
    path: Path
    format: str
    files: list[Path]
    k_quant: str | None          # the type of a file of K-quants, whose layers are read by `Gguf.blocks`

    def stored(self, name: str) -> Stored: ...
    def grid(self, name: str) -> Grid: ...
    def codes(self, name: str) -> torch.Tensor:
        """uint8 [out, in]."""
    def vector(self, name: str) -> torch.Tensor | None:
        """A parameter [n] that is not quantized, a norm or a bias; None for one that is not there."""


def open_checkpoint(path: str, config) -> Checkpoint:
    """The checkpoint at `path`, a folder or a .gguf file, of the model with `config`. Raises ValueError for a format
    that is not known, and for files that cannot be read."""
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        return Gguf(place, config)
    if not (place / "config.json").is_file():
        raise ValueError("not a folder with config.json and safetensors files, nor a .gguf file")
    found = read_json(place / "config.json").get("quantization_config")
    if found is None and (place / "quantize_config.json").is_file():
        found = {"quant_method": "gptq"} | read_json(place / "quantize_config.json")     # of AutoGPTQ
    found = found if isinstance(found, dict) else {}
    method, packing = found.get("quant_method"), found.get("packing_format")
    if method == "compressed-tensors" and found.get("format") == "pack-quantized":
        return CompressedTensors(place, found)
    layout = found.get("checkpoint_format", found.get("format", "gptq")) if method == "gptq" else {
        "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2", "auto_round:auto_gptq": "gptq"}.get(packing)
    if method in ("gptq", "auto-round") and layout in ("gptq", "gptq_v2"):
        return Gptq(place, found, layout)
    words = "no quantization_config in config.json" if method is None else (
        f"quant_method {method}, " + ", ".join(f"{key} {found[key]}" for key in (
            "format", "checkpoint_format", "packing_format") if key in found))
    raise ValueError(f"not in a format that is read here ({words}): compressed-tensors pack-quantized, gptq, gptq_v2, "
                     f"auto_round, auto_round:auto_gptq, or GGUF")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of the names and sizes of a checkpoint's files and of samples spread over them."""
    digest = hashlib.sha256()
    for file in checkpoint.files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(size // SAMPLES, 4096)):
                stream.seek(start)
                digest.update(stream.read(4096))
    return digest.hexdigest()


class SafetensorsFolder:
    """All tensors of the safetensors files in a folder."""
    marks: tuple[str, ...]       # tensors that every quantized layer has
    k_quant = None

    def __init__(self, path: Path):
        self.path, self.files = path, sorted(path.glob("*.safetensors"))
        if not self.files:
            raise ValueError("has no safetensors files")
        self._holders = {}
        for file in self.files:
            try:
                holder = safe_open(file, framework="pt")
            except Exception as error:               # whatever a damaged header makes the reader stumble over
                raise ValueError(f"{file.name} cannot be read ({error})") from error
            self._holders.update(dict.fromkeys(holder.keys(), holder))

    def has(self, name: str) -> bool:
        return name in self._holders

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._holders[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        return self._holders[name].get_tensor(name)

    def vector(self, name: str) -> torch.Tensor | None:
        return self.tensor(name) if self.has(name) else None

    def check_layer(self, name: str) -> None:
        missing = [mark for mark in self.marks if not self.has(f"{name}.{mark}")]
        if missing:
            raise ValueError("not quantized" if self.has(f"{name}.weight") else f"no {missing[0]} of it")


class CompressedTensors(SafetensorsFolder):
    format = "compressed-tensors"
    marks = ("weight_packed", "weight_scale", "weight_shape")

    def __init__(self, path: Path, config: dict):
        super().__init__(path)
        groups = config.get("config_groups")
        schemes = [(group.get("weights") or {}) for group in groups.values()] if isinstance(groups, dict) else []
        self.bits = sorted({scheme["num_bits"] for scheme in schemes
                            if scheme.get("type", "int") == "int" and scheme.get("num_bits") in range(1, 9)})

    def stored(self, name: str) -> Stored:
        self.check_layer(name)
        shape, words = tuple(self.tensor(f"{name}.weight_shape").tolist()), self.shape(f"{name}.weight_packed")
        # 3, 5, 6 and 7 bits took more words before version 0.18
        fitting = [bits for bits in self.bits if words == (shape[0], -(-shape[-1] * bits // 32))]
        if len(shape) != 2 or len(fitting) != 1:
            raise ValueError(f"weight_packed {list(words)} does not hold {list(shape)} codes of "
                             f"{' or '.join(map(str, self.bits)) or '1 to 8'} bits as compressed-tensors packs them "
                             f"since 0.18; write it again with that")
        return Stored(f"{fitting[0]} bits", fitting[0], shape)

    def codes(self, name: str) -> torch.Tensor:
        _, bits, shape = self.stored(name)
        return unpack(self.tensor(f"{name}.weight_packed"), bits, shape, 1)

    def grid(self, name: str) -> Grid:
        _, bits, (out, columns) = self.stored(name)
        scales = self.tensor(f"{name}.weight_scale")
        groups = scales.shape[-1]
        if columns % groups:
            raise ValueError(f"{columns} columns in {groups} groups, which are not of one size")
        if self.has(f"{name}.weight_zero_point"):
            zeros = unpack(self.tensor(f"{name}.weight_zero_point"), bits, (out, groups), 0)
        else:
            zeros = torch.full((out, groups), 1 << (bits - 1), dtype=torch.uint8)
        if self.has(f"{name}.weight_g_idx"):
            group = self.tensor(f"{name}.weight_g_idx")
        else:
            group = torch.arange(columns) // (columns // groups)
        return in_order_of_columns(scales, zeros, group, (out, columns))


class Gptq(SafetensorsFolder):
    """`format` gptq is version 1, which stores a zero less one."""
    marks = ("qweight", "qzeros", "scales")

    def __init__(self, path: Path, config: dict, format: str):
        super().__init__(path)
        self.format, self.bits, self.group_size = format, config.get("bits"), config.get("group_size")

    def stored(self, name: str) -> Stored:
        self.check_layer(name)
        words, out = self.shape(f"{name}.qweight")
        if self.has(f"{name}.g_idx"):
            columns = self.shape(f"{name}.g_idx")[0]
        elif self.bits in range(1, 9):
            columns = 32 * words // self.bits
        else:
            raise ValueError("neither g_idx nor the configuration's bits say how many columns it has")
        bits = 32 * words // max(columns, 1)
        if bits not in range(1, 9) or words * 32 != columns * bits:
            raise ValueError(f"qweight has {words} words for {columns} columns, which are not of 1 to 8 bits")
        return Stored(f"{bits} bits", bits, (out, columns))

    def codes(self, name: str) -> torch.Tensor:
        _, bits, (out, columns) = self.stored(name)
        return unpack(self.tensor(f"{name}.qweight"), bits, (columns, out), 0).T.contiguous()

    def grid(self, name: str) -> Grid:
        _, bits, (out, columns) = self.stored(name)
        scales = self.tensor(f"{name}.scales")
        zeros = unpack(self.tensor(f"{name}.qzeros"), bits, (len(scales), out), 1)
        if self.format == "gptq":
            if (zeros == (1 << bits) - 1).any():
                raise ValueError(f"a zero is stored as {(1 << bits) - 1}, which readers of GPTQ version 1 take for 0, "
                                 f"for {1 << bits} or for a carry; write it again as gptq_v2")
            zeros += 1
        if self.has(f"{name}.g_idx"):
            group = self.tensor(f"{name}.g_idx")
        else:
            size = self.group_size if isinstance(self.group_size, int) and self.group_size > 0 else columns
            group = torch.arange(columns) // size
        return in_order_of_columns(scales.T, zeros.T, group, (out, columns))


class Gguf:
    """Tensors whose rows GGUF has in another order come in the model's own."""

    def __init__(self, path: Path, config):
        try:
            import gguf
        except ImportError as error:
            raise ValueError("the gguf package is not installed; pip install -r requirements-gguf.txt") from error
        if config.model_type not in ARCHITECTURES:
            raise ValueError(f"GGUF files of {config.model_type} models are not read here, only of "
                             f"{', '.join(ARCHITECTURES)}")
        try:
            reader = gguf.GGUFReader(path)
            architecture = reader.get_field("general.architecture").contents()
        except Exception as error:                   # as above
            raise ValueError(f"cannot be read as GGUF ({error})") from error
        if architecture != ARCHITECTURES[config.model_type]:
            raise ValueError(f"a GGUF file of architecture {architecture}, but the model is {config.model_type}")
        self.path, self.format, self.files = path, "GGUF", [path]
        self._names, self._heads = tensor_names(config), interleaved_heads(config)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors if tensor.name.startswith("blk."))
        # of a file that is uniform: the rows of some layers may need another type
        usual = [kind for kind, _ in types.most_common() if kind in TYPES and kind != "F16"]
        self.k_quant = next((kind for kind in usual if kind.endswith("_K")), None)
        self._plain = next(iter(usual), None)

    def read_as_blocks(self) -> bool:
        """Read the layers of a file that has no K-quants as it would those, by their bytes, in bits that count
        everything. Whether that can be done."""
        self.k_quant = self._plain
        return self.k_quant is not None

    def _tensor(self, name: str):
        return self._tensors.get(self._names(name))

    def _in_order_of_rows(self, name: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
        rows = interleaved_rows(len(tensors[0]), self._heads.get(name.rpartition(".")[2])).argsort()
        return [tensor[rows] for tensor in tensors]

    def stored(self, name: str) -> Stored:
        tensor = self._tensor(f"{name}.weight")
        if tensor is None:
            raise ValueError("not in the file")
        kind, shape = tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1])
        if self.k_quant and kind in (self.k_quant, fitting(self.k_quant, shape[1])):
            return Stored(self.k_quant, level_of(kind), shape)
        if kind not in BITS:
            raise ValueError(f"of type {kind}, which is not one of {', '.join(BITS)}, nor a K-quant like most of the "
                             f"file")
        return Stored(kind, BITS[kind], shape)

    def blocks(self, name: str) -> Blocks:
        """The layer's bytes, in the model's order of rows."""
        tensor = self._tensor(f"{name}.weight")
        data = torch.from_numpy(np.array(tensor.data).view(np.uint8)).view(len(tensor.data), -1)
        return Blocks(tensor.tensor_type.name, self._in_order_of_rows(name, data)[0].contiguous())

    def _decoded(self, name: str):
        layer = decode(self.stored(name).kind, self._tensor(f"{name}.weight").data)
        return layer, self._in_order_of_rows(name, layer.codes, layer.scales, layer.zeros)

    def codes(self, name: str) -> torch.Tensor:
        return self._decoded(name)[1][0]

    def grid(self, name: str) -> Grid:
        layer, (_, scales, zeros) = self._decoded(name)
        check_scales(scales, zeros.shape)
        return Grid(scales, zeros, layer.group_size)

    def vector(self, name: str) -> torch.Tensor | None:
        tensor = self._tensor(name)
        if tensor is None or tensor.tensor_type.name not in ("F32", "F16"):
            return None
        return self._in_order_of_rows(name.rpartition(".")[0], torch.from_numpy(tensor.data.copy()))[0]


def unpack(words: torch.Tensor, bits: int, shape: tuple[int, int], dim: int) -> torch.Tensor:
    """uint8 codes of `shape` from int32 words in which they lie densely, lowest bits first, along `dim`."""
    expected = [*shape]
    expected[dim] = -(-shape[dim] * bits // 32)
    if words.dtype != torch.int32 or list(words.shape) != expected:
        raise ValueError(f"{words.dtype} {list(words.shape)} where int32 {expected} holds {list(shape)} codes of "
                         f"{bits} bits")
    return (unpack_from_int32(words, bits, torch.Size(shape), dim).short() + (1 << (bits - 1))).to(torch.uint8)


def in_order_of_columns(scales: torch.Tensor, zeros: torch.Tensor, group: torch.Tensor, shape: tuple[int, int]) -> Grid:
    """The grid of a layer whose column j is of group group[j], a column of `scales` and `zeros` [out, groups].

    Raises ValueError where the columns of a group are not neighbours.
    """
    check_scales(scales, zeros.shape)
    groups = scales.shape[1]
    if scales.shape[0] != shape[0] or list(group.shape) != [shape[1]] or not 0 <= group.min() <= group.max() < groups:
        raise ValueError(f"scales {list(scales.shape)} and groups of {list(group.shape)} columns do not fit {shape}")
    group = group.long()
    size = int((group == group[0]).sum())
    if not torch.equal(group[::size].repeat_interleave(size)[:shape[1]], group):
        raise ValueError("its groups are of columns that are not neighbours (act-order), for which the database has no "
                         "place; quantize with static groups, or without desc_act")
    return Grid(scales[:, group[::size]].contiguous(), zeros[:, group[::size]].contiguous(), size)


def check_scales(scales: torch.Tensor, shape: torch.Size) -> None:
    if scales.dtype not in SCALES or scales.shape != shape or scales.dim() != 2:
        raise ValueError(f"scales {scales.dtype} {list(scales.shape)}, where floating-point ones {list(shape)} were "
                         f"expected")
    if not torch.isfinite(scales).all():
        raise ValueError("NaN or infinite scales")
