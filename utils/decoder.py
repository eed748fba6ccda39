"""A causal language model of any decoder family taken apart: its blocks, their attention and MLP, their linear layers.

Nothing here knows a family by name. Blocks are `get_decoder().layers`, else the longest ModuleList of equal class. Of
a block's children that hold weight matrices, the attention is the one whose forward takes masks, rotary embeddings or
a cache (or several side by side, as in Falcon-H1); what is left is the MLP (one module, or several as in OPT), but for
what mixes residual streams. One of the two may be all that a block has (Mamba). What mixes streams, what a module puts
into a cache, and what blocks pass each other besides hidden states, is found by watching a forward.
"""
import inspect
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Cache

from utils import attention
from utils.experts import Layer, expert_layers, merged_names, orientations
from utils.offload import OffloadedBlocks

ATTENTION_ARGUMENTS = {"attention_mask", "position_embeddings", "past_key_values", "past_key_value", "layer_past"}
# method by which a module puts something into a cache -> shapes of the least it may put there for [batch, tokens]
CACHED = {"update": lambda batch, tokens: [(batch, 1, tokens, 1)] * 2,
          "update_conv_state": lambda batch, tokens: [(batch, 1, 1)],
          "update_indexer": lambda batch, tokens: [(batch, tokens, 1)]}
COMPILED_VARIANTS = 64           # of a block; beyond them torch would go on uncompiled


class SubBlock:
    """A block's attention or MLP: the modules that add to the residual stream, if it has any, and whether they are
    dropped."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self.dropped = False
        self.held = ""               # why it may not be dropped

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules for parameter in module.parameters()]

    @property
    def size(self) -> int:
        """Weights in all."""
        return sum(parameter.numel() for parameter in self.parameters)

    def drop(self, dropped: bool) -> None:
        """Make the modules return zeros (same as a zeroed output projection, bias included), or restore them."""
        if dropped == self.dropped:
            return
        for module in self.modules:
            if dropped:
                module.forward = _zeros_forward(module)
            else:
                del module.forward
        self.dropped = dropped


def _zeros_forward(module: nn.Module):
    def forward(*args, **kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None:            # positions and masks are sized by what layers have cached: one number a token
            for method, layer_idx, options in module.cached:
                placeholders = [hidden_states.new_zeros(shape) for shape in CACHED[method](*hidden_states.shape[:2])]
                getattr(cache, method)(*placeholders, layer_idx, **options)
        width = module.out_features if isinstance(module, nn.Linear) else hidden_states.shape[-1]
        return _as_output(module, hidden_states.new_zeros(*hidden_states.shape[:-1], width))
    return forward


def _as_output(module: nn.Module, hidden_states: torch.Tensor):
    """`hidden_states` in the form in which the module itself returns them: a tensor, or a tuple with more behind."""
    return hidden_states if module.extra_outputs is None else (hidden_states, *[None] * module.extra_outputs)


@dataclass
class Block:
    index: int
    name: str                                # "model.layers.0"
    module: nn.Module
    attn: SubBlock
    mlp: SubBlock
    layers: dict[str, Layer] = field(default_factory=dict)       # full name -> layer, in module order

    @property
    def dropped(self) -> tuple[bool, bool]:
        return self.attn.dropped, self.mlp.dropped

    def drop(self, attn: bool, mlp: bool) -> None:
        self.attn.drop(attn)
        self.mlp.drop(mlp)


@dataclass
class BlockInputs:
    """What the model passes to its blocks for one microbatch, recorded in one pass over everything but the blocks."""
    hidden_states: torch.Tensor              # [batch, tokens, hidden]: the embedding's output
    calls: list[tuple[tuple, dict]]          # a block: its other positional arguments, its keywords

    @property
    def notes(self) -> dict[tuple, object]:
        """What blocks have left in mappings they are given, for later ones, as keys and values that these share: by the
        mapping's number, the key, and the place in the tuple that is there, None where it is none."""
        found = {}
        for number, mapping in enumerate(self._mappings()):
            for key, value in mapping.items():
                parts = enumerate(value) if isinstance(value, tuple) else [(None, value)]
                found |= {(number, key, place): part for place, part in parts}
        return found

    def leave(self, notes: Mapping[tuple, object]) -> None:
        """Have the next block find these instead."""
        mappings = self._mappings()
        for mapping in mappings:
            mapping.clear()
        for (number, key, place), part in notes.items():
            mappings[number][key] = part if place is None else (*mappings[number].get(key, ()), part)

    def _mappings(self) -> list[MutableMapping]:
        return [*{id(value): value for args, kwargs in self.calls for value in (*args, *kwargs.values())
                  if isinstance(value, MutableMapping)}.values()]


class Decoder:
    """A causal language model taken apart at its blocks, so that blocks can be run, skipped and swapped one by one."""

    def __init__(self, model: nn.Module, offload_to: torch.device | None = None, by_document: bool = False):
        """`offload_to`: see `offload_blocks`; `by_document`: attend to packed documents each by itself, if that works
        with this model. Raises ValueError where the model cannot be taken apart."""
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.body, layers = find_blocks(model)
        names = {module: name for name, module in model.named_modules()}
        self.blocks = [_take_apart(index, names[module], module) for index, module in enumerate(layers)]
        halves = [half for block in self.blocks for half in (block.attn, block.mlp)]
        if not all(half.modules for half in halves):
            for half in halves:
                half.held = "not all blocks have both an attention and an MLP"
        self._check_weights_are_own()
        self.states: list = [None] * len(self.blocks)   # the state a search has put each block in; None: as loaded
        self.packed_rows = 0             # rows of packed documents that may share a microbatch: 0, 1 or any number
        self.by_document = False         # then rows of any number of tokens cost no more than their documents
        self.identity_when_dropped = False
        self.streams = 0                 # that blocks take: [streams, batch, tokens, hidden], or without any streams
        self.streams_last = False        # or [batch, tokens, streams, hidden]
        self.shares_notes = False        # blocks read in their arguments what earlier ones have left there
        self.offloaded: OffloadedBlocks | None = None
        self.give_back = lambda: 0       # frees memory that can be done without; returns the bytes
        self._call = _call_module        # or that compiled
        self._unmasked: dict = {}        # arguments with which the head alone asks for no mask
        if offload_to:
            self.offload_blocks(offload_to)
        self._probe(by_document)

    def _check_weights_are_own(self) -> None:
        """Raises ValueError where two blocks share weights."""
        owners = {parameter: block.name for block in self.blocks for parameter in block.module.parameters()}
        for block in self.blocks:
            shared = next((owners[parameter] for parameter in block.module.parameters()
                           if owners[parameter] != block.name), None)
            if shared:
                raise ValueError(f"{type(self.model).__name__}: {block.name} and {shared} have weights in common; "
                                 f"expected every block to have its own")

    @property
    def layers(self) -> dict[str, Layer]:
        """Every linear layer of the blocks by its full name, in module order, experts' matrices among them."""
        return {name: layer for block in self.blocks for name, layer in block.layers.items()}

    @property
    def ends(self) -> dict[str, nn.Module]:
        """The input embedding and the head, by their full names; a head that shares the embedding's matrix is not
        named."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        ends = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
        return {name: module for end in ends for name, module in self.model.named_modules() if module is end}

    def check_dropped(self, states: Sequence[tuple[bool, bool]]) -> None:
        """Raises ValueError where (attention, MLP) dropped of every block has what is held."""
        for block, state in zip(self.blocks, states):
            for half, gone, name in zip((block.attn, block.mlp), state, ("attention", "MLP")):
                if gone and half.held:
                    raise ValueError(f"{type(self.model).__name__}: the {name} of {block.name} cannot be dropped, "
                                     f"since {half.held}; keep it")

    @torch.no_grad()
    def block_inputs(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> BlockInputs:
        """Embeddings of `input_ids` [batch, tokens] and what each block is given besides; runs no block.

        `position_ids` [batch, tokens] restart at every document packed into a row; None means one document a row. Both
        may be on the host: they are copied without waiting, which looking at them on a device is not.
        """
        calls: list[tuple[tuple, dict]] = []
        embedded: list[torch.Tensor] = []

        def recorder(module):
            def record(hidden_states, *args, **kwargs):
                embedded.append(hidden_states)
                calls.append((args, kwargs))
                return _as_output(module, hidden_states)
            return record

        positions = {} if position_ids is None else {
            "position_ids": position_ids.to(self.device, non_blocking=True)}
        if position_ids is not None and (self.by_document or self.config._attn_implementation == "flash_attention_2"):
            positions |= attention.bounds(position_ids.cpu(), self.device)
            if self.by_document:
                positions |= _no_mask(self.device)
            else:
                del positions["document_lengths"]
        with _forwards({block.module: recorder(block.module) for block in self.blocks}):
            # no attention mask and no cache: only then do restarting positions keep packed documents apart
            self.body(input_ids=input_ids.to(self.device, non_blocking=True), use_cache=False, **positions)
        if embedded[0].dim() == 4 and not self.streams:      # known from the probe on
            self.streams_last = embedded[0].shape[:2] == input_ids.shape
            self.streams = embedded[0].shape[2 if self.streams_last else 0]
        return BlockInputs(self.joined(embedded[0]), calls)

    def joined(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What a block returns, as it is kept: [batch, tokens, hidden], with streams beside each other."""
        if self.streams and not self.streams_last:
            hidden_states = hidden_states.permute(1, 2, 0, 3)
        return hidden_states.flatten(2)

    def parted(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The inverse of `joined`: what a block takes."""
        if self.streams:
            hidden_states = hidden_states.unflatten(2, (self.streams, -1))
        return hidden_states.permute(2, 0, 1, 3) if self.streams and not self.streams_last else hidden_states

    def move_surroundings(self, device: torch.device) -> None:
        """Move everything but the blocks: embeddings, norms, head."""
        inside = {module for block in self.blocks for module in block.module.modules()}
        for module in set(self.model.modules()) - inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)
        self._unmasked = {name: mask.to(device) for name, mask in self._unmasked.items()}
        self.device = device

    def offload_blocks(self, device: torch.device) -> None:
        """Keep the blocks in host memory, where the model is now, and two at most on `device`, where the rest goes."""
        self.move_surroundings(device)
        self.offloaded = OffloadedBlocks([block.module for block in self.blocks], device)

    def end_offloading(self) -> None:
        """Leave offloaded blocks in host memory: for who moves them himself, and keeps what he writes to them."""
        if self.offloaded:
            self.offloaded.restore()
            self.offloaded = None

    def compile_blocks(self) -> None:
        """Run blocks through torch.compile from now on: the same up to rounding. Raises ValueError naming the flag
        where that does not work."""
        # a block's code is compiled once for every way of dropping, packing and masking, not once a block
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
        self._call = torch.compile(_call_module, dynamic=True)
        try:
            self._last_hidden_states(torch.zeros(2, 16, dtype=torch.int64, device=self.device))
        except Exception as error:       # no compiler, a module that cannot be traced, ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise ValueError(f"--compile: torch.compile fails here ({reason}); "
                             f"install a C++ compiler, or leave the flag out") from error

    def bring(self, index: int) -> None:
        """Have a block on the device, where blocks are offloaded: before its weights are changed or used."""
        if self.offloaded:
            self.offloaded.bring(index)

    @torch.no_grad()
    def run_block(self, index: int, hidden_states: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        """Output [batch, tokens, hidden] of one block."""
        block = self.blocks[index]
        if self.identity_when_dropped and block.dropped == (True, True):
            return hidden_states
        self.bring(index)
        args, kwargs = inputs.calls[index]
        output = self._call(block.module, self.parted(hidden_states), *args, **kwargs)
        return self.joined(output if isinstance(output, torch.Tensor) else output[0])

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of the last block's output [batch, tokens, hidden].

        The model's own forward is run with its blocks passed through, so that final norms, projections, logit scales
        and soft caps are whatever the family has. Every token is a row of its own: no masks of tokens² are built, and
        no position is beyond those a family has learned.
        """
        rows = hidden_states.reshape(-1, 1, hidden_states.shape[-1])
        last = self.parted(rows)
        passed = {block.module: lambda *args, m=block.module, **kwargs: _as_output(m, last) for block in self.blocks}
        input_ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
        with _forwards(passed):
            logits = self.model(input_ids=input_ids, use_cache=False, **self._unmasked).logits
        return logits.view(*hidden_states.shape[:2], -1)

    @torch.no_grad()
    def _probe(self, by_document: bool) -> None:
        """Find out, on a dozen tokens, what differs between families: what modules return, whether documents can be
        packed into rows, whether a block without attention and MLP is the identity. Raises ValueError when running
        the blocks one by one does not give what the model gives, or that is not causal."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        tokens = torch.randint(vocabulary, (2, 16), generator=generator).to(self.device)
        first, second = tokens[:, :7], tokens[:, 7:]
        logits = self._look(second)
        self._watch(second)
        try:
            alone = self._last_hidden_states(second)
        except ValueError as error:                  # the model's own
            raise RuntimeError(str(error)) from error
        if not torch.allclose(self.logits(alone), logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max()),
                              equal_nan=True):
            raise ValueError(f"{type(self.model).__name__}: running its {len(self.blocks)} blocks one by one does not "
                             f"give the model's own logits; expected hidden states to be all that passes between "
                             f"blocks")

        prefix = _distances(self.logits(self._last_hidden_states(second[:, :4])), logits[:, :4])
        if prefix.median() > 0.1 * _distances(logits, torch.zeros_like(logits)).median():
            raise ValueError(f"{type(self.model).__name__}: what it predicts changes with the tokens after that; "
                             f"expected a causal language model")

        self._ask_for_no_mask(alone)
        self._try_packing(tokens, alone, by_document)
        self._try_without_halves(first)

    def _look(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's own logits, of one or two forwards in which it is seen what modules return and which of them mix
        residual streams, and which parameters are experts. Raises ValueError where there are none."""
        connections = set()              # which mix residual streams, and add nothing to them

        def count_outputs(module, args, output):
            module.extra_outputs = len(output) - 1 if isinstance(output, tuple) else None
            if isinstance(output, tuple) and args and args[0].numel() != output[0].numel():
                connections.add(module)

        watched = [module for block in self.blocks
                   for module in (block.module, *block.attn.modules, *block.mlp.modules)]
        hooks = [module.register_forward_hook(count_outputs) for module in watched]
        hooks += [block.module.register_forward_pre_hook(lambda *_, index=block.index: self.bring(index))
                  for block in self.blocks]
        with self._each_block_once():
            logits = self.model(input_ids=tokens, use_cache=False).logits
        with orientations(self.model, [block.module for block in self.blocks]) as experts:
            if any(weights.dim() == 3 for block in self.blocks for weights in block.module.parameters()):
                self.model(input_ids=tokens, use_cache=False)    # in plain products, which round otherwise
        for hook in hooks:
            hook.remove()
        for block in self.blocks:
            block.mlp.modules = [module for module in block.mlp.modules
                                 if module not in connections] or block.mlp.modules
        if experts:
            self._add_experts(experts)
        if logits.isnan().any():
            if self.offloaded:
                self.offloaded.restore()
            broken = next((name for name, weights in self.model.named_parameters() if not weights.isfinite().all()),
                          None)
            raise ValueError(f"{broken}: NaN or infinite weights; check the checkpoint, or use another --dtype"
                             if broken else
                             f"{type(self.model).__name__}: gives NaN in {self.dtype}; use --dtype bfloat16 or "
                             f"float32")
        return logits

    def _try_packing(self, tokens: torch.Tensor, alone: torch.Tensor, by_document: bool) -> None:
        """Find out whether the second documents in two rows, `tokens` [2, 16] from the eighth on, keep apart from the
        first; `alone`: the blocks' output for them by themselves."""
        restarting = torch.cat([torch.arange(7), torch.arange(9)]).expand(2, 16)
        try:
            expected = self.logits(alone)
            leak = _distances(self.logits(self._last_hidden_states(tokens)[:, 7:]), expected).median()
            size = _distances(expected, torch.zeros_like(expected)).median()
            exact = 0.1 * torch.maximum(leak, 100 * torch.finfo(self.dtype).eps * size)

            def packs(rows: int) -> bool:
                packed = self.logits(self._last_hidden_states(tokens[:rows], restarting[:rows])[:, 7:])
                return bool(_distances(packed, expected[:rows]).max() < exact)

            self.packed_rows = 1_000_000 if packs(2) else 1 if packs(1) else 0
            if "chunked_attention" in self._layer_types:     # cut by the place in a row, which is more than 16 tokens
                self.packed_rows = 0
            if by_document:
                self._attend_by_document(packs)
        except TypeError:  # the family takes no position ids: documents of equal length are batched instead
            pass

    def _try_without_halves(self, tokens: torch.Tensor) -> None:
        """Find out whether a block whose attention and MLP are dropped is the identity."""
        inputs = self.block_inputs(tokens)
        blocks = self.blocks if len({type(block.module) for block in self.blocks}) > 1 else self.blocks[:1]
        unchanged = []
        for block in blocks:
            block.drop(True, True)
            unchanged.append(torch.equal(self.run_block(block.index, inputs.hidden_states, inputs),
                                         inputs.hidden_states))
            block.drop(False, False)
        self.identity_when_dropped = all(unchanged)

    def _add_experts(self, transposed: dict[nn.Parameter, bool]) -> None:
        """Take the matrices of experts for layers; transposed: see `orientations`."""
        merged = merged_names(self.model)
        for block in self.blocks:
            linear, block.layers = block.layers, {}
            for name, module in block.module.named_modules(prefix=block.name):
                block.layers |= ({name: module} if name in linear else
                                 expert_layers(name, module, transposed, merged))

    @contextmanager
    def _each_block_once(self):
        """Raises ValueError where the model does not run its blocks one after the other."""
        order: list[int] = []
        hooks = [block.module.register_forward_pre_hook(lambda *_, index=block.index: order.append(index))
                 for block in self.blocks]
        yield
        for hook in hooks:
            hook.remove()
        if order != list(range(len(self.blocks))):
            odd = next((i for i in range(len(self.blocks)) if order.count(i) != 1), 0)
            raise ValueError(f"{type(self.model).__name__}: runs {self.blocks[odd].name} {order.count(odd)} times in a "
                             f"forward of {len(order)} block runs; expected each of its blocks once, in their order")

    def _watch(self, tokens: torch.Tensor) -> None:
        """Find out what the sub-blocks' modules put into a cache, and which of them leave in the arguments of blocks
        what later blocks read: those are held. What runs beside the attention, not after it, is not the MLP's."""
        owners = {module: half for block in self.blocks for half in (block.attn, block.mlp) for module in half.modules}
        at_work, ran = [], []            # modules: inside each other, one after the other
        writers: dict[tuple, nn.Module] = {}
        notes: dict[int, _Notes] = {}
        hooks = []
        for module in owners:
            module.cached = []
            hooks += [module.register_forward_pre_hook(lambda module, _: at_work.append(module) or ran.append(module)),
                      module.register_forward_hook(lambda *_: at_work.pop() and None)]

        def noting(value):
            return notes.setdefault(id(value), _Notes(value, writers, at_work)) if isinstance(value, MutableMapping) \
                else value

        def note(block: Block):
            def enter(module, args, kwargs):
                self.bring(block.index)
                return tuple(map(noting, args)), {key: noting(value) for key, value in kwargs.items()}
            return block.module.register_forward_pre_hook(enter, with_kwargs=True)

        hooks += [note(block) for block in self.blocks]
        try:
            with _recorded(at_work):
                self.model(input_ids=tokens, use_cache=True)
        except Exception as error:       # a cache of its own kind: what is left is running without one
            if isinstance(error, torch.OutOfMemoryError):
                raise
            at_work.clear(), ran.clear()
            self.model(input_ids=tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        for block in self.blocks:
            if not (block.attn.modules and block.mlp.modules):
                continue
            after = ran[min(map(ran.index, block.attn.modules)):] if {*block.attn.modules} <= {*ran} else []
            block.mlp.modules = [module for module in block.mlp.modules if module in after] or block.mlp.modules
            late = [module for module in block.attn.modules if module in
                    after[min(map(after.index, block.mlp.modules)):]] if {*block.mlp.modules} <= {*after} else []
            if len(late) < len(block.attn.modules):          # a convolution with a cache, behind the MLP
                block.attn.modules = [module for module in block.attn.modules if module not in late]
                block.mlp.modules += late
        read = {key for mapping in notes.values() for key in mapping.read}
        self.shares_notes = bool(read)
        for key in read:
            owners[writers[key]].held = "later blocks read its keys and values"

    def _ask_for_no_mask(self, hidden_states: torch.Tensor) -> None:
        """Have `logits` ask for no mask, where the family allows that: to find out whether it needs one, transformers
        reads positions back from the device every time."""
        expected, self._unmasked = self.logits(hidden_states), _no_mask(self.device)
        try:
            same = torch.equal(self.logits(hidden_states), expected)
        except (TypeError, ValueError, RuntimeError, IndexError):        # a mask of another shape is looked for
            same = False
        if not same:
            self._unmasked = {}

    @property
    def _layer_types(self) -> set[str]:
        return {*(getattr(self.config.get_text_config(decoder=True), "layer_types", None) or ())}

    def _attend_by_document(self, packs: Callable[[int], bool]) -> None:
        """Attend by document from now on where that gives what documents alone give, as packs(rows) finds."""
        if self.config._attn_implementation != "sdpa" or self._layer_types - {"full_attention"}:
            return
        attention.enable()
        self.by_document = True
        try:
            self.by_document = packs(2)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError):        # arguments, an attention or heads of a kind of their own
            self.by_document = False

    def _last_hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        inputs = self.block_inputs(input_ids, position_ids)
        hidden_states = inputs.hidden_states
        for index in range(len(self.blocks)):
            hidden_states = self.run_block(index, hidden_states, inputs)
        return hidden_states


class _Notes(UserDict):
    """An argument that blocks share, and which modules' entries are read by others."""

    def __init__(self, content: Mapping, writers: dict, at_work: list[nn.Module]):
        self.read: set[tuple] = set()
        self._writers, self._at_work = writers, at_work
        super().__init__(content)

    def __setitem__(self, key, value):
        if self._at_work:
            self._writers[id(self), key] = self._at_work[-1]
        super().__setitem__(key, value)

    def __getitem__(self, key):
        if self._writers.get((id(self), key)) not in (None, *self._at_work):
            self.read.add((id(self), key))
        return super().__getitem__(key)


@contextmanager
def _recorded(at_work: list[nn.Module]):
    """Have the module at work note in `cached` what it puts into a cache: (method, layer, options)."""
    def recording(method: str, original):
        def record(cache, *args, **kwargs):
            bound = inspect.signature(original).bind(cache, *args, **kwargs).arguments
            if at_work:
                options = {"state_idx": bound["state_idx"]} if "state_idx" in bound else {}
                at_work[-1].cached.append((method, bound["layer_idx"], options))
            return original(cache, *args, **kwargs)
        return record

    originals = {method: getattr(Cache, method) for method in CACHED}
    for method, original in originals.items():
        setattr(Cache, method, recording(method, original))
    try:
        yield
    finally:
        for method, original in originals.items():
            setattr(Cache, method, original)


def _distances(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of every token's logits, root mean square over the vocabulary [batch, tokens]: what a hidden state's largest
    channels are, and a first token's, does not matter."""
    return (logits.float() - others.float()).square().mean(-1).sqrt()


def _no_mask(device: torch.device) -> dict:
    """What is taken for a mask made already, which transformers passes on as it is; here nobody reads it."""
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}


def _call_module(module: nn.Module, *args, **kwargs):
    return module(*args, **kwargs)


@contextmanager
def _forwards(replacements: dict[nn.Module, object]):
    """Replace modules' forwards for the duration of the context."""
    for module, forward in replacements.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replacements:
            del module.forward


def find_blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """(the module that runs the blocks, the blocks)."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(body, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers):
        return body, layers
    lists = [(parent, child) for parent in model.modules() for child in parent.children()
             if isinstance(child, nn.ModuleList) and len({type(item) for item in child}) == 1]
    if not lists:
        raise ValueError(f"{type(model).__name__}: no decoder blocks found; expected get_decoder().layers, or a "
                         f"ModuleList of modules of one class")
    return max(lists, key=lambda pair: len(pair[1]))


def _take_apart(index: int, name: str, module: nn.Module) -> Block:
    """A block's attention, MLP and linear layers. Raises ValueError naming the module when they are not recognised."""
    with_matrices = {child_name: child for child_name, child in module.named_children()
                     if any(parameter.dim() >= 2 for parameter in child.parameters())}
    arguments = {child_name: set(inspect.signature(child.forward).parameters)
                 for child_name, child in with_matrices.items()}
    attention = [child_name for child_name in with_matrices if arguments[child_name] & ATTENTION_ARGUMENTS]
    mlp = [child for child_name, child in with_matrices.items() if child_name not in attention]
    where = f"{name} ({type(module).__name__})"
    if len(with_matrices) != 1 and not (attention and mlp):
        raise ValueError(f"{where}: expected a child that takes an attention mask, rotary embeddings or a cache (the "
                         f"attention) and at least one other with weight matrices (the MLP), or one of them; found "
                         f"{', '.join(with_matrices) or 'no children with weight matrices'}")
    inside = [child_name for child_name in with_matrices if "residual" in arguments[child_name]]
    if inside:
        raise ValueError(f"{where}: {', '.join(inside)} adds the residual itself, so it cannot be dropped; expected "
                         f"the block to add it")
    layers = {f"{name}.{layer_name}": layer for layer_name, layer in module.named_modules()
              if isinstance(layer, nn.Linear)}
    return Block(index, name, module, SubBlock([with_matrices[child] for child in attention]),
                 SubBlock(mlp), layers)
