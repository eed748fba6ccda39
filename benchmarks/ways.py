"""Ways of measuring the candidates of one generation: the plain one, here, and here without one ingredient.

The plain way: every candidate's own forward on documents batched by equal length, the uncompressed model's logits
stored, every changed layer read from its file of dense weights (which the operating system keeps in memory).
"""
import random
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

import evo_drop
import evo_quant
import evo_unstructured
from benchmarks.subjects import DenseFiles, build_database
from database.levels import LevelSwitcher
from utils import fitness as walk
from utils import losses
from utils.data import draw_minibatch
from utils.decoder import Decoder
from utils.fitness import Fitness
from utils.losses import Teacher, teacher_distribution
from utils.measurements import Measurements
from utils.units import build_units

SEARCHES = {"evo_drop": (evo_drop, "--sparsity 0.25"),
            "evo_unstructured": (evo_unstructured, "--sparse_weights_path -"),
            "evo_quant": (evo_quant, "--quant_weights_path - --target_bitwidth 2.5")}
EARLIER = 4                      # generations that the parent of `parent_looked_up` has survived


# ---- one generation ------------------------------------------------------------------------------------------------


@dataclass
class Generation:
    """One generation of a search, played once: the steps that every way then measures again."""
    fitness: Fitness
    files: DenseFiles | None = None
    switcher: LevelSwitcher | None = None
    steps: list[tuple[list, list]] = field(default_factory=list)       # (candidates as block states, minibatch)
    logits: list[torch.Tensor] = field(default_factory=list)           # the uncompressed model's, for every document
    seen: list = field(default_factory=list)                           # what the parent was measured at before

    @property
    def decoder(self) -> Decoder:
        return self.fitness.decoder

    def forget_loaded(self) -> None:
        """After another way has put layers at levels of its own."""
        self.decoder.states = [None] * len(self.decoder.blocks)
        for levels in filter(None, (self.switcher, self.files)):
            levels.loaded.clear()


def play(name: str, decoder: Decoder, documents: list[torch.Tensor], divide: int, folder: Path, one_block: bool
         ) -> Generation:
    """Draw offspring of a random parent and select among them as the script does, on tokens divided by `divide`."""
    script, budget = SEARCHES[name]
    args = script.parse_arguments(["--model_name_or_path", "-", *budget.split()])
    rng = random.Random(0)
    if name == "evo_drop":
        space = script.build_space(args, [(block.attn.size, block.mlp.size) for block in decoder.blocks])
        parent = script.random_candidate(space, rng)
        generation = Generation(Fitness(decoder, documents, lambda i, state: decoder.blocks[i].drop(*state)))
    else:
        database = build_database(decoder, "gptq" if name == "evo_quant" else "sparsegpt", folder / "packed", one_block)
        switcher = LevelSwitcher(decoder, database, args.level_cache_gb)
        units = build_units(switcher.names, {layer: database.levels(layer) for layer in database.layers}, args)
        if name == "evo_quant":
            space = script.build_space(args, database, units)
            parent = script.random_candidate(space, args.target_bitwidth, rng)
        else:
            space = script.Space(units)
            parent = script.start_candidate(space, rng)
        generation = Generation(Fitness(decoder, documents, switcher.set_block),
                                DenseFiles(decoder, database, folder / "dense"), switcher)
    generation.logits = stored_logits(decoder, documents, generation.fitness.microbatch_tokens)

    def states(candidate):
        return (space.states(candidate, len(decoder.blocks)) if name == "evo_drop"
                else switcher.states(space.levels(candidate)))

    def draw(num_tokens: int) -> list[tuple[int, int]]:
        return draw_minibatch(documents, max(2, num_tokens // divide), rng)

    def measure(candidates: list, num_tokens: int) -> list[tuple[float, tuple]]:
        minibatch = draw(num_tokens)
        generation.steps.append(([states(candidate) for candidate in candidates], minibatch))
        values = generation.fitness.measure(*generation.steps[-1])
        return sorted(((value, candidate) for (value,), candidate in zip(values, candidates)), key=lambda pair: pair[0])

    offspring = script.draw_distinct(lambda: script.mutate(space, [parent], args.max_mutations, rng), args.offspring,
                                     {parent})
    script.select(offspring, [parent], list(zip(args.survivors_per_selection, args.tokens_per_selection)), measure)
    measurements = Measurements(generation.fitness, tuple, "kl")
    for _ in range(EARLIER):
        measurements.measure([states(parent)], draw(args.tokens_per_selection[-1]))
    generation.seen = measurements.state
    return generation


# ---- the plain way ---------------------------------------------------------------------------------------------------


def equal_lengths(minibatch: list[tuple[int, int]], max_tokens: int) -> list[list[tuple[int, int]]]:
    """(document, length) pairs in batches of one length and at most `max_tokens` tokens, or one document."""
    return [[pair for row in rows for pair in row] for rows in walk.microbatches(minibatch, max_tokens, packed_rows=0)]


@torch.no_grad()
def stored_logits(decoder: Decoder, documents: list[torch.Tensor], max_tokens: int) -> list[torch.Tensor]:
    """Logits of every document [length, vocabulary], on the host, in the model's dtype."""
    logits: list = [None] * len(documents)
    for batch in equal_lengths([(i, len(document)) for i, document in enumerate(documents)], max_tokens):
        input_ids = torch.stack([documents[i] for i, _ in batch]).to(decoder.device)
        for (i, _), values in zip(batch, decoder.model(input_ids=input_ids, use_cache=False).logits.cpu()):
            logits[i] = values.clone()
    return logits


@torch.no_grad()
def plain(generation: Generation) -> list[list[float]]:
    decoder, documents = generation.decoder, generation.fitness.documents
    set_block = generation.files.set_block if generation.files else generation.fitness.set_block
    values = []
    for candidates, minibatch in generation.steps:
        values.append([])
        batches = equal_lengths(minibatch, generation.fitness.microbatch_tokens)
        for candidate in candidates:
            for index, state in enumerate(candidate):
                set_block(index, state)
            total = torch.zeros((), dtype=torch.float64, device=decoder.device)
            for batch in batches:
                input_ids = torch.stack([documents[i][:length] for i, length in batch]).to(decoder.device)
                log_q = decoder.model(input_ids=input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                teacher = torch.stack([generation.logits[i][:length - 1] for i, length in batch]).to(decoder.device)
                log_p = teacher.float().log_softmax(-1)
                total += F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum()
            values[-1].append(float(total) / sum(length - 1 for _, length in minibatch))
    return values


# ---- here, and here without one ingredient ---------------------------------------------------------------------------


def here(generation: Generation) -> list[list[float]]:
    return [[value for value, in generation.fitness.measure(*step)] for step in generation.steps]


def parent_looked_up(generation: Generation) -> list[list[float]]:
    """As `here`, of a parent that has been one for `EARLIER` generations: as searches do it, without --no_reuse."""
    measurements = Measurements(generation.fitness, tuple, "kl")
    measurements.restore(generation.seen)
    return [measurements.measure(*step)[0] for step in generation.steps]


def compiled(generation: Generation) -> object:
    """A patch that has blocks run by torch.compile, as with --compile."""
    decoder = generation.decoder
    uncompiled = decoder._call
    decoder.compile_blocks()
    call, decoder._call = decoder._call, uncompiled
    return patch.object(decoder, "_call", call)


class ForEveryCandidate:
    """The teacher's distributions of a microbatch, computed again whenever one is asked for."""

    def __init__(self, fitness: Fitness, rows: list, kinds: tuple[str, ...]):
        self.kinds = kinds
        hidden_states = torch.cat([fitness.teacher[i][:length - 1] for row in rows for i, length in row])
        self.fitness, self.chunks = fitness, hidden_states.split(fitness._chunk_tokens())

    def __getitem__(self, chunk: int) -> torch.Tensor:
        hidden_states = self.chunks[chunk].to(self.fitness.decoder.device)
        return teacher_distribution(self.fitness._logits(hidden_states), self.kinds)


def without(generation: Generation) -> dict[str, object]:
    """What is switched off -> a patch that switches it off."""
    def from_logits(fitness: Fitness, rows: list, kinds: tuple[str, ...]) -> list[Teacher]:
        logits = torch.cat([generation.logits[i][:length - 1] for row in rows for i, length in row])
        return [teacher_distribution(chunk.to(fitness.decoder.device), kinds)
                for chunk in logits.split(fitness._chunk_tokens())]

    patches = {"prefixes shared": patch.object(walk, "_first_difference", lambda a, b: 0),
               "teacher shared": patch.object(Fitness, "_teacher_distributions",
                                                lambda *arguments: ForEveryCandidate(*arguments)),
               "hidden states stored": patch.object(Fitness, "_teacher_distributions", from_logits),
               "head in chunks": patch.object(Fitness, "_chunk_tokens", lambda fitness: 2**40),
               "documents packed": patch.object(generation.decoder, "packed_rows", 0)}
    if generation.decoder.by_document:
        patches["attention by document"] = patch.object(generation.decoder, "by_document", False)
    if losses.fused(generation.decoder.device, generation.decoder.dtype):
        patches["divergence in one kernel"] = patch.object(losses, "fused", lambda *_: False)
    if generation.files:
        patches["levels packed"] = patch.object(generation.fitness, "set_block", generation.files.set_block)
    return patches
