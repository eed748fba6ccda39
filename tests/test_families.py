"""Families that are unlike Llama: through every program, as benchmarks/families.py does with all of them, and apart."""
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    Ministral3ForCausalLM,
    Mistral3ForConditionalGeneration,
)

import evo_drop
import evo_quant
import export
import families
import finish
from benchmarks.families import DONE, FAMILIES, NUM_BLOCKS, PLAIN, same, save_family, try_family
from database import gptq
from database.hessian import Calibration
from formats.compressed_tensors import check_loadable
from formats.regroup import regroup, whole
from formats.towers import with_tower
from utils.configs import read_level_config, write_drop_config
from utils.decoder import Decoder
from utils.fitness import Fitness
from utils.model import load_decoder, save_dropped

TOKENS = torch.randint(2, 1000, (2, 24), generator=torch.Generator().manual_seed(5))


def decoder_of(family: str, **overrides) -> Decoder:
    return Decoder(families.build(family, **FAMILIES[family] | overrides))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe", "minimax"])
def test_mixtures_in_half_precision_are_compared_with_what_they_compute_otherwise(family):
    """Experts in plain products, which tell their layers, round otherwise, and then other ones are chosen."""
    decoder = Decoder(families.build(family, **FAMILIES[family]).to(torch.bfloat16))
    assert any(".experts." in name for name in decoder.layers)
    assert torch.equal(decoder.logits(decoder._last_hidden_states(TOKENS)), logits(decoder.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channel_that_is_larger_than_all_others_hides_no_state_that_runs_on(dtype):
    """As pretrained models have them, with norms that see past it: documents of a hybrid are not packed."""
    model, outlier = families.build("lfm2", **FAMILIES["lfm2"]), 200.0
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5] = outlier
        for name, norm in model.named_parameters():
            if "norm" in name and norm.shape == (32,):
                norm.mul_(outlier / 32**0.5)
                norm[5] = 0
    assert Decoder(model.to(dtype)).packed_rows == 0


def test_attention_in_chunks_of_a_row_is_not_packed():
    # exact on the few tokens that are tried, which fit a chunk
    assert decoder_of("llama4_text", attention_chunk_size=32).packed_rows == 0


def test_what_follows_the_mlp_is_dropped_with_it_even_if_it_has_a_cache():
    decoder = Decoder(families.build("inkling_text", **PLAIN | dict(
        moe_intermediate_size=24, num_experts_per_tok=2, sliding_window=8, n_routed_experts=4, n_shared_experts=1)))
    block = decoder.blocks[2]
    assert block.attn.modules == [block.module.self_attn, block.module.attn_sconv]
    assert block.mlp.modules == [block.module.mlp, block.module.mlp_sconv]
    hook = block.module.attn_sconv.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    silenced = logits(decoder.model)
    hook.remove()
    block.drop(True, False)
    assert torch.equal(logits(decoder.model), silenced)


@pytest.mark.parametrize("family", ["deepseek_v4", "qwen4_exp_text"])
def test_what_mixes_residual_streams_is_no_sub_block(family):
    decoder = decoder_of(family)
    block = decoder.blocks[3]
    assert block.attn.modules == [block.module.self_attn] and block.mlp.modules == [block.module.mlp]
    hooks = [half.modules[0].register_forward_hook(lambda module, inputs, output: tuple(
        torch.zeros_like(part) if place == 0 else part for place, part in enumerate(output))
        if isinstance(output, tuple) else torch.zeros_like(output)) for half in (block.attn, block.mlp)]
    silenced = logits(decoder.model)
    for hook in hooks:
        hook.remove()
    block.drop(True, True)
    assert torch.equal(logits(decoder.model), silenced)
    torch.testing.assert_close(decoder.logits(decoder._last_hidden_states(TOKENS)), silenced)


def test_experts_whose_output_is_flat_are_the_mlp():
    decoder = decoder_of("llama4_text")
    assert all(block.mlp.modules == [block.module.feed_forward] for block in decoder.blocks)


def test_fields_of_single_blocks_follow_them(tmp_path):
    """Gemma 4's attention to everything has heads of another size, which its config says by the block's number."""
    decoder = decoder_of("gemma4_unified_text")
    states = [(True, True), *[(False, False)] * 4, (False, True)]
    for block, state in zip(decoder.blocks, states):
        block.drop(*state)
    regrouped = regroup(decoder, states)
    assert [config.head_dim for config in regrouped.model.config.per_layer_config] == [16, 8, 16, 8, 16]
    regrouped.model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(decoder.model))


def test_a_text_model_with_its_head_inside_another_goes_back_there(tmp_path):
    model = save_family("llama4", tmp_path / "model")
    write_drop_config(tmp_path / "drop.txt", [(False, False), (True, False), (False, True), *[(False, False)] * 3])
    export.main(["--model_name_or_path", model, "--drop_config", str(tmp_path / "drop.txt"), "--save_dir",
                 str(tmp_path / "out")])
    dropped, report = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    decoder = load_decoder(model, "float32", "cpu")
    decoder.blocks[1].drop(True, False)
    decoder.blocks[2].drop(False, True)
    torch.testing.assert_close(logits(dropped), logits(decoder.model))


def test_blocks_that_hand_each_other_more_are_refused(tmp_path):
    with pytest.raises(ValueError, match="blocks of HYV4ForCausalLM cannot be run one by one .RuntimeError: Shared"):
        load_decoder(save_family("hy_v4", tmp_path), device="cpu")


def test_blocks_of_one_mixer_are_compressed_but_not_dropped(tmp_path, text):
    model = save_family("nemotron_h", tmp_path / "model")
    decoder = load_decoder(model, "float32", "cpu")
    assert [(len(block.attn.modules), len(block.mlp.modules)) for block in decoder.blocks] == [(1, 0), (0, 1)] * 3
    torch.testing.assert_close(decoder.logits(decoder._last_hidden_states(TOKENS)), logits(decoder.model))
    flags = ["--model_name_or_path", model, "--calibration_data", text, "--calibration_tokens", "256",
             "--calibration_sequence_length", "32"]
    gptq.main(gptq.make_parser().parse_args([*flags, "--bitwidth_options", "2", "3", "4", "--perchannel", "--save_dir",
                                             str(tmp_path / "gptq")]))
    small = [*flags, "--generations", "1", "--offspring", "4", "--initial_tokens", "64", "--survivors_per_selection",
             "1", "--tokens_per_selection", "64", "--init", "measured", "--no_eval", "--output_dir"]
    evo_quant.main([*small, str(tmp_path / "bits"), "--quant_weights_path", str(tmp_path / "gptq"),
                    "--target_bitwidth", "3"])
    found = read_level_config(tmp_path / "bits" / "evo-kl-configuration-3.txt")
    assert set(found) == set(decoder.layers) and set(found.values()) == {2, 3, 4}
    with pytest.raises(SystemExit, match="attention of model.layers.0 cannot be dropped, since not all blocks have"):
        evo_drop.main([*small, str(tmp_path / "depth"), "--sparsity", "0.17"])


def test_weights_that_several_blocks_share_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model.layers.1 and model.layers.5 have weights in common"):
        load_decoder(save_family("zamba2", tmp_path), device="cpu")


def test_attention_to_later_tokens_is_refused():
    with pytest.raises(ValueError, match="Gemma3ForCausalLM: what it predicts changes with the tokens after that"):
        decoder_of("gemma3_text", use_bidirectional_attention=True)


def test_a_tower_without_a_class_for_the_text_alone(tmp_path):
    """Mistral 3 is loaded with its tower; the text model, which is a Ministral 3, can be exported without."""
    model = save_family("mistral3", tmp_path / "model")
    decoder = load_decoder(model, "float32", "cpu")
    assert type(decoder.model) is Mistral3ForConditionalGeneration and len(decoder.blocks) == NUM_BLOCKS
    states = [(False, False), (True, False), (False, True), *[(False, False)] * 3]
    write_drop_config(tmp_path / "drop.txt", states)
    for block, state in zip(decoder.blocks, states):
        block.drop(*state)
    for folder, more, expected in (("whole", [], Mistral3ForConditionalGeneration),
                                   ("text", ["--text_only"], Ministral3ForCausalLM)):
        export.main(["--model_name_or_path", model, "--drop_config", str(tmp_path / "drop.txt"), "--save_dir",
                     str(tmp_path / folder), *more])
        found, report = expected.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        torch.testing.assert_close(logits(found), logits(decoder.model))


def test_what_its_class_keeps_in_float32_is_saved_so(tmp_path, tokenizer, text):
    model = save_family("glm4_moe", tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    biases = {name: bias for name, bias in dense.state_dict().items() if name.endswith("e_score_correction_bias")}
    for bias in biases.values():
        bias.copy_(7 + 0.02 * torch.randn(bias.shape))
    dense.save_pretrained(model)
    assert {bias.dtype for bias in biases.values()} == {torch.float32}
    save_dropped(load_decoder(model, "bfloat16", "cpu"), tokenizer, tmp_path / "saved")
    write_drop_config(tmp_path / "drop.txt", [(True, False), *[(False, False)] * 5])
    finish.main(["--model_name_or_path", model, "--dtype", "bfloat16", "--drop_config", str(tmp_path / "drop.txt"),
                 "--calibration_data", text, "--calibration_tokens", "64", "--calibration_sequence_length", "32",
                 "--batch_size", "2", "--steps", "1", "--save_dir", str(tmp_path / "finished")])
    for folder in ("saved", "finished"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(found[name], bias) for name, bias in biases.items())
        assert found["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_blocks_with_ways_of_their_own_end_in_a_sentence(tmp_path, monkeypatch):
    model = save_family("lfm2", tmp_path)
    monkeypatch.setattr(Decoder, "_probe", lambda *args: None + 1)
    with pytest.raises(ValueError, match="the blocks of Lfm2ForCausalLM cannot be run one by one .TypeError: "):
        load_decoder(model, device="cpu")


@pytest.mark.parametrize("family", ["lfm2", "gemma4_text", "qwen3_5", "laguna"])
def test_hybrids_shared_keys_and_towers_go_through_every_program(family, tmp_path):
    cells = try_family(family, tmp_path / family)
    assert all(value == DONE or value in ("99%", "100%") for value in cells.values()), cells


@pytest.mark.parametrize("family, donors", [("gemma4_text", [2, 3]), ("gemma3n_text", [2, 3]), ("llama", [])])
def test_attentions_whose_keys_and_values_later_blocks_read_are_held(family, donors):
    decoder = decoder_of(family)
    assert [block.index for block in decoder.blocks if block.attn.held] == donors
    assert not any(block.mlp.held for block in decoder.blocks)
    states = [(True, True)] * NUM_BLOCKS
    if donors:
        with pytest.raises(ValueError, match=r"attention of model\.layers\.2 cannot be dropped, since later blocks"):
            decoder.check_dropped(states)
        decoder.check_dropped([(index not in donors, True) for index in range(NUM_BLOCKS)])
    else:
        decoder.check_dropped(states)


def test_shared_keys_and_values_reach_later_blocks_in_every_way_of_walking():
    decoder, offloaded = decoder_of("gemma4_text"), decoder_of("gemma4_text")
    offloaded.offload_blocks(torch.device("cpu"))
    candidates = [tuple((block == i, block == 5 - i) for block in range(NUM_BLOCKS)) for i in (0, 1, 4)]
    walks = [Fitness(one, list(TOKENS), lambda i, state, one=one: one.blocks[i].drop(*(state or (False, False))))
             for one in (decoder, offloaded)]
    assert walks[1].measure(candidates) == pytest.approx(walks[0].measure(candidates), rel=1e-4)
    plain = decoder_of("gemma4_text")
    calibration = Calibration(plain, list(TOKENS), torch.device("cpu"), microbatch_tokens=24)
    for _ in plain.blocks:
        calibration.run(advance=False)               # as a build does, before it solves
        calibration.run()
    same(torch.cat(calibration.hidden_states.chunks).view(2, 24, -1), plain._last_hidden_states(TOKENS))


def test_a_model_that_runs_its_blocks_several_times_is_refused():
    with pytest.raises(ValueError, match=r"HrmTextForCausalLM: runs model\.L_module\.layers\.0 6 times in a forward"):
        decoder_of("hrm_text")


@pytest.mark.parametrize("family", ["bamba", "diffllama", "jamba", "doge"])
def test_blocks_that_cannot_be_regrouped_keep_their_own_form(family, tmp_path):
    """They know their depth, or the config counts kinds of blocks by a period; norms are in use twice."""
    decoder = decoder_of(family)
    dropped = [(False, False), (True, False), (False, True), (True, True), (False, False), (False, False)]
    for block, state in zip(decoder.blocks, dropped):
        block.drop(*state)
    model = regroup(decoder, dropped).model
    assert torch.equal(logits(model), logits(decoder.model))
    model.save_pretrained(tmp_path)                  # which refuses tensors that two names share
    saved = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(saved), logits(model))


def test_a_cache_that_needs_an_attention_keeps_one():
    decoder = decoder_of("lfm2")
    dropped = [(index % 2 == 1,) * 2 for index in range(NUM_BLOCKS)]
    for block, state in zip(decoder.blocks, dropped):
        block.drop(*state)
    model = regroup(decoder, dropped).model
    assert len(model.model.layers) == 4              # of six, one of them zeros
    cached, whole = (model.generate(TOKENS[:, :6], max_new_tokens=8, do_sample=False, use_cache=use_cache)
                     for use_cache in (True, False))
    assert torch.equal(cached, whole)


def test_layers_that_predict_several_tokens_are_not_counted_in_what_is_saved(tmp_path, tokenizer, capsys):
    decoder = decoder_of("glm4_moe", num_nextn_predict_layers=1, num_hidden_layers=2)
    save_dropped(decoder, tokenizer, tmp_path, dtype=torch.bfloat16)
    saved = type(decoder.model).from_pretrained(tmp_path)
    assert saved.config.num_nextn_predict_layers == 0 and saved.dtype == torch.bfloat16
    assert "num_nextn_predict_layers: 0 instead of 1" in capsys.readouterr().out


def test_a_dtype_that_only_the_text_model_has_is_the_checkpoints(tmp_path):
    model = save_family("gemma3", tmp_path / "model")
    Gemma3ForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["dtype"] = config.pop("dtype")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_drop_config(tmp_path / "drop.txt", [(True, False), *[(False, False)] * 5])
    export.main(["--model_name_or_path", model, "--device", "cpu", "--drop_config", str(tmp_path / "drop.txt"),
                 "--save_dir", str(tmp_path / "out")])
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_text_alone_is_exported_of_a_model_with_a_tower(tmp_path, text):
    model = save_family("gemma3", tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    write_drop_config(tmp_path / "drop.txt", [(True, False), *[(False, False)] * 5])
    flags = ["--model_name_or_path", model, "--device", "cpu", "--drop_config", str(tmp_path / "drop.txt")]
    export.main([*flags, "--save_dir", str(tmp_path / "whole")])
    export.main([*flags, "--save_dir", str(tmp_path / "text"), "--text_only"])
    assert (tmp_path / "whole" / "preprocessor_config.json").is_file()
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()
    finish.main([*flags, "--calibration_data", text, "--calibration_tokens", "64", "--batch_size", "2", "--steps",
                 "1", "--calibration_sequence_length", "32", "--save_dir", str(tmp_path / "finished")])
    evo_drop.main([*flags[:4], "--sparsity", "0.2", "--calibration_data", text, "--calibration_tokens", "64",
                   "--no_eval", "--calibration_sequence_length", "32", "--generations", "1", "--offspring", "2",
                   "--output_dir", str(tmp_path / "run"), "--survivors_per_selection", "1", "--tokens_per_selection",
                   "32", "--initially_generated", "2", "--initial_tokens", "32", "--save_dir", str(tmp_path / "saved")])
    for name in ("finished", "saved"):
        assert (tmp_path / name / "preprocessor_config.json").is_file()
        Gemma3ForConditionalGeneration.from_pretrained(tmp_path / name)
    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "whole")
    alone, report = Gemma3ForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(alone), logits(whole))
    source = Gemma3ForConditionalGeneration.from_pretrained(model).model.vision_tower.state_dict()
    assert all(torch.equal(source[key], value) for key, value in whole.model.vision_tower.state_dict().items())


@pytest.mark.parametrize("family, reason", [("falcon", "query_key_value is a FalconLinear with a forward of its own"),
                                            ("recurrent_gemma", "RecurrentGemmaForCausalLM does not load with packed"),
                                            ("gemma3n_text", None), ("lfm2", None)])
def test_packed_layers_that_transformers_does_not_load_are_refused(family, reason):
    decoder = decoder_of(family)
    if reason is None:
        check_loadable(decoder.model, decoder.layers)
    else:
        with pytest.raises(ValueError, match=f"--format compressed-tensors: .*{reason}.*; use --format dense"):
            check_loadable(decoder.model, decoder.layers)


def test_a_checkpoint_that_names_another_class_but_has_no_tower_stays_what_was_searched():
    """Many say LlamaModel, or a classifier they were made from."""
    decoder = decoder_of("llama")
    found = whole(decoder)
    config = LlamaConfig(architectures=["LlamaModel"])
    assert with_tower(found, "nowhere", config) is found
