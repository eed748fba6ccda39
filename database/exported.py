"""What an export makes of a database's levels: whether its format holds one as it is, and in how many bytes."""
from collections.abc import Callable

from database.store import Database
from formats import compressed_tensors, gguf, mlx
from utils.decoder import Decoder
from utils.experts import ExpertLayer

FORMATS: dict[str, Callable[..., int]] = {
    "compressed-tensors": compressed_tensors.layer_bytes, "gguf": gguf.layer_bytes,
    "mlx": lambda shape, bits, size, _: mlx.layer_bytes(shape, bits, size, "mlx"),
    "mlx-float16": lambda shape, bits, size, _: mlx.layer_bytes(shape, bits, size, "mlx-float16")}


def layer_bytes(database: Database, name: str, level: float, format: str) -> int:
    """Of a layer at a level in an export of --format `format`, at most. Raises ValueError where the format cannot hold
    the level as it is."""
    if kind := database.type(name, level):
        if format != "gguf":
            raise ValueError(f"--format {format}: {name} has {kind} blocks, and only --format gguf holds those")
        return database.bits(name, level) // 8
    try:
        return FORMATS[format](database.shape(name), level, database.group_size(name, level),
                               bool(database.manifest["flags"].get("sym")))
    except ValueError as error:
        raise ValueError(f"--format {format}: {name} has {error}") from error


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
                             f"be exported; build a database with --group_size 32, 64 or 128, or leave the flag out")
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
