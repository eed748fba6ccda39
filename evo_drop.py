"""EvoPress, depth pruning: search which attention and MLP sub-blocks to drop (arXiv 2410.14649, Algorithm 1,
section 4.1).

    python evo_drop.py --model_name_or_path meta-llama/Meta-Llama-3-8B --sparsity 0.25

A candidate says of every sub-block whether it is dropped. An offspring swaps a few dropped ones for kept ones, so the
budget holds exactly. Offspring are selected in steps, on more tokens each time, by their KL divergence from the
uncompressed model. The result is layer_drop_config.txt: one of none/attn/mlp/attn+mlp a block.
"""
import argparse
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from formats.regroup import whole
from formats.towers import copy_processors, with_tower
from utils import distributed, flags
from utils.configs import drop_words, read_drop_config, write_drop_config
from utils.errors import RunError, user_errors
from utils.files import check_writable
from utils.interactions import descend, pairs_of
from utils.model import dtype_in, load_config, save_dropped
from utils.screening import AdditiveModel
from utils.search import Search

Candidate = tuple[bool, ...]     # of every unit: dropped?
LAZY_BATCH = 4                   # units that a measured start measures again at once
REFINE_TOKENS = 2                # to measure around a candidate on, in --initial_tokens: changes are smaller there
RECOMMENDED = ["--init", "measured", "--refine", "2", "--screen", "4"]
CONFIGURATION = "layer_drop_config.txt"
RESTARTS = 16                    # of the search by the model, which spends no tokens
FAILED_DRAWS = 200               # draws without a new candidate after which a generation makes do with fewer offspring


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_model_flags(parser, offload=True, compiled=True)
    flags.add_calibration_flags(parser, tokens=131072)
    budget = parser.add_argument_group("budget: --sparsity, or --drop_attn and --drop_mlp, or --drop_params")
    budget.add_argument("--sparsity", type=float, metavar="FRACTION",
                        help="drop this share, rounded down, of the attentions and of the MLPs, e.g. 0.25")
    budget.add_argument("--drop_attn", type=int, metavar="COUNT", help="drop this many attentions, 0 to all")
    budget.add_argument("--drop_mlp", type=int, metavar="COUNT", help="drop this many MLPs, 0 to all")
    budget.add_argument("--drop_params", type=float, metavar="FRACTION",
                        help="drop at least this share of the blocks' parameters, by less than the smallest sub-block "
                             "more; attentions and MLPs mix freely")
    budget.add_argument("--drop_entire_block", action="store_true", help="attention and MLP of a block only together")
    budget.add_argument("--drop_two_consecutive", action="store_true", help="blocks 0-1, 2-3, ... only together")
    budget.add_argument("--legal_to_drop_path", metavar="FILE",
                        help="a configuration: only what it drops may be dropped")
    search = flags.add_search_flags(
        parser, generations=None, offspring=32, survivors=[2, 1], tokens=[2048, 32768],
        init={"random": "the best of --initially_generated",
              "measured": "the least harmful dropped on --initial_tokens, measured again, and so on; or the "
                          "blocks of least influence (ShortGPT), if they are better"},
        initially_generated=64, initial_tokens=2048, fitness=["kl", "ppl"],
        generations_help="default: the paper's k(n-k)/1.5 for k of n blocks")
    search.add_argument("--refine", type=int, default=0, metavar="GENERATIONS",
                        help="in the first so many generations the offspring are what is best if the changes of each "
                             "unit and of every two add up, measured around the best parent on twice --initial_tokens; "
                             "from then on that has a say where the last step cannot tell (default: 0)")
    search.add_argument("--invert_fitness", action="store_true", help="search for the worst candidate instead")
    flags.add_evaluation_flags(parser)
    output = flags.add_output_flags(parser, "evo_drop")
    output.add_argument("--drop_config_dir", metavar="FOLDER", help="write layer_drop_config.txt there too")
    output.add_argument("--save_dir", metavar="FOLDER",
                        help="save the model there with the dropped sub-blocks zeroed, as any runtime loads it")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


# ---- the search space ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Sub-blocks that are dropped together."""
    kind: str                            # attn, mlp or attn+mlp
    parts: tuple[tuple[int, int], ...]   # (block, 0 for attention or 1 for MLP)
    size: int                            # parameters
    legal: bool                          # may be dropped


@dataclass(frozen=True)
class Space:
    """All candidates that meet the budget: a number of dropped units of each kind, or of dropped parameters."""
    units: tuple[Unit, ...]
    counts: dict[str, int] | None        # dropped units of each kind, exactly
    least_size: int = 0                  # else: dropped parameters at least, ...
    slack: int = 0                       # ... by less than this more

    def dropped_size(self, candidate: Candidate) -> int:
        return sum(unit.size for unit, dropped in zip(self.units, candidate) if dropped)

    def feasible(self, candidate: Candidate) -> bool:
        if self.counts is None:
            return self.least_size <= self.dropped_size(candidate) < self.least_size + self.slack
        return self.counts == {kind: sum(dropped for unit, dropped in zip(self.units, candidate) if unit.kind == kind)
                               for kind in self.counts}

    @property
    def levels(self) -> list[tuple[bool, ...]]:
        return [(False, True) if unit.legal else (False,) for unit in self.units]

    def costs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(What each level of each unit costs, [levels of all units, budgets]; the least and the most of all together,
        [budgets])."""
        levels = [(unit, dropped) for unit, levels in zip(self.units, self.levels) for dropped in levels]
        if self.counts is None:
            return (np.array([[unit.size * dropped] for unit, dropped in levels]), np.array([self.least_size]),
                    np.array([self.least_size + self.slack - 1]))
        counts = np.array([*self.counts.values()])
        return np.array([[unit.kind == kind and dropped for kind in self.counts] for unit, dropped in levels],
                        dtype=int), counts, counts

    def states(self, candidate: Candidate, num_blocks: int) -> tuple[tuple[bool, bool], ...]:
        """(attention dropped, MLP dropped) of every block."""
        states = [[False, False] for _ in range(num_blocks)]
        for unit, dropped in zip(self.units, candidate):
            for block, part in unit.parts:
                states[block][part] = dropped
        return tuple((attn, mlp) for attn, mlp in states)


def build_space(args: argparse.Namespace, sizes: list[tuple[int, int]],
                held: Sequence[tuple[bool, bool]] | None = None) -> Space:
    """The search space of the flags; sizes: parameters of every block's (attention, MLP); held: which of those the
    model cannot do without, since later blocks read their keys and values.

    Raises ValueError where the budget cannot be met.
    """
    num_blocks = len(sizes)
    legal = (read_drop_config(args.legal_to_drop_path, num_blocks) if args.legal_to_drop_path
             else [(True, True)] * num_blocks)
    if held:
        legal = [tuple(may and not kept for may, kept in zip(*pair)) for pair in zip(legal, held)]
    if args.drop_two_consecutive and num_blocks % 2:
        raise ValueError(f"--drop_two_consecutive: the model has {num_blocks} blocks; an even number is needed")
    groups = [(i, i + 1) for i in range(0, num_blocks, 2)] if args.drop_two_consecutive else [
        (i,) for i in range(num_blocks)]
    kinds = {"attn+mlp": (0, 1)} if args.drop_entire_block else {"attn": (0,), "mlp": (1,)}
    units = []
    for kind, halves in kinds.items():
        for group in groups:
            parts = tuple((block, half) for block in group for half in halves)
            units.append(Unit(kind, parts, sum(sizes[b][h] for b, h in parts), all(legal[b][h] for b, h in parts)))

    if args.drop_params is not None:
        total = sum(map(sum, sizes))
        return Space(tuple(units), None, math.ceil(args.drop_params * total - 1e-6), min(unit.size for unit in units))
    counts = {}
    for kind in kinds:
        if args.sparsity is not None:
            counts[kind] = math.floor(args.sparsity * len(groups) + 1e-9)   # 0.29 * 100 is 28.999...
            flag = f"--sparsity {args.sparsity}"
        else:
            asked = {"attn": args.drop_attn, "mlp": args.drop_mlp}[kind] or 0
            flag = f"--drop_{kind} {asked}"
            if asked % len(groups[0]):
                raise ValueError(f"{flag}: odd, but --drop_two_consecutive drops them in pairs; give an even number")
            counts[kind] = asked // len(groups[0])
        allowed = sum(unit.kind == kind and unit.legal for unit in units)
        if counts[kind] > allowed:
            raise ValueError(f"{flag}: {counts[kind]} of '{kind}' to drop, but only {allowed} may be; lower it"
                             + (", or allow more in --legal_to_drop_path" if args.legal_to_drop_path else ""))
    return Space(tuple(units), counts)


# ---- start, mutation and selection -----------------------------------------------------------------------------------


def random_candidate(space: Space, rng: random.Random) -> Candidate | None:
    """One candidate drawn at random; None where a few tries meet no budget of parameters."""
    legal = [i for i, unit in enumerate(space.units) if unit.legal]
    if space.counts is None:
        return fill_budget(space, set(), legal, rng)
    chosen: set[int] = set()
    for kind, count in space.counts.items():
        chosen |= set(rng.sample([i for i in legal if space.units[i].kind == kind], count))
    return tuple(i in chosen for i in range(len(space.units)))


def measured_candidate(space: Space, measure: Callable[[list[Candidate]], dict[Candidate, float]], rng: random.Random
                       ) -> Candidate | None:
    """Greedy: drop the unit that does the least harm (per parameter, where those are the budget), measure again, until
    the budget is met. `measure` gives fitness by candidate. None where greedy choices do not lead to the budget.

    Lazy greedy (Minoux, 1978): most units do more harm the more is dropped, so the harm last measured is taken as a
    lower bound, and a unit is measured again only while another may do more.
    """
    def with_dropped(unit: int) -> Candidate:
        return tuple(dropped or i == unit for i, dropped in enumerate(candidate))

    weights = [unit.size if space.counts is None else 1 for unit in space.units]
    candidate = (False,) * len(space.units)
    fitness = measure([candidate])[candidate]
    harm: dict[int, float] = {}
    while choices := droppable(space, candidate):
        seen: dict[int, float] = {}                          # harm of what is measured in this round
        waiting = sorted(choices, key=lambda i: harm.get(i, 0) / weights[i])
        while waiting and (not seen or harm[waiting[0]] / weights[waiting[0]]
                           < min(seen[i] / weights[i] for i in seen)):
            count = LAZY_BATCH if harm else len(waiting)
            batch, waiting = waiting[:count], waiting[count:]
            values = measure([with_dropped(i) for i in batch])
            seen |= {i: value - fitness if math.isfinite(value := values[with_dropped(i)]) else math.inf for i in batch}
        harm |= seen
        least = min(seen, key=lambda i: seen[i] / weights[i])
        candidate, fitness = with_dropped(least), fitness + seen[least]
    return complete(space, candidate, rng)


def complete(space: Space, candidate: Candidate, rng: random.Random) -> Candidate | None:
    """`candidate`, or where sizes that greedy choices do not add up to the budget, one with more dropped at random."""
    if space.feasible(candidate):
        return candidate
    kept = [i for i, unit in enumerate(space.units) if unit.legal and not candidate[i]]
    return fill_budget(space, {i for i, dropped in enumerate(candidate) if dropped}, kept, rng)


def ranked_candidate(space: Space, influence: Sequence[float], rng: random.Random) -> Candidate | None:
    """The blocks of least `influence` (1 - cos of what goes in and comes out) dropped whole, as far as the budget
    allows: ShortGPT (Men et al., 2024). None where that does not lead to the budget."""
    scores = [sum(influence[block] for block, _ in unit.parts) / len(unit.parts) for unit in space.units]
    candidate = (False,) * len(space.units)
    while choices := droppable(space, candidate):
        least = min(choices, key=lambda i: scores[i])
        candidate = tuple(dropped or i == least for i, dropped in enumerate(candidate))
    return complete(space, candidate, rng)


def best_predicted(space: Space, predictor: AdditiveModel, rng: random.Random) -> list[Candidate]:
    """What `predictor` ranks best under the budget, best first: where descents by one or two changes end that begin at
    its center and at random."""
    starts = [predictor.center, *(random_candidate(space, rng) for _ in range(RESTARTS))]
    found = dict.fromkeys(descend(predictor.columns, predictor.effects, predictor.pairs, *space.costs(), start)
                          for start in starts if start and space.feasible(start))
    return [candidate for _, candidate in sorted(zip(predictor.predict([*found]), found))]


def droppable(space: Space, candidate: Candidate) -> list[int]:
    """Units that may be dropped next without going beyond the budget; none where it is met."""
    kept = [i for i, unit in enumerate(space.units) if unit.legal and not candidate[i]]
    if space.counts is None:
        size = space.dropped_size(candidate)
        return [i for i in kept if size < space.least_size
                and size + space.units[i].size < space.least_size + space.slack]
    left = {kind: count - sum(unit.kind == kind and dropped for unit, dropped in zip(space.units, candidate))
            for kind, count in space.counts.items()}
    return [i for i in kept if left[space.units[i].kind]]


def switch(space: Space, candidate: Candidate, rng: random.Random) -> Candidate | None:
    """Level-switch mutation: restore one dropped unit and drop a kept one, so that the budget stays. None:
    impossible."""
    kept = [i for i, unit in enumerate(space.units) if unit.legal and not candidate[i]]
    dropped = [i for i in range(len(space.units)) if candidate[i]]
    if space.counts is None:
        if not dropped or not kept:
            return None
        restored = rng.choice(dropped)
        return fill_budget(space, set(dropped) - {restored}, kept, rng)
    kinds = [kind for kind in space.counts if any(space.units[i].kind == kind for i in kept)
             and any(space.units[i].kind == kind for i in dropped)]
    if not kinds:
        return None
    kind = rng.choice(kinds)
    restored = rng.choice([i for i in dropped if space.units[i].kind == kind])
    added = rng.choice([i for i in kept if space.units[i].kind == kind])
    return tuple(i == added or (old and i != restored) for i, old in enumerate(candidate))


def fill_budget(space: Space, dropped: set[int], kept: list[int], rng: random.Random) -> Candidate | None:
    """Drop units of `kept` in random order until the budget of parameters is met, then restore what is not needed."""
    size = sum(space.units[i].size for i in dropped)
    for i in rng.sample(kept, len(kept)):
        if size >= space.least_size:
            break
        dropped = dropped | {i}
        size += space.units[i].size
    for i in rng.sample(sorted(dropped), len(dropped)):
        if size - space.units[i].size >= space.least_size:
            dropped = dropped - {i}
            size -= space.units[i].size
    candidate = tuple(i in dropped for i in range(len(space.units)))
    return candidate if space.feasible(candidate) else None


def draw_distinct(draw: Callable[[], Candidate | None], count: int, known: set[Candidate]) -> list[Candidate]:
    """`count` new candidates, or fewer where the space seems to hold no more: duplicates are redrawn, not for ever."""
    known, found, failed = set(known), [], 0
    while len(found) < count and failed < FAILED_DRAWS:
        candidate = draw()
        if candidate is None or candidate in known:
            failed += 1
        else:
            known.add(candidate)
            found.append(candidate)
            failed = 0
    return found


def mutate(space: Space, parents: list[Candidate], max_mutations: int, rng: random.Random,
           fixed_mutations: int | None = None) -> Candidate | None:
    """A copy of a random parent with min(U1, U2) level switches, or with a fixed number of them."""
    child = rng.choice(parents)
    for _ in range(fixed_mutations or min(rng.randint(1, max_mutations), rng.randint(1, max_mutations))):
        child = child and switch(space, child, rng)
    return child


def select(offspring: list[Candidate], parents: list[Candidate], steps: list[tuple[int, int]],
           measure: Callable[[list[Candidate], int], list[tuple[float, Candidate]]], strategy: str = "plus"
           ) -> list[tuple[float, Candidate]]:
    """Multi-step selection: the (fitness, candidate) that the last step leaves, best first.

    steps: (survivors, tokens) of each; measure(candidates, tokens) gives (fitness, candidate), best first. With
    "plus" the parents compete in the last step only, with "comma" not at all. What is not finite never survives; where
    nothing is, the parents stay.
    """
    candidates = offspring
    for step, (survivors, num_tokens) in enumerate(steps):
        if step == len(steps) - 1 and strategy == "plus":
            candidates = candidates + parents
        ranked = measure(candidates, num_tokens)[:survivors]
        ranked = [pair for pair in ranked if math.isfinite(pair[0])]
        candidates = [candidate for _, candidate in ranked]
    return ranked or [(math.inf, parent) for parent in parents]


# ---- the search ------------------------------------------------------------------------------------------------------


def check_budget(args: argparse.Namespace) -> None:
    budgets = [args.sparsity is not None, args.drop_attn is not None or args.drop_mlp is not None,
               args.drop_params is not None]
    if sum(budgets) != 1:
        raise ValueError("--sparsity, --drop_attn/--drop_mlp, --drop_params: give exactly one budget, e.g. --sparsity "
                         "0.25")
    for flag in ("sparsity", "drop_params"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"--{flag} {value}: a fraction between 0 and 1 is needed, e.g. 0.25")
    for flag in ("drop_attn", "drop_mlp"):
        if (getattr(args, flag) or 0) < 0:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be 0 or more")
    if args.drop_entire_block and budgets[1]:
        raise ValueError("--drop_entire_block: drops attentions and MLPs together; use --sparsity or --drop_params")


def check_flags(args: argparse.Namespace) -> None:
    flags.check_search_flags(args)
    check_budget(args)
    if args.legal_to_drop_path:
        read_drop_config(args.legal_to_drop_path)
    if args.refine and (args.invert_fitness or args.fitness_fn != "kl"):
        raise ValueError(f"--refine {args.refine}: measures KL divergences and looks for the least; leave it out, or "
                         f"--invert_fitness and --fitness_fn ppl")
    if args.confirm_tokens and args.invert_fitness:
        raise ValueError(f"--confirm_tokens {args.confirm_tokens}: keeps what has the least fitness; leave it out, or "
                         f"--invert_fitness")
    if args.screen > 1 and not args.refine:
        raise ValueError(f"--screen {args.screen}: sub-blocks interact too much to be ranked without knowing how; add "
                         f"--refine 2")


def default_generations(space: Space, start: Candidate, num_blocks: int) -> int:
    """The paper's number, by what is dropped at the start: a resumed search agrees."""
    dropped = round(sum(sum(state) for state in space.states(start, num_blocks)) / 2)
    return math.ceil(dropped * (num_blocks - dropped) / 1.5)


def measure_pairs(search: Search, space: Space, predictor: AdditiveModel, center: Candidate, num_tokens: int) -> None:
    """Run the center with each unit dropped or restored: `predictor` learns what that does alone, and what every two
    do beyond it."""
    units = [i for i, unit in enumerate(space.units) if unit.legal]
    candidates = [center, *(tuple(dropped != (i == unit) for i, dropped in enumerate(center)) for unit in units)]
    values, gram = search.changes(candidates, search.draw(num_tokens), center)
    places = [predictor.columns.of(unit, not center[unit]) for unit in units]
    effects = np.zeros(len(predictor.columns))
    effects[places] = values[1:] - values[0]
    predictor.expect_pairs(effects, pairs_of(predictor.columns, places, gram[1:, 1:]), center, num_tokens)
    predictor.observe([*zip(values.tolist(), candidates)], num_tokens)


def refined_candidates(args: argparse.Namespace, search: Search, space: Space, predictor: AdditiveModel
                       ) -> list[Candidate]:
    """As many as the first selection step leaves, of those that are best by pairs measured around the best parent."""
    num_tokens = min(args.calibration_tokens, REFINE_TOKENS * args.initial_tokens)
    measure_pairs(search, space, predictor, search.parents[0], num_tokens)
    best = best_predicted(space, predictor, search.rng)
    near = draw_distinct(lambda: switch(space, best[0], search.rng), 4 * args.offspring, {*best})
    ranked = sorted(zip(predictor.predict([*best, *near]), [*best, *near]))
    return [candidate for _, candidate in ranked if candidate not in search.parents][:args.survivors_per_selection[0]]


def new_offspring(args: argparse.Namespace, search: Search, space: Space, predictor: AdditiveModel, generation: int
                  ) -> list[Candidate]:
    """Mutations of the parents; with --screen those that are predicted best, and with --refine, at first, what the
    model finds best by itself."""
    if generation <= args.refine or args.screen > 1 and predictor.astray(search.parents[0]):
        refined = refined_candidates(args, search, space, predictor)
        if refined:
            return refined
    offspring = draw_distinct(
        lambda: mutate(space, search.parents, args.max_mutations, search.rng, args.fixed_mutations),
        args.offspring * args.screen, set(search.parents))
    return predictor.screen(offspring, args.offspring, search.rng) if args.screen > 1 and offspring else offspring


def rank(args: argparse.Namespace, search: Search, predictor: AdditiveModel, candidates: list[Candidate],
         num_tokens: int, minibatch: list[tuple[int, int]] | None = None) -> list[tuple[float, Candidate]]:
    """(fitness, candidate), best first; what is not finite is last whatever is searched for. Where parents compete and
    differ by less than the noise, `predictor` has a say."""
    minibatch = minibatch or search.draw(num_tokens)
    sign = -1 if args.invert_fitness else 1
    ranked = sorted(((sign * value if math.isfinite(value) else math.inf, candidate)
                     for value, candidate in zip(search.measure(candidates, minibatch), candidates)),
                    key=lambda pair: pair[0])
    predictor.observe(ranked, num_tokens)
    if not args.refine or not {*search.parents} & {*candidates}:
        return ranked
    return predictor.reconsider(ranked, [search.measurements.ties(candidate, ranked[0][1], minibatch)
                                         or candidate == ranked[0][1] for _, candidate in ranked])


def first_candidates(args: argparse.Namespace, search: Search, space: Space, measure: Callable) -> list[Candidate]:
    """Candidates of which the best are the first parents, as --init says. Raises RunError where there is none."""
    initial = draw_distinct(lambda: random_candidate(space, search.rng), args.initially_generated, set())
    if not initial:
        raise RunError(f"--drop_params {args.drop_params}: no set of sub-blocks drops at least that share by less than "
                       f"the smallest sub-block more; change the fraction or what may be dropped")
    if args.init == "measured":
        minibatch = search.draw(args.initial_tokens)
        candidate = measured_candidate(space, lambda candidates: {
            c: value for value, c in measure(candidates, args.initial_tokens, minibatch)}, search.rng)
        influence = search.fitness.influence
        ranked = influence and ranked_candidate(space, influence, search.rng)
        initial = [*dict.fromkeys(filter(None, (candidate, ranked)))] or initial
    return initial


def copies_of(args: argparse.Namespace) -> dict[str, Path]:
    """Flag -> copy of the configuration, where more is written elsewhere: the last file there."""
    return {flag: Path(folder, CONFIGURATION) for flag in ("drop_config_dir", "save_dir")
            if (folder := getattr(args, flag))}


def check_save_dir(args: argparse.Namespace) -> None:
    """Raise ValueError where what is saved would take the place of anything but an earlier result."""
    folder = Path(args.save_dir)
    if folder.resolve() == Path(args.model_name_or_path).resolve():
        raise ValueError(f"--save_dir {folder}: is the model that is searched; name another folder")
    if args.output_dir and folder.resolve() == Path(args.output_dir).resolve():
        raise ValueError(f"--save_dir {folder}: is the --output_dir, which has the run itself; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIGURATION).is_file():
        raise ValueError(f"--save_dir {folder}: is not empty, and not from evo_drop.py; name another folder")


def open_search(args: argparse.Namespace, argv: list[str] | None) -> tuple[argparse.Namespace, Search]:
    """(The flags with what --search_tokens makes of them, the run): all that can be refused before text and model are
    loaded is. Raises ValueError and RunError."""
    check_budget(args)
    if args.search_tokens is None:                           # else once that has set the others
        check_flags(args)
    if args.save_dir:
        check_save_dir(args)
    config = load_config(args.model_name_or_path, args.trust_remote_code)
    num_blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if num_blocks:
        space = build_space(args, [(1, 1)] * num_blocks)
        if args.sparsity is not None and not any(space.counts.values()):
            count = len(space.units) // len(space.counts)
            raise ValueError(f"--sparsity {args.sparsity}: of {count} drops none; give at least {1 / count:.3g}")
    sub_blocks = 2 * (num_blocks or 32)
    args = flags.spread_search_tokens(args, argv, make_parser(), check_flags, RECOMMENDED, 3 * sub_blocks,
                                      2 * REFINE_TOKENS * (sub_blocks + 1), confirm=True)
    search = Search("evo_drop", args, config, flags.flag_defaults(make_parser()))
    if search.resumed and num_blocks:
        search.run.default_to(default_generations(space, search.saved["start"][0], num_blocks))
    return args, search


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict:
    """Run the search of the flags, or resume it; returns what summary.json holds."""
    args = parse_arguments(argv)
    with user_errors():
        args, search = open_search(args, argv)
        legal = {flag: hashlib.sha256(Path(file).read_bytes()).hexdigest() for flag in ("legal_to_drop_path",)
                 if (file := getattr(args, flag))}
        own, copies = search.run.folder / CONFIGURATION, copies_of(args)
        if search.run.finished and own.is_file() and all(file.is_file() and file.read_bytes() == own.read_bytes()
                                                         for file in copies.values()):
            return search.earlier_summary(**legal)
        for flag, file in copies.items():
            check_writable(file.parent, f"--{flag}")
        search.load(**legal)
        blocks = search.decoder.blocks
        held = [(bool(block.attn.held), bool(block.mlp.held)) for block in blocks]
        if all(map(all, held)):
            search.decoder.check_dropped([(True, True)] * len(blocks))
        if any(map(any, held)):
            print(f"kept, since later blocks read their keys and values: the attentions of blocks "
                  f"{', '.join(str(i) for i, (attn, _) in enumerate(held) if attn)}")
        space = build_space(args, [(block.attn.size, block.mlp.size) for block in blocks], held)

    def set_block(index: int, state: tuple[bool, bool] | None) -> None:
        blocks[index].drop(*(state or (False, False)))

    search.prepare(set_block, lambda candidate: space.states(candidate, len(blocks)),
                   logged=lambda candidate: {"dropped": " ".join(drop_words(space.states(candidate, len(blocks)))),
                                             **({"trust": predictor.trust} if args.screen > 1 else {})})
    predictor = AdditiveModel(space.levels)                  # of fitness, with pairs, for --refine and --screen
    measure = partial(rank, args, search, predictor)

    def state() -> dict:
        return {"model": predictor.state} if args.refine else {}

    if not search.resumed:
        initial = first_candidates(args, search, space, measure)
        search.begin(measure(initial, args.tokens_per_selection[-1] if args.init == "measured" else
                             args.initial_tokens), **state())
    elif args.refine:
        predictor.restore(search.saved["model"])
    search.run.default_to(default_generations(space, search.start, len(blocks)))
    print(f"budget: {describe(space, search.parents[0], blocks)}")

    steps = list(zip(args.survivors_per_selection, args.tokens_per_selection))
    # Algorithm 1: offspring of the parents, selected in steps of fewer on more tokens each; survivors are parents next
    for generation in search.generations():
        offspring = new_offspring(args, search, space, predictor, generation)
        if not offspring:
            print("no other candidate meets the budget: nothing to search")
            break
        survivors = select(offspring, search.parents, steps, measure, args.strategy)
        search.record(search.confirm(survivors), **state())

    winner = space.states(search.parents[0], len(blocks))
    files = [own, *(file for flag, file in copies.items() if flag != "save_dir")]
    for file in files:
        write_drop_config(file, winner)
    search.evaluate("measured start" if args.init == "measured" else "best random start")
    if args.save_dir:
        write_drop_config(copies["save_dir"], [])            # the winner, once all that is saved is there
        for index, state in enumerate(winner):
            set_block(index, state)
        dtype = dtype_in(search.config) if args.dtype == "auto" else None
        save_dropped(search.decoder, search.tokenizer, args.save_dir, dtype,
                     lambda decoder: with_tower(whole(decoder), args.model_name_or_path, search.config).model)
        if distributed.is_main():
            copy_processors(args.model_name_or_path, Path(args.save_dir), search.config)
        write_drop_config(copies["save_dir"], winner)
    return search.finish(describe(space, search.parents[0], blocks),
                         [[state[half] for state in winner] for half in (0, 1)], ["attention", "MLP"], "dropped", files,
                         dropped=" ".join(drop_words(winner)))


def describe(space: Space, candidate: Candidate, blocks: list) -> str:
    """The budget as met, in words: counted from the candidate, not from the flags."""
    states = space.states(candidate, len(blocks))
    size = space.dropped_size(candidate)
    total = sum(block.attn.size + block.mlp.size for block in blocks)
    return (f"{sum(attn for attn, _ in states)} of {len(blocks)} attentions and {sum(mlp for _, mlp in states)} of "
            f"{len(blocks)} MLPs dropped, {size:,} of {total:,} block parameters ({size / total:.2%})")


if __name__ == "__main__":
    distributed.launch(main)
