"""Depth: regroup the sub-blocks that a drop configuration keeps into as few ordinary blocks as possible.

In a model of sequential residuals an attention and the MLP that comes next, of whatever block, are an ordinary block,
so only unpaired halves need zeros. That a regrouping is the same function is not assumed from the family: the new
model is built by its own class from its new config and must give the searched model's logits, to the bit. Where it does
not (parallel residuals, blocks that know their depth), blocks keep their own halves, and in the last resort all blocks.
"""
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.initialization import no_init_weights

from utils.decoder import Block, Decoder

Pairs = list[tuple[int | None, int | None]]      # a new block: whose attention, whose MLP; None: zeros
MLP_FIELDS = re.compile(r"mlp|ffn|intermediate|moe|expert|dense|sparse")    # per-block fields that follow the MLP
NOT_PER_BLOCK = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")    # lists of another kind
PROBE_TOKENS = 64


@dataclass
class Regrouped:
    model: nn.Module                 # of the same class, with as many blocks as pairs; shares the kept tensors
    pairs: Pairs
    sources: dict[str, str]          # name of a tensor in `model` -> its name in the original one
    zeroed: set[str]                 # names in `model` of tensors that are zeros of their source's shape


def pair_up(dropped: Sequence[tuple[bool, bool]]) -> Pairs:
    """The fewest blocks that run the kept sub-blocks in their order; dropped: (attention, MLP) of every block."""
    pairs: Pairs = []
    for index, (no_attn, no_mlp) in enumerate(dropped):
        if not no_attn:
            pairs.append((index, None))
        if not no_mlp and pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], index)
        elif not no_mlp:
            pairs.append((None, index))
    return pairs or [(None, None)]               # no runtime takes a model without any block


def own_pairs(dropped: Sequence[tuple[bool, bool]], remove: bool) -> Pairs:
    """Every block with its own halves; with `remove`, without the blocks that lose both."""
    pairs: Pairs = [(None if no_attn else index, None if no_mlp else index)
                    for index, (no_attn, no_mlp) in enumerate(dropped) if not (remove and no_attn and no_mlp)]
    return pairs or [(None, None)]


@torch.no_grad()
def regroup(decoder: Decoder, dropped: Sequence[tuple[bool, bool]]) -> Regrouped:
    """A plain model that computes what `decoder`, whose sub-blocks are dropped as `dropped` says, computes."""
    if not any(map(any, dropped)):
        names = list(decoder.model.state_dict())
        return Regrouped(decoder.model, pair_up(dropped), dict(zip(names, names)), set())
    generator = torch.Generator().manual_seed(0)
    text_config = decoder.config.get_text_config(decoder=True)
    length = min(PROBE_TOKENS, getattr(text_config, "max_position_embeddings", PROBE_TOKENS))
    tokens = torch.randint(text_config.vocab_size, (1, length), generator=generator).to(decoder.device)
    expected = decoder.model(input_ids=tokens, use_cache=False).logits
    roles = [child_roles(decoder, block, tokens[:, :8]) for block in decoder.blocks]
    plans = (pair_up(dropped), own_pairs(dropped, remove=True), own_pairs(dropped, remove=False))
    for number, pairs in enumerate(plans):
        if number and pairs == plans[number - 1]:
            continue
        regrouped = build(decoder, pairs, roles)
        if regrouped is not None and same_settings(decoder, regrouped) and torch.equal(
                regrouped.model(input_ids=tokens, use_cache=False).logits, expected):
            return regrouped
    raise ValueError(f"{type(decoder.model).__name__}: zeroing the dropped sub-blocks does not give the model that "
                     f"skips them, so this configuration cannot be exported; expected zero weights to add zeros")


@torch.no_grad()
def child_roles(decoder: Decoder, block: Block, tokens: torch.Tensor) -> dict[str, str]:
    """"attn" or "mlp" for every child of a block: to which of the two its norms belong.

    What runs before the attention is the attention's, and so is a norm of its output, which is known by its input's
    being all zeros while the attention is dropped; everything else that runs later is the MLP's.
    """
    names = {child: name for name, child in block.module.named_children()}
    roles = {names[child]: "attn" for child in block.attn.modules}
    roles.update({names[child]: "mlp" for child in block.mlp.modules})
    attention, after = block.attn.modules[0], False

    def record(module, args, kwargs):
        nonlocal after
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        after = after or module is attention
        roles.setdefault(names[module], "mlp" if after and inputs and inputs[0].any() else "attn")

    hooks = [child.register_forward_pre_hook(record, with_kwargs=True) for child in names]
    before = block.dropped
    block.drop(True, False)
    inputs = decoder.block_inputs(tokens)
    decoder.run_block(block.index, inputs.hidden_states, inputs)
    block.drop(*before)
    for hook in hooks:
        hook.remove()
    return roles


def build(decoder: Decoder, pairs: Pairs, roles: list[dict[str, str]]) -> Regrouped | None:
    """The model of `pairs`; None where its config describes tensors of other names or shapes."""
    state = decoder.model.state_dict()
    folder = decoder.blocks[0].name.rpartition(".")[0]
    sources = {name: name for name in state if not name.startswith(f"{folder}.")}
    zeroed: set[str] = set()
    for new, (attn, mlp) in enumerate(pairs):
        for role, donor in (("attn", attn), ("mlp", mlp)):
            block = decoder.blocks[_donor(attn, mlp) if donor is None else donor]
            modules = (block.attn if role == "attn" else block.mlp).modules
            children = dict(block.module.named_children())
            for name in state:
                inside = name.removeprefix(f"{block.name}.")
                child = inside.partition(".")[0]
                if inside != name and roles[block.index].get(child, "attn") == role:
                    sources[f"{folder}.{new}.{inside}"] = name
                    if donor is None and children.get(child) in modules:
                        zeroed.add(f"{folder}.{new}.{inside}")

    config = follow(decoder.config, pairs, len(decoder.blocks))
    with no_init_weights():
        model = type(decoder.model)._from_config(config, dtype=decoder.dtype,
                                                 attn_implementation=decoder.config._attn_implementation)
    tensors = {name: torch.zeros_like(state[source]) if name in zeroed else state[source]
               for name, source in sources.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != {
            name: tensor.shape for name, tensor in model.state_dict().items()}:
        return None
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.generation_config = deepcopy(decoder.model.generation_config)
    return Regrouped(model.to(decoder.device).eval().requires_grad_(False), pairs, sources, zeroed)


def follow(config, pairs: Pairs, num_blocks: int):
    """A copy of `config` for the new blocks: fields with an entry a block, or with indices of blocks, follow the
    attention, or the MLP if their name speaks of it."""
    config = deepcopy(config)
    text_config = config.get_text_config(decoder=True)
    attn_donors = [_donor(attn, mlp) for attn, mlp in pairs]
    mlp_donors = [_donor(mlp, attn) for attn, mlp in pairs]
    changed = {}
    for key, value in text_config.to_dict().items():
        if not isinstance(value, (list, tuple)) or key in NOT_PER_BLOCK:
            continue
        donors = mlp_donors if MLP_FIELDS.search(key) else attn_donors
        if len(value) == num_blocks:
            changed[key] = [value[donor] for donor in donors]
        elif key.endswith("_layers"):
            changed[key] = [new for new, donor in enumerate(donors) if donor in value]
    for key, value in {**changed, "num_hidden_layers": len(pairs)}.items():
        setattr(text_config, key, value)
    return config


def same_settings(decoder: Decoder, regrouped: Regrouped) -> bool:
    """Whether all modules of the new blocks have their donors' settings (window, scaling, kind of layer, ...): a
    mistake in a long window would show in no short text."""
    modules, originals = dict(regrouped.model.named_modules()), dict(decoder.model.named_modules())
    owners = {name.rpartition(".")[0]: source.rpartition(".")[0] for name, source in regrouped.sources.items()}
    folder = decoder.blocks[0].name.rpartition(".")[0]
    for new, (attn, mlp) in enumerate(regrouped.pairs):
        owners[f"{folder}.{new}"] = decoder.blocks[_donor(attn, mlp)].name
        for role, donor in (("attn", attn), ("mlp", mlp)):
            for child, original in decoder.blocks[donor].module.named_children() if donor is not None else ():
                if original in getattr(decoder.blocks[donor], role).modules:
                    owners[f"{folder}.{new}.{child}"] = f"{decoder.blocks[donor].name}.{child}"
    return all(_settings(modules[name]) == _settings(originals[owner]) for name, owner in owners.items())


def _settings(module: nn.Module) -> dict[str, object]:
    return {key: value for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "training", "extra_outputs")
            and not key.startswith("_")}


def _donor(first: int | None, second: int | None) -> int:
    """Whose block a half without donor is taken from: the other half's."""
    return first if first is not None else second or 0
