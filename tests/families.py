"""Small real transformers models, one of every family, with weights under which every sub-block matters."""
import bisect
import heapq
import inspect
import math
import textwrap
from copy import deepcopy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96
NUM_BLOCKS = 4

_PLAIN = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=NUM_BLOCKS,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
              eos_token_id=2, tie_word_embeddings=False)
_ALTERNATING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2))

_EAGER_EXPERTS = dict(experts_implementation="eager", num_experts_per_tok=2)       # grouped_mm knows no float64

# name of a test -> (model_type, configuration)
FAMILIES = {
    "llama": ("llama", _PLAIN | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", _PLAIN | dict(sliding_window=8)),
    "qwen2": ("qwen2", _PLAIN | dict(use_sliding_window=True, **_ALTERNATING)),
    "qwen3": ("qwen3", _PLAIN | dict(head_dim=16)),
    "gemma2": ("gemma2", _PLAIN | dict(head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=15.0,
                                       attn_logit_softcapping=20.0, **_ALTERNATING)),
    "gemma3": ("gemma3_text", _PLAIN | dict(head_dim=16, query_pre_attn_scalar=16, **_ALTERNATING)),
    "phi3": ("phi3", _PLAIN),
    "olmo2": ("olmo2", _PLAIN),
    "opt": ("opt", dict(vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48,
                        num_hidden_layers=NUM_BLOCKS, num_attention_heads=4, max_position_embeddings=64,
                        pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "gpt_neox": ("gpt_neox", _PLAIN | dict(num_key_value_heads=4)),
    "mixtral": ("mixtral", _PLAIN | dict(num_local_experts=4, **_EAGER_EXPERTS)),
    "qwen2_moe": ("qwen2_moe", _PLAIN | dict(num_experts=4, moe_intermediate_size=24, mlp_only_layers=[1],
                                             shared_expert_intermediate_size=24, **_EAGER_EXPERTS)),
    "falcon": ("falcon", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=NUM_BLOCKS,
                              num_attention_heads=4, bos_token_id=1, eos_token_id=2)),
    "gpt2": ("gpt2", dict(vocab_size=VOCABULARY, n_embd=32, n_layer=NUM_BLOCKS, n_head=4, n_positions=64,
                          bos_token_id=1, eos_token_id=2)),
}


def build(name: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None, seed: int = 0,
          **overrides) -> torch.nn.Module:
    """A model of a family of FAMILIES, or of a `model_type`, with random weights of some size."""
    model_type, options = FAMILIES.get(name, (name, {}))
    config = AutoConfig.for_model(model_type, **(options | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    scale_weights(model, seed)
    return model.eval()


@torch.no_grad()
def scale_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Matrices that keep their input's scale, norms that are not 1, biases that are not 0: with the small weights of
    a fresh model, dropping a sub-block changes next to nothing, and mistakes hide below any tolerance."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.1 * values)
        elif "emb" in name or "wte" in name or "wpe" in name:
            parameter.copy_(0.5 * values)
        else:
            parameter.copy_(values * parameter.shape[-1]**-0.5)


ATTENTIONS = ("self_attn", "self_attention", "attention", "attn")
MLPS = ("mlp", "block_sparse_moe", "fc1", "fc2")


@torch.no_grad()
def dropped_copy(model: torch.nn.Module, states) -> torch.nn.Module:
    """A copy of `model` in which every parameter of the dropped sub-blocks is zero: what dropping means, the plain way.

    Finds sub-blocks by the names the families give them, unlike the code under test."""
    copy = deepcopy(model)
    for block, (attn, mlp) in zip(blocks_of(copy), states, strict=True):
        for names, dropped in ((ATTENTIONS, attn), (MLPS, mlp)):
            children = [child for name, child in block.named_children() if name in names]
            assert children, f"no {names} in {type(block).__name__}"
            for child in children if dropped else ():
                for parameter in child.parameters():
                    parameter.zero_()
    return copy


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(module for name, module in model.named_modules() if name.endswith((".layers", ".h")))


@torch.no_grad()
def plain_logits(model: torch.nn.Module, documents) -> list[torch.Tensor]:
    """All logits [length, vocabulary] of each document, run alone through the whole model."""
    return [model(input_ids=tokens[None]).logits[0].double() for tokens in documents]


def plain_values(teacher_logits, logits, documents, topk: int = 10) -> dict[str, float]:
    """Fitness of each kind from full logits, by its definition, in float64."""
    sums, count = dict.fromkeys(("kl", "ppl", "sparse_kl"), 0.0), 0
    for tokens, p, q in zip(documents, teacher_logits, logits, strict=True):
        p, q, top = p[:-1].softmax(-1), q[:-1].softmax(-1), p[:-1].topk(topk, dim=-1).indices
        top_p, top_q = (x.gather(-1, top) / x.gather(-1, top).sum(-1, keepdim=True) for x in (p, q))
        sums["kl"] += float((p * (p / q).log()).sum())
        sums["sparse_kl"] += float((top_p * (top_p / top_q).log()).sum())
        sums["ppl"] += sum(-math.log(q[i, token]) for i, token in enumerate(tokens[1:].tolist()))
        count += len(tokens) - 1
    return {kind: math.exp(total / count) if kind == "ppl" else total / count for kind, total in sums.items()}


def train_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few files of Python's standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([inspect.getsource(module) for module in (bisect, heapq, textwrap)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_llama(folder, tokenizer, **overrides) -> str:
    """A small Llama for `tokenizer`, saved with it in `folder`."""
    model = build("llama", vocab_size=len(tokenizer), max_position_embeddings=256, **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
