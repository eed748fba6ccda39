"""What the export tests share: databases of random levels, and checkpoints reloaded in a process of their own."""
import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import evo_quant
import families
from database import packing, store

MIXED_TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention",
               "sliding_attention"]


def six_blocks(name: str, **overrides) -> torch.nn.Module:
    if "layer_types" in families.FAMILIES[name][1]:
        overrides["layer_types"] = MIXED_TYPES
    return families.build(name, num_hidden_layers=6, **overrides)


def save_model(folder, model, tokenizer, **options) -> str:
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_database(folder, model_folder, method: str, levels, group_size: int | None = None, sym: bool = False,
                   layers=lambda name: True) -> str:
    """A database of random levels for the linear layers of a checkpoint's blocks, as a build would write it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    manifest = {"format": store.FORMAT, "method": method, "model": str(model_folder), "weights_sha256": "",
                "config_sha256": store.config_sha256(AutoConfig.from_pretrained(model_folder)),
                "calibration_sha256": "", "flags": {"group_size": group_size}, "layers": {}}
    folder = Path(folder)
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".layers." in name and layers(name):
            weight, stored = layer.weight.detach(), {}
            for level in levels:
                if method == "sparsegpt":
                    keep = torch.rand(weight.shape, generator=generator) < 0.5 - 0.05 * level
                    packed, entry = packing.pack_sparse(weight, keep), {"kept": int(keep.sum()), "error": 0.1}
                else:
                    packed = random_quantized(weight, level, group_size or weight.shape[1], sym, generator)
                    entry = {"bits": weight.numel() * level, "overhead_bits": 0, "error": 0.1}
                stored[level] = (packed, entry)
            manifest["layers"][name] = store.write_layer(folder, name, tuple(weight.shape), stored)
    store.write_manifest(folder, manifest)
    return str(folder)


def random_quantized(weight: torch.Tensor, bits: int, group_size: int, sym: bool, generator) -> packing.Packed:
    """Random codes that use every value, with a scale and a zero a group: weights of about the layer's size."""
    out, columns = weight.shape
    groups = -(-columns // group_size)
    codes = torch.randint(2**bits, (out, columns), generator=generator, dtype=torch.uint8)
    codes.view(-1)[:2] = torch.tensor([0, 2**bits - 1], dtype=torch.uint8)
    zeros = (torch.full((out, groups), 2**(bits - 1)) if sym else
             torch.randint(2**bits // 4, 3 * 2**bits // 4 + 1, (out, groups), generator=generator)).to(torch.uint8)
    scales = ((0.5 + torch.rand(out, groups, generator=generator)) * 3 * columns**-0.5 / 2**bits).half()
    return packing.pack_quantized(codes, scales, zeros, bits)


def search_bits(model: str, database: store.Database, text: str, out: Path, *flags: str) -> dict:
    """A short search of evo_quant.py on 256 tokens: out/run/found.txt."""
    return evo_quant.main([
        "--model_name_or_path", model, "--calibration_data", text, "--calibration_sequence_length", "32",
        "--calibration_tokens", "256", "--quant_weights_path", str(database.path), "--no_eval",
        "--initial_tokens", "64", "--generations", "1", "--offspring", "2", "--survivors_per_selection", "1",
        "--tokens_per_selection", "64", "--output_dir", str(out / "run"), "--configuration_name", "found.txt", *flags])


def write_levels(path, database: str, choose) -> str:
    """A configuration file with the level `choose(number, name)` for every layer of a database."""
    names = store.Database.open(database).layers
    Path(path).write_text("".join(f"{name}: {choose(number, name)}\n" for number, name in enumerate(names)))
    return str(path)


def reload(export: str | Path, tokens: torch.Tensor, dtype: str = "auto") -> dict[str, torch.Tensor]:
    """A checkpoint loaded by plain transformers in a fresh process that knows nothing of this repository.

    "logits" [batch, length, vocabulary] of `tokens`; "cached" and "uncached", the first row's first 8 tokens with their
    greedy continuation by 32; and "weight <name>" of every parameter.
    """
    process, folder = reloading_process()
    answer = folder / "answer.safetensors"
    request = {"folder": str(export), "tokens": tokens.tolist(), "dtype": dtype, "answer": str(answer)}
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n", "the reloading process failed, see its standard error"
    return {name: tensor.clone() for name, tensor in load_file(answer).items()}


@functools.cache
def reloading_process() -> tuple[subprocess.Popen, Path]:
    """One process for all tests: importing transformers takes longer than all that is asked of it."""
    folder = tempfile.TemporaryDirectory()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-P", "-c", _RELOAD], cwd=folder.name, env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    @atexit.register
    def close():
        process.kill()
        process.wait()
        folder.cleanup()
    return process, Path(folder.name)


@torch.no_grad()
def greedy(model, tokens: torch.Tensor, count: int = 32) -> torch.Tensor:
    """Greedy continuation of [1, length] by whole forwards, without any cache or generation code."""
    for _ in range(count):
        tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


_RELOAD = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for line in sys.stdin:
    request = json.loads(line)
    model, report = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=request["dtype"],
                                                         output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    AutoTokenizer.from_pretrained(request["folder"])
    tokens = torch.tensor(request["tokens"])
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        result = {"logits": model(input_ids=tokens).logits}
        for name, cache in (("cached", True), ("uncached", False)):
            result[name] = model.generate(tokens[:1, :8], max_new_tokens=32, do_sample=False, use_cache=cache)
    result.update({f"weight {name}": parameter.detach().contiguous() for name, parameter in model.named_parameters()})
    save_file(result, request["answer"])
    print("done", flush=True)
"""
