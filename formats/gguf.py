"""Write a model as a GGUF file for llama.cpp, with the optional `gguf` package (requirements-gguf.txt); read blocks.

Quantized layers go, tensor by tensor and without rounding again, into the smallest of GGUF's legacy blocks of 32 that
holds their integers: Q4_0 from -8 to 7, Q5_0 from -16 to 15, Q8_0 from -128 to 127, each with a float16 scale. What
does not fit (asymmetric 8-bit levels, rows or groups that blocks of 32 do not divide) is written as F32, or rounded to
the model's own 16 bits so as not to be larger than there, and named.
Layers that are blocks already (K-quants) are written byte for byte.
"""
import json
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from formats.compressed_tensors import Quantized, bits_a_weight
from formats.kquants import Blocks

# model_type -> GGUF's name of the architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
BLOCK = ALIGNMENT = 32
HALF_RANGES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}      # a type holds integers from minus this to this less one
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}      # of a code in the types that `decode` reads
# how tokenizers split text, see `split_steps`, and llama.cpp's names for that
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
SPLITS = {("bytes by words",): "gpt-2", (_SPLIT % "{1,3}", "bytes"): "llama-bpe", (_SPLIT % "", "bytes"): "qwen2",
          ("digits", "bytes by words"): "smollm"}


def check_block(config, format: str) -> None:
    """Raise ValueError for blocks that llama.cpp and mlx-lm take to be as usual, and are not."""
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"--format {format}: MLPs are taken to have SiLU there, and this model's have "
                         f"{config.hidden_act}; use another --format")
    if config.model_type == "qwen3" and config.attention_bias:
        raise ValueError(f"--format {format}: has no place for biases in the attention of qwen3 models; use another "
                         f"--format")


def check_gguf(config, tokenizer) -> None:
    """Raise ValueError where the package is missing, or llama.cpp would not run such a model or tokenizer alike."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("--format gguf: the gguf package is not installed; pip install -r requirements-gguf.txt"
                         ) from error
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"--format gguf: {config.model_type} models are not supported, only "
                         f"{', '.join(ARCHITECTURES)}; use another --format")
    check_block(config, "gguf")
    if sliding_window(config):
        raise ValueError(f"--format gguf: llama.cpp would ignore this model's sliding window of "
                         f"{sliding_window(config)} tokens; use another --format")
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type != "default" and (rope_type not in ("llama3", "linear") or config.model_type != "llama"):
        raise ValueError(f"--format gguf: rotary embeddings of type {rope_type} are not supported for "
                         f"{config.model_type}; use another --format")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"--tokenizer_name: has {len(tokenizer)} tokens, but the model only {config.vocab_size}, "
                         f"which llama.cpp does not load; give the model's own tokenizer")
    split_name(tokenizer_json(tokenizer))


def sliding_window(config) -> int | None:
    """Tokens that an attention sees, where that is fewer than the model takes."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    return window if window and window < config.max_position_embeddings and "sliding_attention" in types else None


def write_gguf(path: Path, model: nn.Module, tokenizer, quantized: Mapping[str, Quantized | Blocks]) -> dict:
    """Write `model`, whose layers in `quantized` keep their integers; returns what to report of them."""
    import gguf
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    write_hyperparameters(writer, config)
    write_tokenizer(writer, tokenizer, config.vocab_size)
    names, heads = tensor_names(config), interleaved_heads(config)
    if config.rope_parameters.get("rope_type", "default") != "default":
        writer.add_tensor("rope_freqs.weight", rope_factors(model).numpy())
    stored, as_f32, types = 0, [], {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue                                 # llama.cpp takes the embedding when there is no output
        target = names(name)
        if target is None:
            raise ValueError(f"--format gguf: {name} has no place in GGUF's {architecture}; use another --format")
        layer_name, _, part = name.rpartition(".")
        num_heads = heads.get(layer_name.rpartition(".")[2])
        layer = quantized.get(layer_name) if part == "weight" else None
        if layer is not None:
            rows = interleaved_rows(len(tensor), num_heads)
            if isinstance(layer, Blocks):
                kind, data = layer.kind, layer.data[rows].numpy()
            else:
                kind, data = encode(layer._replace(codes=layer.codes[rows], scales=layer.scales[rows],
                                                   zeros=layer.zeros[rows]))
            if kind == "F32":
                as_f32.append(f"{target} ({data})")
                kind, data = unquantized(tensor.cpu()[rows]) if tensor.dtype.itemsize == 2 else (
                    "F32", dequantize(layer)[rows].numpy())
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            stored += data.nbytes
            types[target] = kind
        else:
            kind, data = unquantized(tensor.cpu()[interleaved_rows(len(tensor), num_heads)])
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not quantized:
        return {}
    notes = [f"Written unquantized, since no block type holds them: {', '.join(as_f32)}."] if as_f32 else []
    return {"written_as_f32": as_f32, "notes": notes, "tensor_types": types,
            **bits_a_weight(quantized.values(), stored)}


# ---- tensors ---------------------------------------------------------------------------------------------------------


def unquantized(tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    """(type, array) of a tensor as it is: vectors, and what is not in 16 bits, in F32."""
    if tensor.dim() == 1 or tensor.dtype not in (torch.float16, torch.bfloat16):
        return "F32", tensor.float().numpy()
    if tensor.dtype == torch.float16:
        return "F16", tensor.numpy()
    return "BF16", tensor.contiguous().view(torch.uint8).numpy()


def encode(layer: Quantized) -> tuple[str, np.ndarray | str]:
    """(type, its bytes uint8 [out, bytes a row]); ("F32", the reason) where no type holds the layer exactly."""
    out, columns = layer.codes.shape
    if columns % BLOCK:
        return "F32", f"rows of {columns}"
    if layer.scales.shape[1] > 1 and layer.group_size % BLOCK:
        return "F32", f"groups of {layer.group_size}"
    scales, zeros = expand(layer)
    values = layer.codes.short() - zeros.short()
    low, high = int(values.min()), int(values.max())
    kind = next((kind for kind, half in HALF_RANGES.items() if -half <= low and high < half), None)
    if kind is None:
        return "F32", f"integers from {low} to {high}"
    if not torch.equal(scales, scales.half().to(scales.dtype)):
        return "F32", "scales that float16 cannot hold"
    scale = scales[:, ::BLOCK].half().contiguous().view(torch.uint8).numpy().reshape(out, -1, 2)
    if kind == "Q8_0":
        numbers = values.to(torch.int8).view(torch.uint8).numpy().reshape(out, -1, BLOCK)
        return kind, np.concatenate([scale, numbers], axis=-1).reshape(out, -1)
    numbers = (values + HALF_RANGES[kind]).to(torch.uint8).numpy().reshape(out, -1, BLOCK)
    low_half, high_half = numbers[..., :BLOCK // 2], numbers[..., BLOCK // 2:]
    nibbles = (low_half & 15) | (high_half << 4)
    fifth_bits = [np.packbits(numbers >> 4, axis=-1, bitorder="little")] if kind == "Q5_0" else []
    return kind, np.concatenate([scale, *fifth_bits, nibbles], axis=-1).reshape(out, -1)


def layer_bytes(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> int:
    """Of a layer [out, in] in a block type that holds whatever zeros it has. Raises ValueError with the reason where
    there is none."""
    out, columns = shape
    if columns % BLOCK or group_size < columns and group_size % BLOCK:
        raise ValueError(f"rows of {columns} in groups of {group_size}, and GGUF has blocks of 32")
    most = 1 << (bits - 1) if symmetric else (1 << bits) - 1         # from minus this to this, less one if symmetric
    kind = next((kind for kind, half in HALF_RANGES.items() if most < half + symmetric), None)
    if kind is None:
        raise ValueError(f"{bits} bits with zeros, and GGUF's widest blocks hold 8 bits without")
    return out * columns // BLOCK * {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}[kind]


def other_bytes(model: nn.Module, tokenizer, layers: Collection[str], itemsize: int) -> int:
    """Of a file of the model all but the blocks of `layers`: what it begins with, and the other tensors, of which
    matrices have `itemsize` bytes a weight."""
    import gguf
    config, size, names = model.config, 0, tensor_names(model.config)
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "header", ARCHITECTURES[config.model_type])
        write_hyperparameters(writer, config)
        write_tokenizer(writer, tokenizer, config.vocab_size)
        shapes = {names(name): tensor.shape for name, tensor in model.state_dict().items()
                  if not (name == "lm_head.weight" and config.tie_word_embeddings)}
        if config.rope_parameters.get("rope_type", "default") != "default":
            shapes["rope_freqs.weight"] = rope_factors(model).shape
        blocks = {names(f"{layer}.weight") for layer in layers}
        for name, shape in shapes.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 0)
            size += 0 if name in blocks else padded(shape.numel() * (itemsize if len(shape) > 1 else 4))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return size + padded((Path(folder) / "header").stat().st_size)


def padded(size: int) -> int:
    """What a tensor's bytes take in the file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def expand(layer: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of every weight, [out, in]."""
    groups = torch.arange(layer.codes.shape[1]) // layer.group_size
    return layer.scales[:, groups], layer.zeros[:, groups]


def dequantize(layer: Quantized) -> torch.Tensor:
    """float32 [out, in], exact."""
    scales, zeros = expand(layer)
    return (layer.codes.float() - zeros) * scales


def decode(kind: str, data: np.ndarray) -> Quantized:
    """A tensor of a type in BITS from its bytes, uint8 [out, bytes a row]: the inverse of `encode`.

    Q4_1 and Q5_1 are scale * code + minimum. Raises ValueError where a minimum is not the scale times an integer.
    """
    bits, minimum = BITS[kind], kind.endswith("1")
    size = 2 * (1 + minimum) + BLOCK * bits // 8
    blocks = torch.from_numpy(np.array(data)).view(len(data), -1, size)
    halves = blocks[..., :2 * (1 + minimum)].contiguous().view(torch.float16)
    scales, numbers = halves[..., 0].contiguous(), blocks[..., 2 * (1 + minimum):]
    if bits == 8:
        codes = (numbers.contiguous().view(torch.int8).short() + HALF_RANGES[kind]).to(torch.uint8)
    else:
        nibbles = numbers[..., -BLOCK // 2:]
        codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
        if bits == 5:
            fifth_bits = numbers[..., :4, None] >> torch.arange(8, dtype=torch.uint8) & 1
            codes |= fifth_bits.flatten(-2) << 4
    if minimum:
        scale, least = halves.float().unbind(-1)
        zeros = torch.where(scale == 0, 0, (-least / scale).round())
        inexact = ~((zeros * scale == -least) & (zeros >= 0) & (zeros < 1 << bits))
        if inexact.any():
            row, block = inexact.nonzero()[0].tolist()
            raise ValueError(f"{kind} holds scale * code + minimum, and in row {row}, block {block} the minimum "
                             f"{float(least[row, block]):g} is not minus the scale {float(scale[row, block]):g} times "
                             f"an integer from 0 to {(1 << bits) - 1}")
        zeros = zeros.to(torch.uint8)
    else:
        zeros = torch.full(scales.shape, HALF_RANGES[kind], dtype=torch.uint8)
    return Quantized(codes.flatten(1), scales, zeros, bits, BLOCK)


def tensor_names(config) -> Callable[[str], str | None]:
    """Parameter of transformers' model -> its name in GGUF, None for one without a place."""
    import gguf
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def interleaved_heads(config) -> dict[str, int]:
    """Layers whose output rows GGUF has in another order, see `interleaved_rows`: last part of the name -> heads."""
    if ARCHITECTURES[config.model_type] != "llama":
        return {}
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def interleaved_rows(rows: int, num_heads: int | None) -> torch.Tensor:
    """Order of output rows: GGUF's llama rotates neighbours (0, 1), transformers halves (0, size / 2) of every head."""
    order = torch.arange(rows)
    return order if num_heads is None else order.view(num_heads, 2, -1).transpose(1, 2).flatten()


def rope_factors(model: nn.Module) -> torch.Tensor:
    """What each plain rotary frequency is divided by, float32 [head size / 2]: llama.cpp's form of scaled ones."""
    actual = model.get_decoder().rotary_emb.inv_freq.float().cpu()
    exponents = torch.arange(len(actual), dtype=torch.float32) / len(actual)
    return model.config.rope_parameters["rope_theta"]**-exponents / actual


# ---- metadata --------------------------------------------------------------------------------------------------------


def write_hyperparameters(writer, config) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def tokenizer_json(tokenizer) -> dict:
    """What is in tokenizer.json. Raises ValueError for a tokenizer without one."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("--tokenizer_name: --format gguf reads tokenizers with a tokenizer.json; give such a one")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def split_name(description: dict) -> str | None:
    """llama.cpp's name for how a byte-level BPE tokenizer splits text; None for one with byte fallback, which does not.

    Raises ValueError for others: they would tokenize differently there.
    """
    if description["model"]["type"] == "BPE" and description["model"].get("byte_fallback"):
        return None
    name = SPLITS.get(split_steps(description)) if description["model"]["type"] == "BPE" else None
    if name is None:
        raise ValueError("--format gguf: llama.cpp would split text unlike this tokenizer; supported are BPE "
                         "tokenizers with byte fallback and the byte-level ones of GPT-2, Llama 3, Qwen 2 and SmolLM, "
                         "so use another --format")
    return name


def split_steps(description: dict) -> tuple[str, ...]:
    """A tokenizer's pre-tokenizers, each as what tells it from others of its type."""
    def word(step: dict) -> str:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            return "bytes by words" if step.get("use_regex", True) else "bytes"
        if step["type"] == "Digits" and step["individual_digits"]:
            return "digits"
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            return step["pattern"].get("Regex", "")
        return step["type"]

    splitter = description["pre_tokenizer"] or {"pretokenizers": []}
    return tuple(map(word, splitter.get("pretokenizers", [splitter])))


def begins_with_a_space(description: dict) -> bool:
    """Whether a tokenizer with byte fallback puts a space before a text."""
    splitter = description["pre_tokenizer"] or {}
    schemes = {step["prepend_scheme"] for step in splitter.get("pretokenizers", [splitter])
               if step.get("type") == "Metaspace"}
    return '"prepend"' in json.dumps(description["normalizer"]) or bool(schemes - {"never"})


def write_tokenizer(writer, tokenizer, vocab_size: int) -> None:
    """Tokens, merges and special tokens; what the model's vocabulary has beyond the tokenizer's is unused."""
    from gguf import TokenType
    description = tokenizer_json(tokenizer)
    split = split_name(description)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in description["model"]["merges"]]
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        is_byte = split is None and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[index], types[index] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in description["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if split is None:
        # llama.cpp joins the pair with the best score first: the order of the merges, as BPE does
        ranks = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([ranks.get(token, -1e6) for token in tokens])
        writer.add_add_space_prefix(begins_with_a_space(description))
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types(types)
    for token_id, add in ((tokenizer.bos_token_id, writer.add_bos_token_id),
                          (tokenizer.eos_token_id, writer.add_eos_token_id),
                          (tokenizer.pad_token_id, writer.add_pad_token_id)):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None
                             and tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
