"""Load a causal language model and its tokenizer, and save them."""
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file

from utils import distributed
from utils.decoder import Decoder
from utils.files import PARTIAL, move_checkpoint, naming
from utils.fitness import out_of_memory

MORE_TOKENS = re.compile(r"nextn_predict|mtp")   # fields that count layers which predict more than the next token
SAMPLE = 256                     # bytes at each of three places of a tensor that `weights_fingerprint` reads
KEPT_BYTES = 2**30               # of freed memory that a CPU's allocator does not give back
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def load_config(name: str, trust_remote_code: bool = False):
    """The model's configuration. Raises ValueError naming the flag when there is none at `name`."""
    with _naming_the_flag("--model_name_or_path", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def dtype_in(config) -> torch.dtype | None:
    """Of a checkpoint's weights, where its configuration says it: of all of it, or of the text model alone."""
    return config.dtype or config.get_text_config(decoder=True).dtype


def check_unpacked(model: nn.Module, flag: str, name: str) -> None:
    """Raise ValueError for a model whose weights are in fewer bits already and stay so when they are loaded."""
    found = getattr(model.config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "")
        raise ValueError(f"{flag} {name}: its weights are quantized already ({getattr(method, 'value', method)}), and "
                         f"stay so; give the checkpoint that it was made from")


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in `dtype`, but for what its class keeps in float32, as transformers loads it."""
    kept = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
            *((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(f".{part}." in f".{name}." for part in kept):
            tensor.data = tensor.data.to(dtype)
    return model


def weights_fingerprint(name: str) -> str | None:
    """Tells models of one configuration apart, in seconds whatever their size: a hash of the name, dtype and shape of
    every tensor of a checkpoint, and of three samples of each. None where it has no safetensors."""
    digest, tensors = hashlib.sha256(), []
    for file in _safetensors(name):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            try:                                     # a page of git-lfs begins with no size
                header = json.loads(stream.read(min(size, file.stat().st_size)))
                ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"--model_name_or_path {name}: {file.name} is not a safetensors file, or damaged; "
                                 f"fetch it again") from error
            if 8 + size + max(ends, default=0) != file.stat().st_size:
                raise ValueError(f"--model_name_or_path {name}: {file.name} is cut off; fetch it again")
        tensors += [(key, entry, file, 8 + size) for key, entry in header.items() if key != "__metadata__"]
    for key, entry, file, start in sorted(tensors, key=lambda tensor: tensor[0]):        # however they are split
        digest.update(json.dumps([key, entry["dtype"], entry["shape"]]).encode())
        first, last = entry["data_offsets"]
        with file.open("rb") as stream:
            for place in (first, (first + last) // 2, max(first, last - SAMPLE)):
                stream.seek(start + place)
                digest.update(stream.read(min(SAMPLE, last - place)))
    return digest.hexdigest() if tensors else None


def _safetensors(name: str) -> list[Path]:
    """The files of a checkpoint in a folder, or of a model on the hub where they are cached already."""
    def found(file: str) -> Path | None:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, local_files_only=True,
                           _raise_exceptions_for_connection_errors=False)
        return Path(path) if path else None

    index = found("model.safetensors.index.json")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else ["model.safetensors"]
    return [path for path in map(found, names) if path]


def load_tokenizer(name: str, use_fast: bool = True, trust_remote_code: bool = False):
    """The tokenizer at `name`. Raises ValueError naming the flag when there is none."""
    with _naming_the_flag("--tokenizer_name", name):
        return AutoTokenizer.from_pretrained(name, use_fast=use_fast, trust_remote_code=trust_remote_code)


def default_device(device: str | None = None) -> torch.device:
    """The device named by --device, else the first GPU, else the CPU; of several processes each has a GPU of its own.

    Raises ValueError when there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if distributed.world_size() > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise ValueError(f"--device {device}: each process has a GPU of its own; use cuda")
        device = f"cuda:{distributed.local_rank()}"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: not available here ({str(error).splitlines()[0]}); use cpu, cuda or "
                         f"cuda:N") from error
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)    # Triton's kernels are launched on the current device, not on their arguments'
    return chosen


def keep_freed_memory(num_bytes: int = KEPT_BYTES, largest: int = 2**25) -> bool:
    """Have glibc keep up to `num_bytes` of freed memory, and map no array below `largest` bytes (32 MB, its most) by
    itself. Returns whether this is glibc.

    All blocks need activations of the same sizes. By default their pages are given back and faulted in again block by
    block, which takes a fifth of a small model's time on a CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3          # as in malloc.h
    return bool(mallopt(mmap_threshold, largest) and mallopt(trim_threshold, num_bytes))


def tune_process(device: torch.device) -> None:
    """What this process's memory and attention should be like from now on, for models on `device`."""
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        # its plans take 30 ms for every new shape, and a search has hundreds of shapes
        torch.backends.cuda.enable_cudnn_sdp(False)


def model_class(config) -> type:
    """What loads a causal language model of `config`: with the tower where transformers has no text model alone."""
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((kind for kind in kinds if type(config) in kind._model_mapping), kinds[0])


def load_decoder(name: str, dtype: str = "auto", device: str | torch.device | None = None,
                 attn_implementation: str | None = None, trust_remote_code: bool = False, offload_blocks: bool = False,
                 compile_blocks: bool = False, flag: str = "--model_name_or_path") -> Decoder:
    """Load a causal language model for inference, with `offload_blocks` its blocks into host memory. The process is
    as `tune_process` has it from then on.

    `dtype` "auto" is the checkpoint's own on a GPU and float32 on a CPU, of which only some are fast in bfloat16.
    Raises ValueError naming `flag` for an unreadable checkpoint, or one in which no decoder blocks are recognised.
    """
    device = default_device(device) if device is None or isinstance(device, str) else device
    tune_process(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: use one of auto, {', '.join(DTYPES)}")
    if attn_implementation == "flash_attention_2" and (offload_blocks or device.type == "cpu"):
        raise ValueError("--attn_implementation flash_attention_2: runs on a GPU only, and the model is loaded into "
                         "the host's memory; use sdpa, or leave out --device cpu and --cpu_offload_modules")
    torch_dtype = DTYPES.get(dtype) or ("auto" if device.type != "cpu" else torch.float32)
    with _naming_the_flag(flag, name):
        # unpickling can run code, too; and transformers draws weights that a checkpoint lacks at random
        config = load_config(name, trust_remote_code)
        model, found = model_class(config).from_pretrained(
            name, dtype=torch_dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code,
            use_safetensors=None if trust_remote_code else True, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"its weights lack {min(found['missing_keys'])}")
    for parameter in model.parameters():             # what was stored in fewer bits may have been unpacked to another
        if torch_dtype != "auto" and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch_dtype)
    try:
        # torch.compile would have a variant for every number of documents
        decoder = Decoder(model if offload_blocks else model.to(device), device if offload_blocks else None,
                          by_document=device.type == "cuda" and not compile_blocks)
    except ValueError:
        raise
    except Exception as error:           # a family with ways of its own ends in whatever these stumble over
        if out_of_memory(error):
            raise ValueError(f"{flag} {name}: too large for the device; add --cpu_offload_modules, or use "
                             f"--dtype bfloat16") from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ValueError(f"{flag} {name}: the blocks of {type(model).__name__} cannot be run one by one ({reason}); "
                         f"give a model of another family") from error
    if compile_blocks:
        decoder.compile_blocks()
    return decoder


def load_whole(model_class: type[nn.Module], name: str | Path, dtype: torch.dtype) -> nn.Module:
    """A checkpoint as a class of transformers, on the host: for export of more than what is searched."""
    return model_class.from_pretrained(name, dtype=dtype, use_safetensors=True)


@contextmanager
def _naming_the_flag(flag: str, value: str):
    try:
        yield
    except Exception as error:           # a damaged file ends in whatever its reader stumbles over
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{flag} {value}: cannot be loaded ({reason}); give a folder with a Hugging Face checkpoint "
                         f"in safetensors or a model name on the hub") from error


def save_pretrained(model: nn.Module, tokenizer, folder: str | Path, **options) -> None:
    """Write the files that `from_pretrained` reads. Raises OSError naming the folder.

    Layers that predict several tokens at once, which transformers leaves in the checkpoint, are counted as 0; says so.
    """
    config = model.config.get_text_config(decoder=True)
    if not any(MORE_TOKENS.search(name) for name, _ in model.named_modules()):
        for field, value in config.to_dict().items():
            if MORE_TOKENS.search(field) and type(value) is int and value:
                setattr(config, field, 0)
                print(f"{field}: 0 instead of {value}, since layers that predict several tokens at once are not saved")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:                   # transformers loads a temperature without sampling, but saves none
        model.generation_config.do_sample = True
    with naming(folder):
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder, **options)
        for file in Path(folder).glob("*.safetensors"):
            file.chmod(0o644)            # as all others: it is written for its owner alone


@distributed.main_only
@torch.no_grad()
def save_dropped(decoder: Decoder, tokenizer, folder: str | Path, dtype: torch.dtype | None = None,
                 complete: Callable[[Decoder], nn.Module] = lambda decoder: decoder.model) -> None:
    """Save the model with every parameter of its dropped sub-blocks set to zero: the same function in any runtime.

    Overwrites those parameters. It keeps its number of blocks. `dtype`: to save it in, if not in its own;
    `complete(decoder)`: what is saved of it. Files appear whole, config.json last.
    """
    if decoder.offloaded:
        decoder.offloaded.restore()
    for block in decoder.blocks:
        for sub_block in (block.attn, block.mlp):
            if sub_block.dropped:
                for parameter in sub_block.parameters:
                    parameter.zero_()
    partial = Path(folder) / f".model{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)       # of a run that was killed
    try:
        cast(decoder.model, dtype or decoder.dtype)
        save_pretrained(complete(decoder), tokenizer, partial)
        for stale in {file.name for file in Path(folder).glob("*.safetensors*")} - {*os.listdir(partial)}:
            Path(folder, stale).unlink()
        move_checkpoint(partial, Path(folder))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
