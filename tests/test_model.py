"""A model is loaded as the flags say, or refused by its flag; what is saved is what was found."""
import shutil
from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from database.store import config_sha256
from families import VOCABULARY
from utils.decoder import Decoder
from utils.model import default_device, load_config, load_decoder, load_tokenizer, save_dropped, weights_fingerprint

TOKENS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
STATES = [(True, False), (False, True), (True, True), (False, False)]


@torch.no_grad()
def logits(model, tokens=TOKENS) -> torch.Tensor:
    return model(input_ids=tokens).logits


def test_checkpoint_is_loaded_in_the_dtype_asked_for(checkpoint):
    assert load_decoder(checkpoint, device="cpu").dtype == torch.float32         # auto, on a CPU
    assert load_decoder(checkpoint, "bfloat16", "cpu").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="--dtype int7: use one of auto, float16"):
        load_decoder(checkpoint, "int7", "cpu")


def test_weights_that_were_unpacked_to_another_dtype_are_loaded_in_the_one_asked_for(checkpoint, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained

    def unpacked(*args, **options):
        model, found = load(*args, **options)
        model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unpacked)
    decoder = load_decoder(str(checkpoint), "float32", "cpu")
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {torch.float32}


def test_a_configuration_is_the_same_whatever_its_weights_were_stored_in(checkpoint):
    config = load_config(str(checkpoint))
    expected = config_sha256(config)
    config.quantization_config = {"quant_method": "fp8"}
    assert config_sha256(config) == expected


@pytest.mark.parametrize("load, flag", [(load_config, "--model_name_or_path"), (load_tokenizer, "--tokenizer_name"),
                                        (lambda name: load_decoder(name, device="cpu"), "--model_name_or_path")])
def test_what_is_no_checkpoint_is_refused_naming_the_flag(load, flag, tmp_path):
    with pytest.raises(ValueError, match=rf"{flag} {tmp_path}: cannot be loaded .*; give a folder"):
        load(str(tmp_path))


@pytest.mark.parametrize("content, message", [
    (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n",
     "is not a safetensors file, or damaged"),
    (lambda whole: b"", "is not a safetensors file, or damaged"), (lambda whole: whole[:500], "is not a safetensors"),
    (lambda whole: whole[:-1], "is cut off")])
def test_a_damaged_checkpoint_is_named_before_it_is_loaded(checkpoint, tmp_path, content, message):
    shutil.copytree(checkpoint, tmp_path / "model")
    assert weights_fingerprint(str(tmp_path / "model")) == weights_fingerprint(str(checkpoint))
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=f"--model_name_or_path .*: model.safetensors {message}.*; fetch it again"):
        weights_fingerprint(str(tmp_path / "model"))


@pytest.mark.parametrize("offload", [False, True])
def test_flash_attention_is_refused_where_the_model_is_loaded_into_host_memory(offload, checkpoint):
    with pytest.raises(ValueError, match="--attn_implementation flash_attention_2: runs on a GPU only"):
        load_decoder(str(checkpoint), device="cpu", attn_implementation="flash_attention_2", offload_blocks=offload)


def test_device_that_is_not_there_is_refused():
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=rf"--device {device}: not available here \(.*; use cpu, cuda or cuda:N"):
            default_device(device)
    assert default_device("cpu").type == "cpu"


def test_a_gpu_that_was_chosen_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)          # as if there were any
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for device in ("cpu", "cuda", "cuda:1"):
        assert default_device(device) == torch.device(device)
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "qwen3", "opt", "gpt_neox", "mixtral"])
def test_saved_model_is_the_dropped_model_in_plain_transformers(family, tmp_path, tokenizer):
    model = families.build(family)
    expected = logits(families.dropped_copy(model, STATES))
    decoder = Decoder(deepcopy(model))
    for block, state in zip(decoder.blocks, STATES):
        block.drop(*state)
    save_dropped(decoder, tokenizer, str(tmp_path))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(reloaded), expected, atol=1e-5)
