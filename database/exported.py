"""What an export makes of a database's levels: whether its format holds one as it is, and in how many bytes."""
import json
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from database.store import Database
from formats import compressed_tensors, gguf, mlx
from utils.decoder import Decoder
from utils.experts import ExpertLayer
from utils.units import EXPERT

FORMATS = ("compressed-tensors", "gguf", *mlx.SCALES)
SIZES = {"I64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2}       # safetensors' dtypes in a file's order
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def layer_bytes(database: Database, name: str, level: float, format: str) -> int:
    """Of a layer at a level in an export of --format `format`, at most. Raises ValueError where the format cannot hold
    the level as it is."""
    if format != "gguf":
        return sum(_bytes(*tensor) for tensor in _layout(database, name, level, format).values())
    if database.type(name, level):
        return gguf.padded(database.bits(name, level) // 8)
    if not database.scales(name, level)[1]:
        raise ValueError(f"--format {format}: {name} has scales that float16 cannot hold, which GGUF's blocks have")
    return gguf.padded(_described(gguf.layer_bytes, database, name, level, format))


def other_bytes(model: nn.Module, tokenizer, dtype: torch.dtype, database: Database, levels: Mapping[str, float],
                format: str) -> int:
    """Of a whole export all but its layers, which `layer_bytes` has: embeddings, head and norms in `dtype`, and the
    file's header, with the layers at `levels`; at lower ones it is shorter by some digits."""
    if format == "gguf":
        return gguf.other_bytes(model, tokenizer, levels, dtype.itemsize)
    stored = {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in levels:
            stored |= {f"{layer}.{part}": found
                       for part, found in _layout(database, layer, levels[layer], format).items()}
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            stored[name] = DTYPES[dtype], list(tensor.shape)
    header, offset = {"__metadata__": {"format": "mlx"}}, 0
    for name, (kind, shape) in sorted(stored.items(), key=lambda item: (list(SIZES).index(item[1][0]), item[0])):
        begin, offset = offset, offset + _bytes(kind, shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, offset]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + offset - sum(layer_bytes(database, *item, format) for item in levels.items())


def _layout(database: Database, name: str, level: float, format: str) -> dict[str, tuple[str, list[int]]]:
    if kind := database.type(name, level):
        raise ValueError(f"--format {format}: {name} has {kind} blocks, and only --format gguf holds those")
    if format == "compressed-tensors":
        if database.is_end(name):
            raise ValueError(f"--format {format}: {name} has quantized rows of an embedding or head, which what reads "
                             f"this format takes as they are; use --format mlx or gguf")
        if EXPERT.fullmatch(name):
            compressed_tensors.check_expert(name, level, database.symmetric(name, level))
        found = _described(compressed_tensors.layout, database, name, level, format)
        return found | {"weight_scale": (DTYPES[database.scales(name, level)[0]], found["weight_scale"][1])}
    return _described(lambda *layer: mlx.layout(*layer[:3], format), database, name, level, format)


def _described(function: Callable, database: Database, name: str, level: float, format: str):
    try:
        return function(database.shape(name), level, database.group_size(name, level),
                        database.symmetric(name, level))
    except ValueError as error:
        raise ValueError(f"--format {format}: {name} has {error}") from error


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    return SIZES[dtype] * math.prod(shape)


def exportable_levels(database: Database, format: str | None) -> dict[str, list[float]]:
    """Of every layer the levels that the format holds, all without one; says what is left out. Raises ValueError where
    a layer has none."""
    levels = {name: database.levels(name) for name in database.layers}
    left_out: dict[str, str] = {}
    for name, known in levels.items() if format else ():
        for level in tuple(known):
            try:
                layer_bytes(database, name, level, format)
            except ValueError as error:
                known.remove(level)
                left_out.setdefault(str(error).partition(" has ")[2], name)
        if not known:
            raise ValueError(f"--for_format {format}: {name} has {next(reversed(left_out))}, so none of its levels can "
                             f"be exported; build a database of others (--group_size 32, 64 or 128), or leave the "
                             f"flag out")
    for reason, name in left_out.items():
        print(f"--for_format {format}: {name} and others like it are not searched at levels that it cannot hold: "
              f"{reason}")
    return levels


def check_experts(decoder: Decoder, database: Database) -> None:
    """Raise ValueError for a mixture whose experts transformers would not read from compressed-tensors."""
    experts = {name: layer for name, layer in decoder.layers.items() if isinstance(layer, ExpertLayer)}
    if not all(layer.separate for layer in experts.values()):
        raise ValueError(f"--format compressed-tensors: transformers reads no quantized experts of "
                         f"{type(decoder.model).__name__}; use --format dense")
    stored = set(database.layers)
    missing = next((name for name in experts if name not in stored), None)
    if missing:
        raise ValueError(f"--format compressed-tensors: {database.path} lacks {missing}, and transformers reads all "
                         f"of a model's experts quantized or none; build a database of all layers, or use --format "
                         f"dense")


def announce_packed(decoder: Decoder, database: Database, format: str | None) -> None:
    """Say before a search why transformers would not load its packed export; raise ValueError with that where this is
    the format asked for."""
    try:
        check_experts(decoder, database)
        for name in filter(database.is_end, database.layers):
            layer_bytes(database, name, database.levels(name)[0], "compressed-tensors")
        compressed_tensors.check_loadable(decoder.model, database.layers)
    except ValueError as error:
        if format == "compressed-tensors":
            raise
        print(f"export.py {error}")
