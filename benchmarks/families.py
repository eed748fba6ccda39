"""What works with which family: tiny random models of today's decoder families, taken through every program.

    python benchmarks/families.py                              all of them
    python benchmarks/families.py --families llama lfm2        some
    python benchmarks/families.py --write_readme               all of them, and the table into benchmarks/README.md

Families whose results are in --out, of this commit, are not run again.

A model has six blocks of hidden size 32, of the family's own class in transformers. Every column is a property that is
computed twice, here and by plain transformers; a cell is ✓ (databases: the share of the blocks' weights that they
hold), or the number of what was said before any work was done, or ✗ and what went wrong, which is a mistake of ours.
"""
import argparse
import json
import math
import re
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)      # and not benchmarks/, which has a database.py of its own
import evo_drop
import evo_quant
import evo_unstructured
import export
import finish
from benchmarks.programs import write_readme
from database import gptq, sparsegpt
from database.levels import LevelSwitcher
from database.store import Database
from tests.families import scale_weights
from utils.configs import read_level_config, write_drop_config
from utils.data import calibration_documents
from utils.decoder import Decoder
from utils.files import write_atomic
from utils.fitness import Fitness, assemble, microbatches
from utils.model import load_decoder, load_tokenizer, model_class
from utils.report import commit, format_table

NUM_BLOCKS, VOCABULARY = 6, 1024
PLAIN = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_BLOCKS, head_dim=8,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=0,
             eos_token_id=1, tie_word_embeddings=False)
WITHOUT_HEADS = {key: value for key, value in PLAIN.items() if key not in ("head_dim", "num_key_value_heads")}
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2))
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
              num_key_value_heads=4)
ROUTED = dict(moe_intermediate_size=24, num_experts_per_tok=2)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
              layer_types=["linear_attention", "full_attention"] * (NUM_BLOCKS // 2))
STATE_SPACE = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2,
                   mamba_chunk_size=8)

EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SHARED = dict(n_routed_experts=4, n_shared_experts=1)
ONE_GROUP = dict(n_group=1, topk_group=1)
INDEXED = dict(index_topk=24, index_head_dim=8, index_n_heads=2)     # more than are generated: transformers gives other
# logits with a cache than without where scores of zero are as good as each other
KIMI = {key: value for key, value in LATENT.items() if key != "q_lora_rank"} | dict(
    moe_intermediate_size=24, num_experts_per_token=2, num_experts=4, linear_head_dim=8, linear_num_heads=4,
    layer_types=LINEAR["layer_types"])
DEEPSEEK = PLAIN | ROUTED | LATENT | SHARED | ONE_GROUP | dict(first_k_dense_replace=1)
MINIMAX_3 = PLAIN | EXPERTS | dict(intermediate_size=24, dense_intermediate_size=64, shared_intermediate_size=24,
                                   rotary_dim=4, index_n_heads=2, index_head_dim=8, index_block_size=8,
                                   index_topk_blocks=2)
GEMMA_4 = PLAIN | SLIDING | dict(global_head_dim=16)
QWEN_MOE = PLAIN | ROUTED | LINEAR | dict(num_experts=4, shared_expert_intermediate_size=24)
LLAMA_4 = PLAIN | dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=64, attention_chunk_size=8,
                       interleave_moe_layer_step=2, no_rope_layers=[1, 0] * (NUM_BLOCKS // 2))
PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=2)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
IMAGES = VISION | dict(image_size=28, patch_size=14)
QWEN_VISION = dict(hidden_size=16, intermediate_size=16, depth=2, num_heads=2, out_hidden_size=32,
                   num_position_embeddings=16)
ROPE_3D = dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])
STATES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=NUM_BLOCKS)

# model_type -> configuration
FAMILIES: dict[str, dict] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "phi3", "olmo", "olmo2", "cohere", "granite", "glm", "glm4",
                     "helium", "ernie4_5", "nemotron", "ministral3", "smollm3", "hunyuan_v1_dense", "diffllama", "doge",
                     "apertus", "arcee", "seed_oss", "bitnet", "jais2", "hyperclovax"), PLAIN),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4", "ministral", "vaultgemma", "cwm",
                     "granite_swa", "modernbert-decoder"), PLAIN | SLIDING),
    **dict.fromkeys(("mistral", "starcoder2"), PLAIN | dict(sliding_window=8)),
    **dict.fromkeys(("minicpm3", "youtu"), PLAIN | LATENT),
    **dict.fromkeys(("phi", "gpt_neox", "gpt2", "falcon", "bloom", "persimmon", "biogpt", "nanochat"), WITHOUT_HEADS),
    **dict.fromkeys(("gptj", "codegen", "gpt_bigcode"), WITHOUT_HEADS | dict(
        n_embd=32, n_layer=NUM_BLOCKS, n_head=4, rotary_dim=8)),
    "stablelm": WITHOUT_HEADS | dict(num_key_value_heads=2),
    "opt": WITHOUT_HEADS | dict(ffn_dim=64, word_embed_proj_dim=32),
    "gpt_neo": WITHOUT_HEADS | dict(attention_types=[[["global", "local"], 3]], window_size=8),
    "xglm": dict(vocab_size=VOCABULARY, d_model=32, num_layers=NUM_BLOCKS, attention_heads=4, ffn_dim=64,
                 max_position_embeddings=128),
    "mpt": dict(vocab_size=VOCABULARY, d_model=32, n_layers=NUM_BLOCKS, n_heads=4, max_seq_len=128),
    # mixtures of experts
    **dict.fromkeys(("mixtral", "granitemoe", "minimax_m2", "phimoe"), PLAIN | EXPERTS),
    "granitemoe_swa": PLAIN | SLIDING | EXPERTS,
    "granitemoeshared": PLAIN | EXPERTS | dict(shared_intermediate_size=24),
    "gpt_oss": PLAIN | SLIDING | EXPERTS,
    "qwen2_moe": PLAIN | ROUTED | dict(num_experts=4, shared_expert_intermediate_size=24, mlp_only_layers=[1]),
    **dict.fromkeys(("qwen3_moe", "hy_v3"), PLAIN | ROUTED | dict(num_experts=4)),
    **dict.fromkeys(("olmoe", "flex_olmo"), PLAIN | dict(num_experts=4, num_experts_per_tok=2)),
    "cohere2_moe": PLAIN | SLIDING | dict(num_experts=4, num_experts_per_tok=2),
    **dict.fromkeys(("mellum", "kolibri1", "laguna"), PLAIN | ROUTED | SLIDING | dict(
        num_experts=4, num_local_experts=4, shared_expert_intermediate_size=24)),
    "glm4_moe": PLAIN | ROUTED | SHARED | dict(first_k_dense_replace=1),
    "solar_open": PLAIN | ROUTED | SHARED | ONE_GROUP,
    "dots1": PLAIN | ROUTED | SHARED | ONE_GROUP | dict(first_k_dense_replace=1, num_key_value_heads=4),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1"), DEEPSEEK),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), PLAIN | ROUTED | LATENT | SHARED | ONE_GROUP | INDEXED),
    "axk2": PLAIN | ROUTED | LATENT | SHARED | INDEXED | dict(gated_norm_rank=4),
    "deepseek_v4": PLAIN | ROUTED | SHARED | INDEXED | dict(
        index_topk=8, q_lora_rank=16, num_key_value_heads=1, sliding_window=8, o_groups=2, o_lora_rank=8,
        num_nextn_predict_layers=0, partial_rotary_factor=0.5,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"] * (NUM_BLOCKS // 2),
        mlp_layer_types=["hash_moe", *["moe"] * (NUM_BLOCKS - 1)],
        compress_rates=dict(compressed_sparse_attention=4, heavily_compressed_attention=8)),
    "minimax": PLAIN | dict(num_local_experts=4, block_size=8, layer_types=LINEAR["layer_types"]),
    "minimax_m3_vl_text": MINIMAX_3,
    "llama4_text": LLAMA_4,
    "ernie4_5_moe": PLAIN | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_num_shared_experts=1,
                                 moe_layer_start_index=1, moe_layer_end_index=5),
    "hunyuan_v1_moe": PLAIN | dict(num_experts=4, moe_topk=2),
    "exaone_moe": PLAIN | SLIDING | ROUTED | ONE_GROUP | dict(num_experts=4, num_shared_experts=1,
                                                              first_k_dense_replace=1),
    "afmoe": PLAIN | ROUTED | SLIDING | dict(num_experts=4, num_local_experts=4, num_shared_experts=1,
                                             num_dense_layers=1),
    "mimo_v2_flash": PLAIN | ROUTED | SLIDING | ONE_GROUP | dict(
        n_routed_experts=4, num_experts=4, v_head_dim=8, swa_v_head_dim=8, swa_head_dim=8, swa_num_attention_heads=4,
        swa_num_key_value_heads=2),
    "aria_text": PLAIN | dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "jetmoe": STATES | EXPERTS | dict(num_key_value_heads=2, kv_channels=8, intermediate_size=24,
                                      max_position_embeddings=128),
    # hybrids
    "qwen3_next": QWEN_MOE, "qwen3_5_moe_text": QWEN_MOE, "qwen3_5_text": PLAIN | LINEAR, "olmo_hybrid": PLAIN | LINEAR,
    "qwen4_exp_text": QWEN_MOE | dict(
        layer_types=["linear_attention", "indexed_attention"] * (NUM_BLOCKS // 2), hc_lowrank=8, ple_embed_dim=8,
        ngram_vocab_size_base=64, split_ngram_parts=2, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8,
        indexer_budget=8, indexer_compress_ratio=4),
    "lfm2": PLAIN | dict(layer_types=["conv", "full_attention"] * (NUM_BLOCKS // 2), block_auto_adjust_ff_dim=False),
    "lfm2_moe": PLAIN | ROUTED | dict(num_experts=4, num_dense_layers=1,
                                      layer_types=["conv", "full_attention"] * (NUM_BLOCKS // 2)),
    "inkling_text": PLAIN | ROUTED | SHARED | dict(
        sliding_window_size=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, d_rel=4,
        rel_extent=16, logits_mup_width_multiplier=1.0, layer_types=["hybrid_sliding", "hybrid"] * (NUM_BLOCKS // 2)),
    "kimi_linear": PLAIN | KIMI,
    "bailing_hybrid": PLAIN | KIMI | dict(num_expert_group=1, topk_group=1, num_nextn_predict_layers=0),
    "bamba": PLAIN | STATE_SPACE | dict(attn_layer_indices=[1, 4]),
    "granitemoehybrid": PLAIN | STATE_SPACE | dict(num_local_experts=0, shared_intermediate_size=64,
                                                   layer_types=["mamba", "attention"] * (NUM_BLOCKS // 2)),
    "jamba": PLAIN | dict(num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
                          use_mamba_kernels=False),
    "falcon_h1": PLAIN | STATE_SPACE | dict(mamba_d_ssm=64),
    "recurrent_gemma": PLAIN | dict(lru_width=32, attention_window_size=8,
                                    block_types=["recurrent", "recurrent", "attention"]),
    # blocks that share keys and values, or have heads of their own
    "gemma3n_text": PLAIN | SLIDING | PER_LAYER | dict(
        laurel_rank=4, activation_sparsity_pattern=[0.0] * NUM_BLOCKS, intermediate_size=[64] * NUM_BLOCKS),
    "gemma4_text": GEMMA_4 | PER_LAYER, "gemma4_unified_text": GEMMA_4,
    # with a tower; of those from Mistral 3 on, transformers has no text model alone
    "gemma3": dict(text_config=PLAIN | SLIDING, vision_config=IMAGES, mm_tokens_per_image=4),
    "gemma4": dict(text_config=GEMMA_4 | PER_LAYER, audio_config=None, vision_config=VISION | dict(
        num_key_value_heads=2, head_dim=8, global_head_dim=8)),
    "llama4": dict(text_config=LLAMA_4, vision_config=IMAGES | dict(
        intermediate_size=64, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)),
    "qwen3_5": dict(text_config=PLAIN | LINEAR, vision_config=QWEN_VISION),
    "qwen3_5_moe": dict(text_config=QWEN_MOE, vision_config=QWEN_VISION),
    "mistral3": dict(text_config=PLAIN | dict(model_type="ministral3"), vision_config=IMAGES | dict(
        model_type="pixtral", head_dim=8)),
    "qwen2_5_vl": dict(text_config=WITHOUT_HEADS | dict(num_key_value_heads=2, rope_parameters=ROPE_3D),
                       vision_config=dict(hidden_size=16, intermediate_size=16, depth=2, num_heads=2,
                                          out_hidden_size=32, fullatt_block_indexes=[1])),
    "qwen3_vl": dict(text_config=PLAIN | dict(rope_parameters=ROPE_3D), vision_config=QWEN_VISION | dict(
        deepstack_visual_indexes=[0, 1])),
    "qwen3_vl_moe": dict(text_config=PLAIN | ROUTED | dict(num_experts=4, rope_parameters=ROPE_3D),
                         vision_config=QWEN_VISION | dict(deepstack_visual_indexes=[0, 1])),
    "glm4v": dict(text_config=PLAIN | dict(rope_parameters=ROPE_3D), vision_config=IMAGES | dict(
        depth=2, num_heads=2, out_hidden_size=32)),
    **{family: dict(text_config=PLAIN | SLIDING | dict(model_type=text) if text == "cohere2" else
                    PLAIN | dict(model_type=text), vision_config=IMAGES | dict(image))
       for family, text, image in (
           ("llava", "llama", dict(model_type="clip_vision_model", projection_dim=16)),
           ("llava_next", "mistral", dict(model_type="clip_vision_model", projection_dim=16)),
           ("llava_onevision", "qwen2", dict(model_type="siglip_vision_model")), ("smolvlm", "llama", {}),
           ("internvl", "qwen3", dict(image_size=[28, 28], patch_size=[14, 14])),
           ("aya_vision", "cohere2", dict(model_type="siglip_vision_model")),
           ("cohere2_vision", "cohere2", dict(model_type="siglip_vision_model")))},
    "exaone4_5": dict(text_config=PLAIN | SLIDING | dict(model_type="exaone4"), vision_config=QWEN_VISION),
    "lfm2_vl": dict(
        text_config=PLAIN | dict(model_type="lfm2", layer_types=["conv", "full_attention"] * (NUM_BLOCKS // 2),
                                 block_auto_adjust_ff_dim=False),
        vision_config=VISION | dict(model_type="siglip2_vision_model", num_patches=16, patch_size=14)),
    "kimi_k25": dict(text_config=DEEPSEEK | dict(model_type="deepseek_v3"), vision_config=VISION),
    "minimax_m3_vl": dict(text_config=MINIMAX_3, vision_config=IMAGES),
    # one mixer a block
    **dict.fromkeys(("mamba", "falcon_mamba"), STATES | dict(state_size=4)),
    "mamba2": STATES | dict(state_size=4, num_heads=8, head_dim=8),
    "nemotron_h": PLAIN | ROUTED | SHARED | dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
        ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=1, chunk_size=8, use_mamba_kernels=False,
        moe_shared_expert_intermediate_size=24),
    # what is refused
    "rwkv": STATES,
    "zamba2": WITHOUT_HEADS | dict(num_key_value_heads=4, layers_block_type=["linear_attention", "hybrid"] * 3,
                                   mamba_d_state=8, n_mamba_heads=4, chunk_size=8, use_mamba_kernels=False,
                                   hybrid_layer_ids=[1, 3, 5], adapter_rank=4, tie_word_embeddings=True),
    "zaya": PLAIN | ROUTED | dict(num_experts=4, num_experts_per_tok=1, router_hidden_size=16),
    "hy_v4": PLAIN | ROUTED | LATENT | SHARED | ONE_GROUP | INDEXED | dict(
        indexer_types=["full", "shared"] * (NUM_BLOCKS // 2)),
    "longcat_flash": PLAIN | LATENT | dict(num_layers=3, ffn_hidden_size=64, expert_ffn_hidden_size=24,
                                           n_routed_experts=4, zero_expert_num=2, moe_topk=2),
    "hrm_text": PLAIN,
}
TEXT = (ROOT / "benchmarks" / "README.md").read_text()
CLASS = re.compile(r"\w+For(CausalLM|ConditionalGeneration)")
DONE, FAILED = "✓", "✗"
DROPPED = [(False, False), (True, False), (False, True), (True, True), (False, False), (False, False)]
COLUMNS = ("walk", "drop", "cache", "sparse", "quantized", "search", "depth export", "packed export", "finish")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="FAMILY",
                        help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("results/families"), metavar="FOLDER",
                        help="results and logs, a family each (default: results/families)")
    parser.add_argument("--write_readme", action="store_true", help="put the table into benchmarks/README.md")
    return parser.parse_args(argv)


def save_family(name: str, folder: Path, seed: int = 0) -> str:
    """Write a random model of a family with the demo's tokenizer to `folder`; returns it."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **FAMILIES[name])
    model = model_class(config).from_config(config, dtype=torch.float32)
    if hasattr(config, "vision_config"):
        model = getattr(transformers, type(model).__name__.replace("ForCausalLM", "ForConditionalGeneration"))(config)
    scale_weights(model, seed)
    model.save_pretrained(folder)
    load_tokenizer(str(ROOT / "demo" / "model")).save_pretrained(folder)
    return str(folder)


class Trial:
    """One family's model on its way through everything; each method a column, which returns its cell.

    What a user is told raises ValueError or SystemExit; a difference raises AssertionError.
    """

    def __init__(self, name: str, work: Path):
        self.work, self.model = work, save_family(name, work / "model")
        self.text = work / "text.txt"
        self.text.write_text(TEXT)
        self.tokens = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
        self._decoder: Decoder | None = None
        self.refused: dict[str, ValueError] = {}     # databases and "drop", why
        self.flags = ["--model_name_or_path", self.model, "--device", "cpu"]
        self.calibration = ["--calibration_data", str(self.text), "--calibration_tokens", "256",
                            "--calibration_sequence_length", "32"]

    def decoder(self) -> Decoder:
        """The model, loaded once, with nothing dropped."""
        self._decoder = self._decoder or load_decoder(self.model, "float32", "cpu")
        for block in self._decoder.blocks:
            block.drop(False, False)
        return self._decoder

    def states(self, decoder: Decoder) -> list[tuple[bool, bool]]:
        """DROPPED without what may not be dropped."""
        return [(attn and not block.attn.held, mlp and not block.mlp.held)
                for block, (attn, mlp) in zip(decoder.blocks, DROPPED)]

    def walk(self) -> str:
        decoder = self.decoder()
        documents = [self.tokens[0, :length] for length in (5, 9, 24, 7)]
        expected = [decoder.model(input_ids=document[None], use_cache=False).logits[0] for document in documents]
        minibatch = [(i, len(document)) for i, document in enumerate(documents)]
        for rows in microbatches(minibatch, 64, decoder.packed_rows):
            inputs = decoder.block_inputs(*assemble(documents, rows)[:2])
            hidden_states = inputs.hidden_states
            for index in range(len(decoder.blocks)):
                hidden_states = decoder.run_block(index, hidden_states, inputs)
            order = [i for row in rows for i, _ in row]
            same(decoder.logits(hidden_states).flatten(0, 1), torch.cat([expected[i] for i in order]))
        return DONE

    def drop(self) -> str:
        if not any(map(any, self.states(self.decoder()))):
            try:
                self.decoder().check_dropped(DROPPED)
            except ValueError as error:
                self.refused["drop"] = error
                raise
        decoder, zeroed = self.decoder(), load_decoder(self.model, "float32", "cpu")
        states = self.states(decoder)
        for block, other, state in zip(decoder.blocks, zeroed.blocks, states):
            block.drop(*state)
            for half, gone in zip((other.attn, other.mlp), state):
                for parameter in half.parameters if gone else ():
                    parameter.data.zero_()
        same(logits(decoder.model, self.tokens), logits(zeroed.model, self.tokens))
        fitness = Fitness(self.decoder(), list(self.tokens), lambda i, state: decoder.blocks[i].drop(*state))
        others = [tuple((block == i and not decoder.blocks[i].attn.held, False) for block in range(NUM_BLOCKS))
                  for i in range(NUM_BLOCKS)]
        beside = fitness.measure([*others, tuple(states)])[-1]
        alone = Fitness(decoder, list(self.tokens), fitness.set_block, teacher=False)
        alone.teacher = fitness.teacher
        same(torch.tensor(beside), torch.tensor(alone.measure([tuple(states)])[0]))
        return DONE

    def cache(self) -> str:
        decoder = self.decoder()
        kinds = {type(module) for block in decoder.blocks for module in block.attn.modules[:1]}
        for states in (self.states(decoder), *([(not block.attn.held and type(block.attn.modules[0]) is kind, False)
                                                for block in decoder.blocks] for kind in kinds)):
            for block, state in zip(decoder.blocks, states):
                block.drop(*state)
            generates_alike(decoder.model, self.tokens)
        return DONE

    def sparse(self) -> str:
        return self._database(sparsegpt, "--sparsity", "0.5", "--num_levels", "2", "--weights_diff", "64")

    def quantized(self) -> str:
        return self._database(gptq, "--bitwidth_options", "2", "3", "4", "--perchannel")

    def _database(self, module, *levels: str) -> str:
        folder = self.work / module.__name__.rpartition(".")[2]
        args = module.make_parser().parse_args([*self.flags, *self.calibration, *levels, "--save_dir", str(folder)])
        try:
            module.main(args)
        except ValueError as error:
            self.refused[folder.name] = error
            raise
        database, decoder = Database.open(folder), self.decoder()
        covered = sum(math.prod(database.shape(name)) for name in database.layers)
        weights = sum(parameter.numel() for block in decoder.blocks for parameter in block.module.parameters()
                      if parameter.dim() > 1)
        return f"{covered / weights:.0%}"

    def search(self) -> str:
        for method in ("sparsegpt", "gptq"):
            if method in self.refused:
                raise self.refused[method]
        small = [*self.flags, *self.calibration, "--generations", "1", "--offspring", "4", "--initially_generated", "4",
                 "--no_eval", "--initial_tokens", "64", "--survivors_per_selection", "2", "1",
                 "--tokens_per_selection", "32", "64", "--output_dir"]
        with patch("utils.search.plot_search"):      # a quarter of all the time
            if "drop" not in self.refused:
                evo_drop.main([*small, str(self.work / "depth"), "--sparsity", "0.17"])
            evo_unstructured.main([*small, str(self.work / "sparse"), "--sparse_weights_path",
                                   str(self.work / "sparsegpt")])
            evo_quant.main([*small, str(self.work / "bits"), "--quant_weights_path", str(self.work / "gptq"),
                            "--target_bitwidth", "3"])
        return DONE

    def depth_export(self) -> str:
        if "drop" in self.refused:
            raise self.refused["drop"]
        decoder = self.decoder()
        states, folder = self.states(decoder), self.work / "depth_export"
        write_drop_config(self.work / "drop.txt", states)
        export.main([*self.flags, "--drop_config", str(self.work / "drop.txt"), "--save_dir", str(folder)])
        for block, state in zip(decoder.blocks, states):
            block.drop(*state)
        self._reloads(folder, logits(decoder.model, self.tokens))
        return DONE

    def packed_export(self) -> str:                  # the last column of this decoder: it changes the weights
        if "gptq" in self.refused:
            raise self.refused["gptq"]
        folder, config = self.work / "packed_export", self.work / "bits" / "evo-kl-configuration-3.txt"
        export.main([*self.flags, "--quant_weights_path", str(self.work / "gptq"), "--quant_config_path", str(config),
                     "--save_dir", str(folder)])
        decoder = self.decoder()
        switcher = LevelSwitcher(decoder, Database.open(self.work / "gptq"), 0)
        for index, levels in enumerate(switcher.states(read_level_config(config))):
            switcher.set_block(index, levels)
        self._reloads(folder, logits(decoder.model, self.tokens))
        return DONE

    def finish(self) -> str:
        """What was dropped, and what the search for bits has found."""
        decoder = load_decoder(self.model, "float32", "cpu")
        documents = torch.stack(calibration_documents(str(self.text), load_tokenizer(self.model), 256, 32, 0))
        dense = logits(decoder.model, documents)

        def finished(flags: list[str], folder: Path) -> Path:
            finish.main([*self.flags, *self.calibration, *flags, "--steps", "10", "--end_to_end_steps", "2",
                         "--batch_size", "2", "--save_dir", str(folder)])
            return folder

        drop, states = self.work / "drop.txt", self.states(decoder)
        for block, state in zip(decoder.blocks, states):
            block.drop(*state)
        before = divergence(dense, logits(decoder.model, documents))
        if "drop" not in self.refused:
            folder = finished(["--drop_config", str(drop)], self.work / "finished")
            model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32)
            lower(divergence(dense, logits(model, documents)), before)
        if "gptq" in self.refused:
            raise self.refused["gptq"]

        config = self.work / "bits" / "evo-kl-configuration-3.txt"
        flags = ["--quant_weights_path", str(self.work / "gptq"), "--quant_config_path", str(config)]
        found = []
        for block in decoder.blocks:
            block.drop(False, False)
        for folder in (self.work / "gptq", finished(flags, self.work / "finished-gptq")):
            switcher = LevelSwitcher(decoder, Database.open(folder), 0)
            for index, levels in enumerate(switcher.states(read_level_config(config))):
                switcher.set_block(index, levels)
            found.append(divergence(dense, logits(decoder.model, documents)))
        lower(found[1], found[0])
        return DONE

    def _reloads(self, folder: Path, expected: torch.Tensor) -> None:
        """Assert that plain transformers loads what was exported, all of it, as the class that it came from."""
        before, config = AutoConfig.from_pretrained(self.model), AutoConfig.from_pretrained(folder)
        assert config.architectures == before.architectures, f"{config.architectures}, not {before.architectures}"
        model, report = getattr(transformers, config.architectures[0]).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not report[problem], f"{problem}: {min(map(str, report[problem]))}"
        same(logits(model, self.tokens), expected)
        generates_alike(model, self.tokens)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    apart = float((found - expected).abs().max() / expected.abs().max())
    assert apart < 1e-3, f"differs by {apart:.2g} of the largest"


def lower(found: float, before: float) -> None:
    assert found < before, f"diverges by {found:.3g}, no less than {before:.3g} before"


def divergence(teacher: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL divergence, by definition."""
    p, q = (values.double().log_softmax(-1) for values in (teacher, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def generates_alike(model, tokens: torch.Tensor) -> None:
    """Assert that tokens generated with a cache have the logits that a whole forward gives them."""
    model.generation_config.eos_token_id = None
    cached, whole = (model.generate(tokens[:, :9], attention_mask=torch.ones_like(tokens[:, :9]), max_new_tokens=12,
                                    do_sample=False, use_cache=use_cache, output_logits=True,
                                    return_dict_in_generate=True) for use_cache in (True, False))
    same(torch.stack(cached.logits), torch.stack(whole.logits))


def cell(column: Callable[[], str], log: Path) -> str:
    """What a column comes to: its cell, the sentence that a user would see, or ✗ and what went wrong."""
    with log.open("a") as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            return column()
        except (SystemExit, ValueError) as error:
            traceback.print_exc()
            return re.sub(r"^error: |/\S*/", "", str(error))
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(str(error).split())[:120]
            return f"{FAILED} {'' if isinstance(error, AssertionError) else type(error).__name__ + ' '}{reason}"


def try_family(name: str, work: Path) -> dict[str, str]:
    """Column -> cell."""
    work.mkdir(parents=True)
    trial = Trial(name, work)
    return {column: cell(getattr(trial, column.replace(" ", "_")), work / "log.txt") for column in COLUMNS}


def table(results: dict[str, dict[str, str]]) -> str:
    """Markdown: which families do all of it, and a row of each other one; what was said, below, by whichever class."""
    def done(value: str) -> bool:
        return value == DONE or value.endswith("%")

    sentences: dict[str, int] = {}
    rows, whole = [["", *COLUMNS]], []
    for name, cells in results.items():
        if all(map(done, cells.values())):
            whole.append(name)
            continue
        cells = {column: CLASS.sub("the model's class", value) for column, value in cells.items()}
        rows.append([name, *(value if done(value) or value[0] == FAILED else
                             f"[{sentences.setdefault(value, len(sentences) + 1)}]" for value in cells.values())])
    least = min((int(value[:-1]) for name in whole for value in results[name].values() if value.endswith("%")),
                default=100)
    parts = [fill(f"All of it, their databases with {least}% or more of the blocks' weights: {', '.join(whole)}.")
             ] if whole else []
    parts += [format_table(rows)] if len(rows) > 1 else []
    notes = {f"{number}. ": sentence for sentence, number in sentences.items()}
    parts += ["\n".join(fill(number + sentence, " " * len(number)) for number, sentence in notes.items())]
    return "\n\n".join(filter(None, parts))


def fill(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main(argv: list[str] | None = None) -> dict[str, dict[str, str]]:
    """Try the families that the flags name; returns family -> column -> cell."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results, made_of = {}, commit()
    for name in args.families:
        file = args.out / f"{name}.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        if found.get("commit") != made_of:
            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                cells = try_family(name, Path(folder) / name)
                shutil.copy(Path(folder) / name / "log.txt", args.out / f"{name}.txt")
            found = {"commit": made_of, "cells": cells, "seconds": time.process_time() - began}
            write_atomic(file, json.dumps(found))
        results[name] = found
        print(f"{name} ({found['seconds']:.0f} s): " + "; ".join(
            f"{column}: {value}" for column, value in found["cells"].items()), flush=True)
    text = table({name: found["cells"] for name, found in results.items()})
    print(text)
    if args.write_readme:
        minutes = sum(found["seconds"] for found in results.values()) / 60
        write_readme("families", f"{text}\n\n{len(results)} families in {minutes:.0f} minutes of one core.")
    return {name: found["cells"] for name, found in results.items()}


if __name__ == "__main__":
    main()
