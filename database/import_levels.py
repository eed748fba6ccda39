"""Levels that other tools quantized: a database of uniform checkpoints, their integers, scales and zeros as they are.

    python -m database.import_levels --model_name_or_path meta-llama/Meta-Llama-3-8B --checkpoints W2 W3 W4 \\
        --save_dir db/llama3-imported
"""
import argparse
from collections.abc import Mapping
from functools import partial

import torch

from database.build import add_build_flags, build, run
from database.packing import Packed, pack_quantized, unpack_quantized
from database.solver import output_errors
from formats.kquants import dequantize, level_of
from formats.quantized_checkpoints import Checkpoint, Gguf, fingerprint, open_checkpoint
from utils.decoder import Decoder
from utils.experts import Layer

LEAST_COSINE = 0.5               # of a layer and its level; unrelated weights have next to 0, 2 bits about 0.9
NORM_TOLERANCE = 1e-2            # a norm may have been rounded to another dtype


def open_checkpoints(checkpoints: dict[str, Checkpoint], args: argparse.Namespace, config) -> None:
    """Fill `checkpoints` by path, and put names and fingerprints in the place of the flag's paths, for the manifest."""
    for path in args.checkpoints:
        try:
            checkpoints[path] = open_checkpoint(path, config)
        except ValueError as error:
            raise ValueError(f"--checkpoints {path}: {error}") from error
    for path, found in checkpoints.items() if any(found.k_quant for found in checkpoints.values()) else ():
        if not found.k_quant and not (isinstance(found, Gguf) and found.read_as_blocks()):
            raise ValueError(f"--checkpoints {path}: levels are called by the bits of their codes there, and by all "
                             f"that they take in the K-quants beside it; with those, give GGUF files of Q8_0, Q4_0, "
                             f"Q5_0 or Q5_1 alone")
    args.checkpoints = sorted(f"{found.path.resolve().name} ({found.format}, sha256 {fingerprint(found)[:16]})"
                              for found in checkpoints.values())


def check(checkpoints: Mapping[str, Checkpoint], decoder: Decoder, layers: list[dict[str, Layer]]) -> None:
    """Raise ValueError, naming the checkpoint and the layer, where they do not all hold the decoder's layers, each in
    one format and in bitwidths that differ."""
    names = {name: layer for block in layers for name, layer in block.items()}
    seen: dict[float, str] = {}
    for path, checkpoint in checkpoints.items():
        first = None
        for name, layer in names.items():
            try:
                stored = checkpoint.stored(name)
                if stored.shape != tuple(layer.weight.shape):
                    raise ValueError(f"{list(stored.shape)}, but {list(layer.weight.shape)} in the model; give a "
                                     f"checkpoint of this model")
                if first and stored.kind != first[1].kind:
                    raise ValueError(f"{stored.kind}, but {first[0]} has {first[1].kind}; a level is the same in all "
                                     f"layers, so give a uniform checkpoint, or leave layers out with "
                                     f"--quantizable_modules")
                if not checkpoint.k_quant:
                    checkpoint.grid(name)
            except ValueError as error:
                raise ValueError(f"--checkpoints {path}: {name}: {error}") from error
            first = first or (name, stored)
        level = level_of(checkpoint.k_quant) if checkpoint.k_quant else first[1].bits
        if level in seen:
            raise ValueError(f"--checkpoints {seen[level]} {path}: both have {level:g} bits, and a database has one "
                             f"level a bitwidth; leave one of them out")
        seen[level] = path
        for name, parameter in decoder.model.named_parameters():
            theirs = checkpoint.vector(name) if parameter.dim() == 1 else None
            if theirs is not None and not same(parameter, theirs):
                raise ValueError(f"--checkpoints {path}: {name}: not the model's own, so its layers belong to other "
                                 f"weights, or to weights that were scaled; give a checkpoint of this model")


def same(parameter: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two vectors agree but for rounding to another dtype."""
    ours, theirs = parameter.float().cpu(), theirs.float()
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= NORM_TOLERANCE * ours.abs().max())


def read_levels(checkpoints: Mapping[str, Checkpoint], name: str, weight: torch.Tensor, hessian: torch.Tensor,
                args: argparse.Namespace) -> tuple[dict[float, tuple[Packed, dict]], None]:
    """bitwidth -> (packed tensors, manifest entry) of a layer, for `build`. Raises ValueError, naming the checkpoint,
    where its weights are nothing like the layer's."""
    weight, levels = weight.float(), {}
    for path, checkpoint in checkpoints.items():
        bits = checkpoint.stored(name).bits
        if checkpoint.k_quant:
            blocks = checkpoint.blocks(name)
            packed = {"blocks": blocks.data.to(weight.device)}
            entry = {"bits": 8 * blocks.data.nbytes, "overhead_bits": 0, "type": blocks.kind}
        else:
            grid = checkpoint.grid(name)
            parts = [part.to(weight.device) for part in (checkpoint.codes(name), grid.scales, grid.zeros)]
            packed = pack_quantized(*parts, bits)
            entry = {"bits": weight.numel() * bits, "overhead_bits": 8 * sum(part.nbytes for part in parts[1:]),
                     "group_size": grid.group_size, "sym": bool((grid.zeros == 1 << bits - 1).all()),
                     **scales_kept(grid.scales)}
        level = unpack(packed, entry, weight.shape, bits)
        if (weight * level).sum() < LEAST_COSINE * weight.norm() * level.norm():
            raise ValueError(f"--checkpoints {path}: its weights are nothing like the model's; give a checkpoint of "
                             f"this model")
        levels[bits] = packed, entry
    unpacked = (unpack(*level, weight.shape, bits).T for bits, level in levels.items())
    errors = output_errors(weight.T.contiguous(), unpacked, hessian)
    for (_, entry), error in zip(levels.values(), errors, strict=True):
        entry["error"] = error
    return levels, None


def scales_kept(scales: torch.Tensor) -> dict:
    """For the manifest, where they are not in half precision: their dtype, and whether that would hold them."""
    dtype = str(scales.dtype).removeprefix("torch.")
    return {} if dtype == "float16" else {"scales": dtype, "half": torch.equal(scales, scales.half().to(scales.dtype))}


def unpack(packed: Packed, entry: dict, shape: tuple[int, int], bits: float) -> torch.Tensor:
    """The level's weight, float32 [out, in]."""
    if "type" in entry:
        return dequantize(entry["type"], packed["blocks"])
    return unpack_quantized(packed, shape, bits, entry["group_size"])


def main(args: argparse.Namespace) -> None:
    doubled = [path for path in args.checkpoints if args.checkpoints.count(path) > 1]
    if doubled:
        raise ValueError(f"--checkpoints {doubled[0]}: given twice; leave it out once")
    checkpoints: dict[str, Checkpoint] = {}
    build(args, "gptq", "quantizable_modules", partial(read_levels, checkpoints),
          partial(open_checkpoints, checkpoints), None, partial(check, checkpoints))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m database.import_levels", description=__doc__.split("\n")[0])
    add_build_flags(parser, "--quantizable_modules", solves=False)
    group = parser.add_argument_group("levels")
    group.add_argument("--checkpoints", nargs="+", required=True, metavar="PATH",
                       help="folders (compressed-tensors pack-quantized, GPTQ, auto-round) or .gguf files (Q4_0, Q4_1, "
                            "Q5_0, Q5_1, Q8_0, Q2_K to Q6_K) of this model, each of another bitwidth and uniform in "
                            "all layers")
    return parser


if __name__ == "__main__":
    run(make_parser(), main)
