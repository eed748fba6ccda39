"""Fitness of many candidates on the same tokens, in one walk over the blocks.

All candidates of a selection step see the same minibatch, and most share a prefix of blocks with another. Sorted by
their blocks' states and walked with a stack of block inputs, each candidate starts at the first block in which it
differs from the one before it: every distinct prefix is run once, which is exact and spares a third of the work even
for candidates that differ in two random blocks. The uncompressed model (the teacher) is kept as its last block's
output, hidden_size numbers a token, and its full-vocabulary distribution is computed once for all candidates.
"""
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.nn.functional import cosine_similarity

from utils import distributed
from utils.decoder import BlockInputs, Decoder
from utils.errors import RunError
from utils.interactions import Sketch
from utils.losses import Teacher, fused, log_probabilities, plain_kl, teacher_distribution, token_losses

# a state for every block, whatever `set_block` understands; behind them a tuple of embedding's and head's levels, if
# those have any, all None as they were
Candidate = Sequence[Hashable]
Row = list[tuple[int, int]]              # documents packed into one row: (index, length)
T = TypeVar("T")


class Fitness:
    """The teacher's hidden states on a set of documents, and the walk that measures candidates against it."""

    def __init__(self, decoder: Decoder, documents: list[torch.Tensor], set_block: Callable[[int, Hashable], None],
                 teacher: bool = True, kl_topk: int = 10, microbatch_tokens: int | None = None, progress: str = "",
                 sizes: Sequence[int] | None = None):
        """`documents`: int64 [length] each. `set_block(i, state)` puts block i into a candidate's state.

        With `teacher`, the model as it is now (uncompressed) is run over all documents; kl and sparse_kl need it.
        `sizes`, of a run that is resumed: its `sizes` instead of `microbatch_tokens`. Raises RunError where the model
        gives NaN, or a single row does not fit into memory.
        """
        self.decoder = decoder
        self.documents = documents
        self.set_block = set_block
        self.kl_topk = kl_topk
        self.microbatch_tokens = sizes[0] if sizes else microbatch_tokens or default_microbatch_tokens(decoder)
        self.blocks_run = 0
        self.teacher: list[torch.Tensor] = []                        # a document's last block output [length, hidden]
        self.influence: list[float] = []         # of every block, 1 - cos(input, output), mean over all tokens
        self._distances = torch.zeros(len(documents), len(decoder.blocks), dtype=torch.float64)      # sums over tokens
        if teacher:
            whole = [(i, len(document)) for i, document in enumerate(documents)]
            storage = self._teacher_storage()
            owners = self._within_memory(whole, lambda batches: self._run_teacher(batches, storage, progress))
            for i, owner in owners.items():                          # any process may come to need any document
                self.teacher[i] = distributed.broadcast(self.teacher[i], owner, storage)
            self.influence = (distributed.merge_(self._distances).sum(0) / sum(map(len, documents))).tolist()
        self._teacher_tokens = self.microbatch_tokens
        if sizes:
            self.microbatch_tokens = min(sizes[1], self.microbatch_tokens)

    @property
    def sizes(self) -> list[int]:
        """Tokens of a microbatch of the teacher, and of a walk: what memory had room for. With the same sizes, the
        same values to the bit."""
        return [self._teacher_tokens, self.microbatch_tokens]

    @torch.no_grad()
    def measure(self, candidates: Sequence[Candidate], minibatch: Row | None = None,
                kinds: Sequence[str] = ("kl",)) -> list[tuple[float, ...]]:
        """For each candidate its value of each kind, averaged over the predicted tokens of `minibatch`.

        minibatch: (document, length) pairs, by default all documents at full length. Kinds: "kl", the divergence
        KL(teacher ‖ candidate) in nats over the full vocabulary; "sparse_kl", the same over the teacher's `kl_topk`
        largest logits, both renormalised; "ppl", exp of the mean next-token loss. A value that is not finite is +inf.

        Several processes share the work and get the same values, which do not depend on their number.
        """
        if minibatch is None:
            minibatch = [(i, len(document)) for i, document in enumerate(self.documents)]
        sums = self.sums(candidates, minibatch, kinds).permute(1, 2, 0).tolist()
        return [tuple(mean_of(documents, minibatch, kind) for documents, kind in zip(row, kinds)) for row in sums]

    @torch.no_grad()
    def sums(self, candidates: Sequence[Candidate], minibatch: Row, kinds: Sequence[str] = ("kl",)) -> torch.Tensor:
        """Sums over the predicted tokens of each document of `minibatch`, float64 [documents, candidates, kinds] on the
        host; of "ppl", those of the loss. `measure` says what the kinds are."""
        found = self._within_memory(minibatch, lambda batches: self._own_sums(candidates, batches, kinds))
        place = {index: i for i, index in enumerate(found)}
        merged = distributed.merge_(torch.stack(list(found.values())))
        return merged[[place[index] for index, _ in minibatch]]

    @torch.no_grad()
    def changes(self, candidates: Sequence[Candidate], minibatch: Row, around: Candidate, samples: int = 64
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """(`sums` of "kl" of the candidates, [documents, candidates]; what each changes of the logits of `around`, as
        `Sketch` has it, float32 [predicted tokens, candidates, samples] on the host).

        `around` is run beside them in every process that has some of the candidates.
        """
        found = self._within_memory(minibatch, lambda batches: self._own_changes(candidates, batches, around, samples))
        place = {index: i for i, index in enumerate(found)}
        sums = distributed.merge_(torch.stack([sums for sums, _ in found.values()]))
        changes = distributed.merge_(torch.cat([changes for _, changes in found.values()]))
        return sums[[place[index] for index, _ in minibatch]], changes

    def _within_memory(self, minibatch: Row, compute: Callable[[list[list[Row]]], T]) -> T:
        """compute(microbatches), and where memory does not suffice the same again, once without the levels cached so
        far, then with half as many tokens in each microbatch from then on. Raises RunError where each is a single row
        already."""
        given_back = False
        while True:
            batches = microbatches(minibatch, self.microbatch_tokens, self.decoder.packed_rows,
                                   self.decoder.by_document)
            failure = result = None
            try:
                result = compute(batches)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                failure = (str(error) or type(error).__name__).splitlines()[0]
            failure = next(filter(None, distributed.gather(failure)), None)   # too little for one is too little for all
            if failure is None:
                return result
            if not given_back:
                given_back, freed = True, sum(distributed.gather(self.decoder.give_back()))
                if freed:
                    self._empty_cache()
                    print(f"out of memory: {freed / 1e9:.1f} GB of cached levels given back, from now on half as many "
                          f"are kept", flush=True)
                    continue
            longest = max(sum(length for _, length in row) for rows in batches for row in rows)
            if all(len(rows) == 1 for rows in batches) and longest <= max(length for _, length in minibatch):
                raise RunError(f"out of memory with a single row of {longest} tokens ({failure}); lower "
                               f"--calibration_sequence_length, --eval_sequence_length or --level_cache_gb, or use "
                               f"another --dtype")
            self._empty_cache()
            self.microbatch_tokens //= 2
            print(f"out of memory: from now on at most {self.microbatch_tokens} tokens at once instead of "
                  f"{2 * self.microbatch_tokens}", flush=True)

    def _empty_cache(self) -> None:
        """Of torch's allocator; outside of an except, where the walk's tensors are gone."""
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def teacher_perplexity(self) -> float:
        """Perplexity of the uncompressed model on all documents, from its hidden states: runs no block."""
        losses = torch.zeros(len(self.documents), dtype=torch.float64)
        for i, owner in enumerate(distributed.shares([len(document) for document in self.documents])):
            if owner == distributed.rank():
                hidden_states, targets = (states.to(self.decoder.device)
                                          for states in (self.teacher[i][:-1], self.documents[i][1:]))
                losses[i] = self._losses(hidden_states, None, targets, ("ppl",)).sum()
        total = sum(distributed.merge_(losses).tolist())
        return _exp(total / sum(len(document) - 1 for document in self.documents))

    @torch.no_grad()
    def divergence_of(self, other: "Fitness") -> float:
        """KL divergence, in nats a token, of another model, of as large a vocabulary, from this one on all documents,
        which are the same: from the hidden states of both as they were when these were created."""
        sums, device = torch.zeros(len(self.documents), dtype=torch.float64), self.decoder.device
        for i, owner in enumerate(distributed.shares([len(document) for document in self.documents])):
            if owner == distributed.rank():
                parts = (fitness.teacher[i][:-1].split(self._chunk_tokens()) for fitness in (self, other))
                for own, others in zip(*parts):
                    log_p = log_probabilities(self._logits(own.to(device)))
                    log_q = log_probabilities(other._logits(others.to(other.decoder.device))).to(device)
                    sums[i] += plain_kl(log_p, log_p.exp(), log_q).sum(dtype=torch.float64).cpu()
        return sum(distributed.merge_(sums).tolist()) / sum(len(document) - 1 for document in self.documents)

    def _own_sums(self, candidates: Sequence[Candidate], batches: list[list[Row]],
                  kinds: Sequence[str]) -> dict[int, torch.Tensor]:
        """Document -> sums over its predicted tokens, float64 [candidates, kinds] on the host; zeros where another
        process computes them."""
        walks = [(batch, members, self._walk([candidates[i] for i in members], batches[batch], kinds))
                 for batch, members in self._own_walks(candidates, batches)]
        sums = {index: torch.zeros(len(candidates), len(kinds), dtype=torch.float64)
                for rows in batches for row in rows for index, _ in row}
        for batch, members, walked in walks:
            documents = [index for row in batches[batch] for index, _ in row]
            for index, values in zip(documents, walked.cpu()):       # the step's first synchronisation
                sums[index][members] = values
        return sums

    def _own_changes(self, candidates: Sequence[Candidate], batches: list[list[Row]], around: Candidate, samples: int
                     ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Document -> (sums of "kl" over its predicted tokens, float64 [candidates]; changes, float32 [predicted
        tokens, candidates, samples]) on the host; zeros where another process computes them."""
        found = {index: (torch.zeros(len(candidates), dtype=torch.float64),
                         torch.zeros(length - 1, len(candidates), samples))
                 for rows in batches for row in rows for index, length in row}
        for batch, members in self._own_walks(candidates, batches):
            documents = [document for row in batches[batch] for document in row]
            changes = torch.zeros(sum(length - 1 for _, length in documents), len(members), samples)
            sums = self._walk([candidates[i] for i in members], batches[batch], ("kl",), around, changes)
            for (index, _), values, part in zip(documents, sums[..., 0].cpu(),
                                                changes.split([length - 1 for _, length in documents])):
                found[index][0][members], found[index][1][:, members] = values, part
        return found

    def _own_walks(self, candidates: Sequence[Candidate], batches: list[list[Row]]) -> list[tuple[int, list[int]]]:
        """(microbatch, candidates) of the walks that are this process's: a part of equal cost of all candidates on the
        first microbatch, in walking order, then all on the second, and so on."""
        order = walk_order(candidates, [None] * len(self.decoder.blocks))
        count = len(self.decoder.blocks)
        runs = [count] + [max(0, count - _first_difference(candidates[a], candidates[b]))
                          for a, b in zip(order, order[1:])]
        config = self.decoder.config.get_text_config(decoder=True)
        block = sum(parameter.numel() for parameter in self.decoder.blocks[0].module.parameters())
        head = config.vocab_size * config.hidden_size / block            # its cost in blocks
        line = [(batch, i) for batch in range(len(batches)) for i in order]
        owners = distributed.shares([sum(length for row in rows for _, length in row) * (run + head)
                                     for rows in batches for run in runs])
        walks: dict[int, list[int]] = {}
        for (batch, i), owner in zip(line, owners):
            if owner == distributed.rank():
                walks.setdefault(batch, []).append(i)
        return [(batch, sorted(members)) for batch, members in walks.items()]

    def _walk(self, candidates: Sequence[Candidate], rows: list[Row], kinds: Sequence[str],
              around: Candidate | None = None, changes: torch.Tensor | None = None) -> torch.Tensor:
        """Sums over each document's predicted tokens, float64 [documents, candidates, kinds]. `changes`, if given, is
        filled with what the candidates change of the logits of `around`, [predicted, candidates, samples]."""
        lengths = [length - 1 for row in rows for _, length in row]
        input_ids, position_ids, predicting = assemble(self.documents, rows)
        targets = input_ids.flatten()[predicting + 1].to(self.decoder.device, non_blocking=True)
        predicting = predicting.to(self.decoder.device, non_blocking=True)
        teacher = self._teacher_distributions(rows, kinds) if set(kinds) & {"kl", "sparse_kl"} else None
        sums = torch.zeros(len(lengths), len(candidates), len(kinds), dtype=torch.float64, device=self.decoder.device)

        def walk(candidates: Sequence[Candidate]) -> Iterator[tuple[int, torch.Tensor]]:
            walk = self._block_by_block if self.decoder.offloaded else self._candidate_by_candidate
            for members in self._by_ends(candidates):
                inputs = self.decoder.block_inputs(input_ids, position_ids)
                for place, hidden_states in walk([candidates[i] for i in members], inputs):
                    yield members[place], hidden_states.flatten(0, 1)[predicting]

        sketches: list[Sketch] | None = None
        if changes is not None:
            for _, before in walk([around]):
                sketches = [Sketch(self._logits(chunk), changes.shape[-1])
                            for chunk in before.split(self._chunk_tokens())]
        for current, hidden_states in walk(candidates):
            changed: list[torch.Tensor] = []
            losses = self._losses(hidden_states, teacher, targets, kinds, sketches, changed)
            if sketches:
                changes[:, current] = torch.cat(changed).cpu()
            sums[:, current] = torch.stack([document.sum(0) for document in losses.split(lengths)])
        return sums

    def _by_ends(self, candidates: Sequence[Candidate]) -> Iterator[list[int]]:
        """Indices of the candidates of the same embedding and head, which are the model's while one is looked at."""
        count = len(self.decoder.blocks)
        groups: dict[tuple, list[int]] = {}
        for i, candidate in enumerate(candidates):
            groups.setdefault(tuple(candidate[count:]), []).append(i)
        for ends, members in groups.items():
            for levels in ends:
                self.set_block(count, levels)
            try:
                yield members
            finally:                                 # the teacher has them as they were
                for levels in ends:
                    self.set_block(count, (None,) * len(levels))

    def _candidate_by_candidate(self, candidates: Sequence[Candidate], inputs: BlockInputs
                                ) -> Iterator[tuple[int, torch.Tensor]]:
        """(candidate, the last block's output) of each, in walking order; in memory is one input for every block."""
        count = len(self.decoder.blocks)
        stack = [inputs.hidden_states] + [None] * count              # stack[i]: input of block i
        before: int | None = None
        for current in walk_order(candidates, self.decoder.states):
            start = 0 if before is None else _first_difference(candidates[before], candidates[current])
            for i in range(start, count):
                stack[i + 1] = self._run_block(i, candidates[current][i], stack[i], inputs)
            yield current, stack[count]
            before = current

    def _block_by_block(self, candidates: Sequence[Candidate],
                        inputs: BlockInputs) -> Iterator[tuple[int, torch.Tensor]]:
        """The same where blocks are offloaded: each comes to the device once and is put into each of its states once,
        for all candidates; in memory is an input for every distinct prefix."""
        # input of the block, what the blocks before it have left for it, candidates that share it
        prefixes = [(inputs.hidden_states, inputs.notes, list(range(len(candidates))))]
        for i in range(len(self.decoder.blocks)):
            # state of the block -> prefix -> candidates
            longer: dict[Hashable, dict[int, list[int]]] = {}
            for prefix, (*_, members) in enumerate(prefixes):
                for member in members:
                    longer.setdefault(candidates[member][i], {}).setdefault(prefix, []).append(member)
            before, prefixes = prefixes, []
            for state, extended in longer.items():
                for prefix, members in extended.items():
                    hidden_states, notes, _ = before[prefix]
                    inputs.leave(notes)
                    output = self._run_block(i, state, hidden_states, inputs)
                    prefixes.append((output, inputs.notes, members))
        for hidden_states, _, members in prefixes:
            for member in members:
                yield member, hidden_states

    def _run_block(self, index: int, state: Hashable, hidden_states: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
        self.decoder.bring(index)
        if self.decoder.states[index] != state:
            self.decoder.states[index] = None                        # neither, should memory run out half-way
            self.set_block(index, state)
            self.decoder.states[index] = state
        self.blocks_run += 1
        return self.decoder.run_block(index, hidden_states, inputs)

    def _losses(self, hidden_states: torch.Tensor, teacher: list[Teacher] | None, targets: torch.Tensor,
                kinds: Sequence[str], sketches: list[Sketch] | None = None, changed: list[torch.Tensor] | None = None
                ) -> torch.Tensor:
        """Of each kind at each predicted token, float64 [predicted, kinds]; hidden_states [predicted, hidden]. With
        `sketches`, one a chunk of tokens, what they make of the logits is put into `changed`."""
        step = self._chunk_tokens()
        losses = []
        for chunk, start in enumerate(range(0, len(hidden_states), step)):
            logits = self._logits(hidden_states[start:start + step])
            losses.append(token_losses(logits, teacher[chunk] if teacher is not None else None,
                                       targets[start:start + step], kinds, self.kl_topk))
            if sketches:
                changed.append(sketches[chunk].change(logits))
        return torch.cat(losses)

    def _teacher_distributions(self, rows: list[Row], kinds: Sequence[str]) -> list[Teacher]:
        """What losses of these kinds are computed from, by chunk of the microbatch's predicted tokens."""
        hidden_states = torch.cat([self.teacher[i][:length - 1] for row in rows for i, length in row])
        return [teacher_distribution(self._logits(chunk.to(self.decoder.device, non_blocking=True)), kinds)
                for chunk in hidden_states.split(self._chunk_tokens())]

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder.logits(hidden_states[None])[0]

    def _chunk_tokens(self) -> int:
        """Tokens whose logits are in memory at once: 256 MB of float32 on a GPU, what a cache holds on a CPU."""
        budget = 2**28 if self.decoder.device.type != "cpu" else 2**22
        vocabulary = self.decoder.config.get_text_config(decoder=True).vocab_size
        return max(128, budget // (4 * vocabulary))

    def _teacher_storage(self) -> torch.device:
        """Where the teacher's hidden states are kept: on the device if an eighth of what is free there will do."""
        hidden_size = self.decoder.config.get_text_config(decoder=True).hidden_size
        needed = sum(map(len, self.documents)) * hidden_size * self.decoder.dtype.itemsize
        return storage_for(needed, self.decoder.device, 1 / 8)

    @torch.no_grad()
    def _run_teacher(self, batches: list[list[Row]], storage: torch.device, progress: str) -> dict[int, int]:
        """Run the model over this process's part of the documents. Returns the process of every document."""
        self.teacher = [None] * len(self.documents)
        began, shown, done = time.time(), time.time(), 0
        sizes = [sum(length for row in rows for _, length in row) for rows in batches]
        owners = distributed.shares(sizes)
        total = sum(size for size, owner in zip(sizes, owners) if owner == distributed.rank())
        for rows, owner in zip(batches, owners):
            if owner != distributed.rank():
                continue
            input_ids, position_ids, _ = assemble(self.documents, rows)
            inputs = self.decoder.block_inputs(input_ids, position_ids)
            hidden_states, distances = inputs.hidden_states, []
            for i in range(len(self.decoder.blocks)):
                before, hidden_states = hidden_states, self.decoder.run_block(i, hidden_states, inputs)
                distances.append(1 - cosine_similarity(before.float(), hidden_states.float(), dim=-1))
            for row, *both in zip(rows, hidden_states.to(storage), torch.stack(distances, dim=-1).cpu()):
                for (index, _), document, passed in zip(row, *(part.split([n for _, n in row]) for part in both)):
                    self.teacher[index] = document.clone()
                    self._distances[index] = passed.sum(0, dtype=torch.float64)
            done += input_ids.numel()
            if progress and time.time() - shown > 10:
                shown = time.time()
                print(f"{progress}: {done:,} of {total:,} tokens, {(shown - began) * (total - done) / done:.0f} s left",
                      flush=True)
        if not all(bool(states.isfinite().all()) for states in self.teacher if states is not None):
            raise RunError(f"the uncompressed model's hidden states are NaN or infinite in {self.decoder.dtype}; use "
                           f"--dtype bfloat16 or float32")
        return {index: owner for rows, owner in zip(batches, owners) for row in rows for index, _ in row}


def mean_of(sums: Sequence[float], minibatch: Row, kind: str) -> float:
    """The mean over the predicted tokens of `minibatch`, of whose documents `Fitness.sums` gave `sums`; "ppl" is exp of
    it. +inf where it is not finite."""
    mean = sum(sums) / sum(length - 1 for _, length in minibatch)
    value = _exp(mean) if kind == "ppl" else mean
    return value if math.isfinite(value) else math.inf


def microbatches(minibatch: Row, max_tokens: int, packed_rows: int, by_document: bool = False) -> list[list[Row]]:
    """Group documents, without padding, into microbatches of rows of equal length.

    Where documents can be packed (`packed_rows` > 0), rows are filled up to the longest document's length, or where
    each document attends by itself (`by_document`) up to `max_tokens`; such rows share a microbatch with at most
    `packed_rows` others. A microbatch has at most `max_tokens` tokens, or one row.
    """
    if not minibatch:
        return []
    rows: list[Row] = []
    open_rows: list[tuple[int, Row]] = []                            # (room left, row)
    capacity = max(max_tokens if by_document else 0, *(length for _, length in minibatch))
    for document in sorted(minibatch, key=lambda document: -document[1]):
        length = document[1]
        fitting = next((k for k, (room, _) in enumerate(open_rows) if room >= length), None) if packed_rows else None
        if fitting is None:
            rows.append([document])
            room, row = capacity - length, rows[-1]
        else:
            room, row = open_rows.pop(fitting)
            row.append(document)
            room -= length
        if room > 1:
            open_rows.append((room, row))

    groups: dict[tuple[int, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((sum(length for _, length in row), len(row) > 1), []).append(row)
    batches = []
    for (tokens, packed), members in sorted(groups.items(), reverse=True):
        size = max(1, max_tokens // tokens)
        size = min(size, packed_rows) if packed else size
        batches += [members[i:i + size] for i in range(0, len(members), size)]
    return batches


def assemble(documents: list[torch.Tensor], rows: list[Row]
             ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A microbatch's input_ids [rows, tokens], its position_ids (None where every row is one document), and the flat
    indices of the positions that predict a token of their own document."""
    input_ids = torch.stack([torch.cat([documents[i][:length] for i, length in row]) for row in rows])
    lengths = [length for row in rows for _, length in row]
    packed = len(lengths) > len(rows)
    position_ids = torch.cat([torch.arange(n) for n in lengths]).view_as(input_ids) if packed else None
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    predicting = torch.cat([torch.arange(start, start + n - 1) for start, n in zip(starts, lengths)])
    return input_ids, position_ids, predicting


def out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory, or a CPU's allocator, which has no exception of its own. On a device it may
    be torch's allocator, the driver, cuBLAS, cuDNN or Triton that says so."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def storage_for(num_bytes: int, device: torch.device, share: float) -> torch.device:
    """Where to keep so many bytes: on the device if this share of what is free there will do in every process, else in
    the host's memory."""
    fits = device.type == "cpu" or num_bytes < share * torch.cuda.mem_get_info(device)[0]
    return device if all(distributed.gather(fits)) else torch.device("cpu")


def default_microbatch_tokens(decoder: Decoder) -> int:
    """CPU: few enough for activations to stay cached. GPU: at most 8192, and what a sixteenth of the memory that the
    model leaves has room for, since packed levels come on top; what a block needs is measured on a few tokens."""
    device, config = decoder.device, decoder.config.get_text_config(decoder=True)
    if device.type == "cpu":
        return 2048
    trial = 256
    decoder.bring(0)
    room = (torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)) / 16
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs = decoder.block_inputs(torch.zeros(1, trial, dtype=torch.int64, device=device))
    decoder.run_block(0, inputs.hidden_states, inputs)
    a_token = ((torch.cuda.max_memory_allocated(device) - before) / trial
               + len(decoder.blocks) * config.hidden_size * decoder.dtype.itemsize      # the inputs of all blocks
               + config.vocab_size * (decoder.dtype.itemsize if fused(device, decoder.dtype) else 8))    # the teacher's
    return min(distributed.gather(min(8192, max(512, int(room / a_token) // 512 * 512))))   # processes agree


def walk_order(candidates: Sequence[Candidate], loaded: Sequence[Hashable]) -> list[int]:
    """Indices of the candidates in an order that keeps equal prefixes together, so that each is run once.

    Among the blocks that follow a prefix, the one whose state is already loaded comes first: fewer switches.
    """
    order: list[int] = []
    loaded = list(loaded)

    def visit(members: list[int], depth: int) -> None:
        if len(members) == 1 or depth == len(loaded):
            order.extend(members)
            loaded[depth:] = candidates[members[-1]][depth:]
            return
        groups: dict[Hashable, list[int]] = {}
        for member in members:
            groups.setdefault(candidates[member][depth], []).append(member)
        for state in sorted(groups, key=lambda state: state != loaded[depth]):
            loaded[depth] = state
            visit(groups[state], depth + 1)

    if candidates:
        visit(list(range(len(candidates))), 0)
    return order


def _first_difference(a: Candidate, b: Candidate) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf
