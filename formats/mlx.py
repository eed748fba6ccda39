"""Write a model for MLX (Apple machines): mlx-lm loads it as it is, with the database's integers, not rounded again.

MLX holds scale * code + bias in groups of 32, 64 or 128 columns, and a layer is scale * (code - zero), so that its bias
is -zero * scale. In float32 that is exact; float16 rounds the bias, by less than 0.001 of a group's largest weight.
"""
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import nn

from formats.compressed_tensors import Quantized, bits_a_weight
from formats.gguf import check_block, sliding_window
from utils.model import save_pretrained

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (128, 64, 32)
MODELS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")     # tested
SCALES = {"mlx": torch.float32, "mlx-float16": torch.float16}         # --format -> dtype of scales and biases


def group_size(columns: int, bits: int, size: int) -> int:
    """The largest group that holds a layer of `columns`, in groups of `size`, exactly. Raises ValueError with the
    reason where there is none."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits, and MLX has {', '.join(map(str, BITS))}")
    fitting = next((group for group in GROUP_SIZES if columns % group == 0 and (size >= columns or size % group == 0)),
                   None)
    if fitting is None:
        raise ValueError(f"rows of {columns} in groups of {size}, which none of MLX's groups of 32, 64 and 128 divides")
    return fitting


def layout(shape: tuple[int, int], bits: int, size: int, format: str) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of the tensors of a layer [out, in] in groups of `size`. Raises ValueError as `group_size`."""
    out, columns = shape
    grid = (f"F{8 * SCALES[format].itemsize}", [out, columns // group_size(columns, bits, size)])
    return {"weight": ("U32", [out, columns * bits // 32]), "scales": grid, "biases": grid}


def check_model(config) -> None:
    """Raise ValueError for a model that mlx-lm is not known to run as transformers does, by the same names."""
    if config.model_type not in MODELS:
        raise ValueError(f"--format mlx: {config.model_type} models have not been tried, only {', '.join(MODELS)}; use "
                         f"another --format")
    check_block(config, "mlx")
    usual = config.hidden_size // config.num_attention_heads
    if config.model_type in ("phi3", "qwen2") and (getattr(config, "head_dim", None) or usual) != usual:
        raise ValueError(f"--format mlx: mlx-lm takes the heads of {config.model_type} models to have {usual} columns, "
                         f"hidden size over heads, and this one's have {config.head_dim}; use another --format")
    if sliding_window(config):
        raise ValueError(f"--format mlx: mlx-lm would ignore this model's sliding window of {sliding_window(config)} "
                         f"tokens; use another --format")
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type != "default" and (rope_type, config.model_type) != ("llama3", "llama"):
        raise ValueError(f"--format mlx: rotary embeddings of type {rope_type} have not been tried for "
                         f"{config.model_type}; use another --format")


def pack(layer: Quantized, scales_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The layer's tensors by the last part of their names. Raises ValueError where MLX cannot hold it."""
    group = group_size(layer.codes.shape[1], layer.bits, layer.group_size)
    columns = torch.arange(0, layer.codes.shape[1], group) // layer.group_size
    scales = layer.scales[:, columns].float()
    # compressed-tensors, too, has a row of codes as one number, the first code in the lowest bits
    words = pack_to_int32((layer.codes.short() - (1 << (layer.bits - 1))).to(torch.int8), layer.bits)
    return {"weight": words.view(torch.uint32), "scales": scales.to(scales_dtype),
            "biases": (scales * -layer.zeros[:, columns].float()).to(scales_dtype)}


def write_mlx(folder: Path, model: nn.Module, tokenizer, quantized: Mapping[str, Quantized], max_shard_size: str,
              format: str) -> dict:
    """Write what mlx-lm loads; returns what to report of the quantized layers."""
    stored, schemes = 0, {}
    replaced = {model.get_parameter(f"{name}.weight").data_ptr() for name in quantized}      # under every tied name
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.data_ptr() not in replaced}
    for name, layer in quantized.items():
        packed = pack(layer, SCALES[format])
        stored += sum(tensor.nbytes for tensor in packed.values())
        state.update({f"{name}.{part}": tensor for part, tensor in packed.items()})
        schemes[name] = {"group_size": layer.codes.shape[1] // packed["scales"].shape[1], "bits": layer.bits}
    save_pretrained(model, tokenizer, folder, state_dict=state, max_shard_size=max_shard_size)
    for file in folder.glob("*.safetensors"):        # transformers writes its own mark
        save_file(load_file(file), file, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    usual = max(schemes.values(), key=list(schemes.values()).count)
    config["quantization"] = config["quantization_config"] = {**usual, "mode": "affine", **schemes}
    rope = config["rope_parameters"]                 # mlx-lm's classes look for it where transformers 4 had it
    config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    kind = str(SCALES[format]).removeprefix("torch.")
    rounded = ", which rounds the biases" if format == "mlx-float16" else ""
    return {"notes": [f"Scales and biases are {kind}{rounded}. Read back with mlx-lm 0.32.2 on mlx 0.32.4."],
            **bits_a_weight(quantized.values(), stored)}
