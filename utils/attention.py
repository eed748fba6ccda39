"""Attention over packed documents, each by itself: no mask of tokens² is built or read, and none of its products are
made that it would forbid."""
from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NOT_PLAIN = ("sliding_window", "softcap", "s_aux", "position_bias")      # what only masked attention can do here


def enable() -> None:
    """Have models with sdpa attend by document wherever blocks are given what `bounds` returns."""
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)


def bounds(position_ids: torch.Tensor, device: torch.device) -> dict:
    """Keyword arguments for a model's forward: where the documents lie in rows whose position_ids [rows, tokens], on
    the host, restart at each. The first four are those of flash_attention_2, which else computes them in every layer.
    """
    positions = position_ids.flatten()
    starts = (positions == 0).nonzero().flatten()
    ends = torch.cat([starts[1:], torch.tensor([len(positions)])])
    lengths = (ends - starts).tolist()
    cumulative = torch.cat([starts, ends[-1:]]).to(torch.int32).to(device, non_blocking=True)
    return {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative, "max_length_q": max(lengths),
            "max_length_k": max(lengths), "document_lengths": lengths}


def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: torch.Tensor | None, scaling: float | None = None, cu_seq_lens_q: torch.Tensor = None,
              max_length_q: int = 0, document_lengths: Sequence[int] | None = None, **kwargs
              ) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: query [rows, heads, tokens, size], key and value of perhaps fewer heads, to
    [rows, tokens, heads, size]. Without `document_lengths` transformers' own. Raises NotImplementedError where the
    model wants more than causal attention."""
    if document_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    more = [name for name in NOT_PLAIN if kwargs.get(name) is not None]
    if more:
        raise NotImplementedError(f"attention by document with {', '.join(more)}")
    rows, _, tokens, size = query.shape
    q, k, v = (states.transpose(1, 2).reshape(rows * tokens, -1, states.shape[-1]) for states in (query, key, value))
    if has_varlen(q.device, q.dtype) and size <= 256:
        output = _varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    else:
        output = by_document(q, k, v, document_lengths, scaling)
    return output.view(rows, tokens, -1, v.shape[-1]), None


def by_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int],
                scaling: float | None) -> torch.Tensor:
    """Causal attention of documents one after another: query [tokens, heads, size], to the same."""
    outputs = [F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in parts), is_causal=True,
                                              scale=scaling, enable_gqa=query.shape[1] != key.shape[1])[0]
               for parts in zip(*(states.split(lengths) for states in (query, key, value)))]
    return torch.cat(outputs, dim=1).transpose(0, 1)


@cache
def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has one kernel for all documents that gives the same: flash attention, in half precision on a GPU.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    generator, lengths = torch.Generator(device).manual_seed(0), [5, 1, 40]
    query, key, value = (torch.randn(46, heads, 64, dtype=dtype, device=device, generator=generator)
                         for heads in (4, 2, 2))
    cumulative = torch.tensor([0, 5, 6, 46], dtype=torch.int32, device=device)
    try:
        found = _varlen(query, key, value, cumulative, 40, 0.125)
    except Exception:                # another torch, another GPU: whatever it is, there is the other way
        return False
    return torch.allclose(found.float(), by_document(query, key, value, lengths, 0.125).float(), atol=2e-2)


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cumulative: torch.Tensor, longest: int,
            scaling: float | None) -> torch.Tensor:
    kernel, asks_for_groups = _kernel()
    grouped = {"enable_gqa": True} if asks_for_groups and query.shape[1] != key.shape[1] else {}
    return kernel(query, key, value, cumulative, cumulative, longest, longest, scale=scaling, window_size=(-1, 0),
                  **grouped)


@cache
def _kernel() -> tuple[Callable, bool]:
    """torch's, and whether it wants to be told that keys have fewer heads than queries: torch 2.11's takes them
    unasked."""
    from torch.nn.attention.varlen import varlen_attn
    return varlen_attn, "enable_gqa" in signature(varlen_attn).parameters
