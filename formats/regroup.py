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
Donors = list[tuple[int, int]]                   # a new block: of which ones its halves are, zeros too
MLP_FIELDS = re.compile(r"mlp|ffn|intermediate|moe|expert|dense|sparse")    # per-block fields that follow the MLP
NOT_PER_BLOCK = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")    # lists of another kind
PROBE_TOKENS = 64


@dataclass
class Regrouped:
    model: nn.Module                 # of the same class, with as many blocks as pairs; shares the kept tensors
    pairs: Pairs
    sources: dict[str, str]          # name of a tensor in `model` -> its name in the original one
    zeroed: set[str]                 # names in `model` of tensors that are zeros of their source's shape
    donors: Donors


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


def whole(decoder: Decoder) -> Regrouped:
    """The model as it is."""
    names, pairs = list(decoder.model.state_dict()), [(block.index, block.index) for block in decoder.blocks]
    return Regrouped(decoder.model, pairs, dict(zip(names, names)), set(), pairs)


@torch.no_grad()
def regroup(decoder: Decoder, dropped: Sequence[tuple[bool, bool]]) -> Regrouped:
    """A plain model that computes what `decoder`, whose sub-blocks are dropped as `dropped` says, computes."""
    if not any(map(any, dropped)):
        return whole(decoder)
    generator = torch.Generator().manual_seed(0)
    text_config = decoder.config.get_text_config(decoder=True)
    length = min(PROBE_TOKENS, getattr(text_config, "max_position_embeddings", PROBE_TOKENS))
    tokens = torch.randint(text_config.vocab_size, (1, length), generator=generator).to(decoder.device)
    expected = decoder.model(input_ids=tokens, use_cache=False).logits
    cached = continues(decoder.model, tokens, expected)
    roles = [child_roles(decoder, block, tokens[:, :8]) for block in decoder.blocks]
    every = [(index, index) for index in range(len(dropped))]
    plans = [(pairs, donors_of(pairs)) for pairs in (pair_up(dropped), own_pairs(dropped, remove=True))]
    plans = [kept for plan in plans for kept in (plan, with_every_kind(decoder, *plan))]
    tried = []
    for plan in (*plans, (own_pairs(dropped, remove=False), every)):
        if plan in tried:
            continue
        tried.append(plan)
        regrouped = build(decoder, *plan, roles)
        if regrouped is not None and same_settings(decoder, regrouped) and torch.equal(
                regrouped.model(input_ids=tokens, use_cache=False).logits, expected) and (
                not cached or continues(regrouped.model, tokens, expected)):
            return regrouped
    raise ValueError(f"{type(decoder.model).__name__}: zeroing the dropped sub-blocks does not give the model that "
                     f"skips them, so this configuration cannot be exported; expected zero weights to add zeros")


def donors_of(pairs: Pairs) -> Donors:
    """A half without a donor of its own is zeros in the form of the block of the other half."""
    return [(_donor(attn, mlp), _donor(mlp, attn)) for attn, mlp in pairs]


def with_every_kind(decoder: Decoder, pairs: Pairs, donors: Donors) -> tuple[Pairs, Donors]:
    """The same with a block of zeros for every kind of attention that is gone: a cache of several kinds may need one of
    each."""
    kinds = [type(block.attn.modules[0]) for block in decoder.blocks]
    gone = dict.fromkeys(kind for kind in kinds if kind not in {kinds[attn] for attn, _ in donors})
    added = [((None, None), (kinds.index(kind),) * 2) for kind in gone]
    plan = sorted([*zip(pairs, donors), *added], key=lambda new: max(half for half in new[1]))
    return [pair for pair, _ in plan], [donor for _, donor in plan]


@torch.no_grad()
def continues(model: nn.Module, tokens: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the last token's logits are what is `expected`, roughly, where all before it are in a cache."""
    try:
        cache = model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
        found = model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    except Exception:                # whatever a cache that lacks something ends in
        return False
    return torch.allclose(found, expected[:, -1], rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@torch.no_grad()
def child_roles(decoder: Decoder, block: Block, tokens: torch.Tensor) -> dict[str, str]:
    """"attn" or "mlp" for every child of a block: to which of the two its norms belong.

    What runs before the attention is the attention's, and so is a norm of its output, which is known by its input's
    being all zeros while the attention is dropped; everything else that runs later is the MLP's.
    """
    names = {child: name for name, child in block.module.named_children()}
    roles = {names[child]: "attn" for child in block.attn.modules}
    roles.update({names[child]: "mlp" for child in block.mlp.modules})
    after = False

    def record(module, args, kwargs):
        nonlocal after
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        after = after or module in block.attn.modules
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


def build(decoder: Decoder, pairs: Pairs, donors: Donors, roles: list[dict[str, str]]) -> Regrouped | None:
    """The model of `pairs`, zeros in the form of `donors`; None where its config describes tensors of other names or
    shapes."""
    state = decoder.model.state_dict()
    folder = decoder.blocks[0].name.rpartition(".")[0]
    sources = {name: name for name in state if not name.startswith(f"{folder}.")}
    zeroed: set[str] = set()
    for new, (pair, forms) in enumerate(zip(pairs, donors)):
        for role, donor, form in zip(("attn", "mlp"), pair, forms):
            block = decoder.blocks[form]
            modules = (block.attn if role == "attn" else block.mlp).modules
            children = dict(block.module.named_children())
            for name in state:
                inside = name.removeprefix(f"{block.name}.")
                child = inside.partition(".")[0]
                if inside != name and roles[block.index].get(child, "attn") == role:
                    sources[f"{folder}.{new}.{inside}"] = name
                    if donor is None and children.get(child) in modules:
                        zeroed.add(f"{folder}.{new}.{inside}")

    config = follow(decoder.config, donors, len(decoder.blocks))
    with no_init_weights():
        model = type(decoder.model)._from_config(config, dtype=decoder.dtype,
                                                 attn_implementation=decoder.config._attn_implementation)
    tensors, used = {}, set()
    for name, source in sources.items():             # what two new blocks take, a norm say, is not theirs together
        tensors[name] = (torch.zeros_like(state[source]) if name in zeroed else state[source].clone()
                         if source in used else state[source])
        used.add(source)
    if {name: tensor.shape for name, tensor in tensors.items()} != {
            name: tensor.shape for name, tensor in model.state_dict().items()}:
        return None
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.generation_config = deepcopy(decoder.model.generation_config)
    return Regrouped(model.to(decoder.device).eval().requires_grad_(False), pairs, sources, zeroed, donors)


def follow(config, donors: Donors, num_blocks: int):
    """A copy of `config` for the new blocks: fields with an entry a block, or with indices of blocks, follow the
    attention, or the MLP if their name speaks of it."""
    config = deepcopy(config)
    text_config = config.get_text_config(decoder=True)
    attn_donors, mlp_donors = (list(halves) for halves in zip(*donors))
    changed = {}
    for key, value in text_config.to_dict().items():
        if not isinstance(value, (list, tuple)) or key in NOT_PER_BLOCK:
            continue
        halves = mlp_donors if MLP_FIELDS.search(key) else attn_donors
        if len(value) == num_blocks:
            changed[key] = [value[donor] for donor in halves]
        elif key.endswith("_layers"):
            changed[key] = [new for new, donor in enumerate(halves) if donor in value]
    single = {int(index): fields for index, fields in (text_config.to_dict().get("per_layer_config") or {}).items()}
    for key, value in {**changed, "num_hidden_layers": len(donors)}.items():
        setattr(text_config, key, value)
    if single:                       # fields of single blocks, which transformers checks against all others
        text_config.per_layer_config = {new: {
            key: value for speaks_of_mlp, donor in enumerate(halves) for key, value in single.get(donor, {}).items()
            if bool(MLP_FIELDS.search(key)) == speaks_of_mlp} for new, halves in enumerate(donors)}
    return config


def same_settings(decoder: Decoder, regrouped: Regrouped) -> bool:
    """Whether all modules of the new blocks have their donors' settings (window, scaling, kind of layer, ...): a
    mistake in a long window would show in no short text."""
    modules, originals = dict(regrouped.model.named_modules()), dict(decoder.model.named_modules())
    owners = {name.rpartition(".")[0]: source.rpartition(".")[0] for name, source in regrouped.sources.items()}
    folder = decoder.blocks[0].name.rpartition(".")[0]
    for new, (pair, forms) in enumerate(zip(regrouped.pairs, regrouped.donors)):
        owners[f"{folder}.{new}"] = decoder.blocks[forms[0]].name
        for role, donor in zip(("attn", "mlp"), pair):
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
