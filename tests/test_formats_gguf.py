"""GGUF exports: the blocks hold the database's weights to the bit, and llama.cpp computes what the searched model does.

Needs the optional packages of requirements-gguf.txt; without them these tests say so and are skipped.
"""
import importlib.util
import json
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import export
import families
from database import packing
from database.store import Database
from exports import random_quantized, save_model, write_database, write_levels
from formats.compressed_tensors import Quantized
from formats.gguf import encode, interleaved_rows, split_name
from utils.configs import read_level_config, write_drop_config
from utils.model import load_tokenizer

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason=(
    "the gguf package is not installed: pip install -r requirements-gguf.txt"))
needs_llama_cpp = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("gguf", "xllamacpp"))), reason=(
    "no llama.cpp binding is installed to load the file: pip install -r requirements-gguf.txt"))
DROPPED = [(False, True), (True, False), (True, True), (False, False)]
SIZES = dict(hidden_size=64, intermediate_size=96, max_position_embeddings=64)


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU, with everything but the weights in float32."""

    def __init__(self, path):
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def logprobs(self, tokens: list[int], vocabulary: int, cache: bool = False) -> torch.Tensor:
        """Of the next token after `tokens`, at most 511, [vocabulary]; cache: go on after what the last call shares.

        The binding reports them, as they are before any bias, together with a sampled token that is text: the bias
        makes it sample the letter that the tests' tokenizer has as token 66.
        """
        answer = self.server.handle_completions({"prompt": tokens, "n_predict": 1, "n_probs": vocabulary,
                                                 "temperature": 0, "logit_bias": [[66, 1000]], "cache_prompt": cache})
        found = {entry["id"]: entry["logprob"] for entry in
                 answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
        return torch.tensor([found[token] for token in range(vocabulary)], dtype=torch.float64)

    def tokenize(self, text: str) -> list[int]:
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", headers={
            "Content-Type": "application/json"}, data=json.dumps({"content": text, "add_special": True}).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


@torch.no_grad()
def differences(path, searched, length: int = 40) -> list[float]:
    """Largest differences of llama.cpp's log-probabilities from the searched model's after three prefixes of a text,
    in ascending order."""
    vocabulary = searched.config.vocab_size
    tokens = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    expected = searched(tokens[None]).logits[0].double().log_softmax(-1)
    runtime = LlamaCpp(path)
    return sorted(float((runtime.logprobs(tokens[:end].tolist(), vocabulary) - expected[end - 1]).abs().max())
                  for end in (1, 7, length))


def rounded(inputs: torch.Tensor) -> tuple[torch.Tensor]:
    """Activations as Q8_0 holds them: 8-bit integers with a half-precision scale for every 32."""
    blocks = inputs.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale.clamp(min=1e-30)).round() * scale.half()).flatten(-2),


def export_gguf(tmp_path, *flags: str):
    report = export.main([*flags, "--save_dir", str(tmp_path / "out"), "--format", "gguf"])
    return tmp_path / "out" / "model.gguf", report


# ---- the blocks ------------------------------------------------------------------------------------------------------


def layer_of(bits: int, group_size: int, sym: bool, shape=(5, 64)) -> Quantized:
    packed = random_quantized(torch.zeros(shape), bits, group_size, sym, torch.Generator().manual_seed(bits))
    return Quantized(*packing.unpack_codes(packed, shape, bits), bits, group_size)


@needs_gguf
@pytest.mark.parametrize("bits, sym, kind", [
    (2, False, "Q4_0"), (3, False, "Q4_0"), (4, False, "Q5_0"), (4, True, "Q4_0"), (5, False, "Q8_0"),
    (5, True, "Q5_0"), (6, False, "Q8_0"), (6, True, "Q8_0"), (7, False, "Q8_0"), (8, True, "Q8_0")])
@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_blocks_hold_the_databases_weights_to_the_bit(bits, sym, kind, group_size):
    import gguf
    layer = layer_of(bits, group_size, sym)
    found, data = encode(layer)
    assert found == kind
    read = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(read), packing.dequantize(layer.codes, layer.scales, layer.zeros, group_size))


@pytest.mark.parametrize("layer, reason", [
    (layer_of(8, 32, False), "integers from"), (layer_of(3, 48, False, (5, 48)), "rows of 48"),
    (layer_of(3, 16, False), "groups of 16")])
def test_what_no_block_holds_is_f32(layer, reason):
    kind, found = encode(layer)
    assert kind == "F32" and found.startswith(reason)


def test_interleaving_pairs_the_two_halves_of_a_head():
    assert interleaved_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved_rows(4, None).tolist() == [0, 1, 2, 3]


# ---- in llama.cpp ----------------------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("family, overrides", [
    ("llama", {}), ("llama", dict(dtype=torch.bfloat16, tie_word_embeddings=True)),
    ("llama", dict(rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                                        high_freq_factor=4.0, original_max_position_embeddings=16))),
    ("mistral", dict(sliding_window=None)), ("qwen2", dict(use_sliding_window=False, layer_types=None, vocab_size=330)),
    ("qwen3", dict(tie_word_embeddings=True))])
def test_depth_export_is_the_searched_model_in_llama_cpp(tmp_path, tokenizer, family, overrides):
    model = families.build(family, **dict(vocab_size=len(tokenizer)) | SIZES | overrides)
    folder = save_model(tmp_path / "m", model, tokenizer)
    write_drop_config(tmp_path / "drop.txt", DROPPED)
    path, report = export_gguf(tmp_path, "--model_name_or_path", folder, "--drop_config", str(tmp_path / "drop.txt"))
    assert report["blocks"]["exported"] == 2
    searched = families.dropped_copy(model.float(), DROPPED)
    assert max(differences(path, searched)) < (0.15 if overrides.get("dtype") else 1e-4)    # bfloat16 rounds inputs


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("drop", [False, True])
def test_quantized_export_agrees_to_the_blocks_rounding_in_llama_cpp(tmp_path, tokenizer, capsys, family, drop):
    """llama.cpp rounds the inputs of quantized layers to 8 bits, 32 at a time: that is all that may differ, so a model
    that rounds them as well must agree closely."""
    model = families.build(family, vocab_size=len(tokenizer), **SIZES | dict(intermediate_size=80))
    folder = save_model(tmp_path / "m", model, tokenizer)
    database = write_database(tmp_path / "db", folder, "gptq", [2, 3, 4, 5, 6, 8], 32)
    config = write_levels(tmp_path / "levels.txt", database,
                          lambda number, name: 8 if name.endswith("3.mlp.up_proj") else 2 + number % 5)
    dropped = DROPPED if drop else [(False, False)] * 4
    write_drop_config(tmp_path / "drop.txt", dropped)
    path, report = export_gguf(tmp_path, "--model_name_or_path", folder, "--quant_weights_path", database,
                               "--quant_config_path", config, "--drop_config", str(tmp_path / "drop.txt"))
    last = report["blocks"]["exported"] - 1
    named = {name.split(" ")[0] for name in report["written_as_f32"]}
    assert named == {f"blk.{last}.ffn_up.weight", *(f"blk.{block}.ffn_down.weight" for block in range(last + 1))}
    assert f"blk.{last}.ffn_up.weight (integers from" in capsys.readouterr().out
    opened = Database.open(database)
    for name, level in read_level_config(config).items():
        model.get_submodule(name).weight.data.copy_(opened.weight(name, level))
    searched = families.dropped_copy(model, dropped)
    assert max(differences(path, searched)) < 0.1
    for name, layer in searched.model.layers.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == 0 and name != "3.mlp.up_proj":
            layer.register_forward_pre_hook(lambda module, inputs: rounded(*inputs))
    _, middle, largest = differences(path, searched)
    assert middle < 1e-4 and largest < 0.03                  # now and then a tie is rounded the other way


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind: no splitting, spaces as ▁, bytes for what it does not know."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["▁"]
    merges = [("h", "e"), ("t", "h"), ("i", "n"), ("▁", "in"), ("e", "r"), ("he", "r"), ("▁", "t")]  # not left to right
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, merges)]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token="<unk>",
                                fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_digits() -> PreTrainedTokenizerFast:
    """A byte-level one of SmolLM's kind: every digit by itself, whatever stands before it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(["a = 1\n\n    b =    22\n\n\n3. one  two"] * 9, trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["bytes", "digits", "Prepend", "first", "always", "never", "LlamaTokenizer"])
def test_llama_cpp_tokenizes_alike(tmp_path, tokenizer, kind):
    if kind == "digits":
        tokenizer = with_digits()
    elif kind != "bytes":
        tokenizer = with_byte_fallback()
    if kind in ("first", "always", "never"):
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    folder = families.save_llama(tmp_path / "m", tokenizer, num_hidden_layers=2)
    if kind == "LlamaTokenizer":                     # the class that Llama 2's checkpoints name, which builds its own
        file = Path(folder, "tokenizer_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": kind}))
        tokenizer = load_tokenizer(folder)
        assert type(tokenizer).__name__ == kind
    write_drop_config(tmp_path / "drop.txt", [(True, False)] * 2)
    path, _ = export_gguf(tmp_path, "--model_name_or_path", folder, "--drop_config", str(tmp_path / "drop.txt"))
    runtime = LlamaCpp(path)
    for text in ("the other thinner theory", "def bisect(a, x):\n    return a[x]  # it's 1234 naïve words",
                 "Steps:\n\n1. one", "x =    12"):
        assert runtime.tokenize(text) == tokenizer(text).input_ids


def test_a_tokenizer_that_splits_like_none_that_is_known_is_refused(tokenizer):
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    for splitter in (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False),
                                              pre_tokenizers.ByteLevel(add_prefix_space=False)]),
                     pre_tokenizers.Sequence([pre_tokenizers.Punctuation(),
                                              pre_tokenizers.ByteLevel(add_prefix_space=False)]),
                     pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Whitespace()):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = splitter
        with pytest.raises(ValueError, match="llama.cpp would split text unlike this tokenizer"):
            split_name(whole | {"pre_tokenizer": json.loads(tokenizer.to_str())["pre_tokenizer"]})


@needs_gguf
@pytest.mark.parametrize("tied", [False, True])
def test_tied_head_is_written_once(tmp_path, tokenizer, tied):
    import gguf
    folder = families.save_llama(tmp_path / "m", tokenizer, num_hidden_layers=2, tie_word_embeddings=tied)
    write_drop_config(tmp_path / "drop.txt", [(True, False)] * 2)
    path, _ = export_gguf(tmp_path, "--model_name_or_path", folder, "--drop_config", str(tmp_path / "drop.txt"))
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert "token_embd.weight" in names and ("output.weight" in names) != tied


# ---- user errors -----------------------------------------------------------------------------------------------------


def refused(tmp_path, folder: str, monkeypatch) -> str:
    write_drop_config(tmp_path / "drop.txt", [(True, False)] * 4)
    monkeypatch.setattr(export, "load_decoder", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as error:
        export_gguf(tmp_path, "--model_name_or_path", folder, "--drop_config", str(tmp_path / "drop.txt"))
    return str(error.value)


def test_missing_package_is_named_before_the_model_is_loaded(tmp_path, tokenizer, monkeypatch):
    folder = save_model(tmp_path / "m", families.build("llama", vocab_size=len(tokenizer)), tokenizer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install -r requirements-gguf.txt" in refused(tmp_path, folder, monkeypatch)


@needs_gguf
@pytest.mark.parametrize("family, overrides, message", [
    ("gemma2", {}, "gemma2 models are not supported"), ("mistral", {}, "sliding window of 8"),
    ("llama", dict(vocab_size=96), "has 320 tokens"), ("llama", dict(hidden_act="relu"), "this model's have relu"),
    ("qwen3", dict(attention_bias=True), "has no place for biases in the attention of qwen3"),
    ("llama", dict(rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0)), "type yarn")])
def test_what_llama_cpp_would_run_otherwise_is_refused(tmp_path, tokenizer, monkeypatch, family, overrides, message):
    model = families.build(family, **dict(vocab_size=len(tokenizer)) | overrides)
    assert message in refused(tmp_path, save_model(tmp_path / "m", model, tokenizer), monkeypatch)
