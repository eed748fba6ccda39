"""EvoPress, unstructured sparsity: search how sparse each linear layer should be (arXiv 2410.14649, Algorithm 1,
section 4.2).

    python -m database.sparsegpt --model_name_or_path meta-llama/Meta-Llama-3-8B --sparsity 0.6 --save_dir db
    python evo_unstructured.py --model_name_or_path meta-llama/Meta-Llama-3-8B --sparse_weights_path db

A candidate is a level for every layer. A level is the same number of weights in every layer, so raising one layer and
lowering another leaves the number of weights kept exactly as it was. Offspring are selected in steps, on more tokens
each time, by their KL divergence from the uncompressed model. The result has one line a layer: `layer.name: level`.
"""
import argparse
import math
import random
from collections.abc import Callable, Collection
from contextlib import suppress
from operator import mul

from database.levels import LevelSwitcher, describe_levels, describe_whole, open_database
from database.sensitivity import REFINE_TOKENS, estimate_alone, estimate_around
from database.store import Database
from utils import distributed, flags
from utils.allocation import allocate
from utils.configs import check_configuration_name, write_level_config
from utils.errors import RunError, user_errors
from utils.files import check_writable
from utils.model import load_config
from utils.screening import AdditiveModel
from utils.search import Search
from utils.units import Unit, add_unit_flags, build_units, check_unit_flags, level_map, units_of

Candidate = tuple[int, ...]      # the level of every unit
RECOMMENDED = ["--init", "measured", "--screen", "4", "--refine", "4"]
FAILED_DRAWS = 200               # draws without a new candidate after which a generation makes do with fewer offspring


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_model_flags(parser, offload=True, compiled=True)
    flags.add_calibration_flags(parser, tokens=524288)
    space = parser.add_argument_group("search space")
    space.add_argument("--sparse_weights_path", required=True, metavar="FOLDER",
                       help="database built by python -m database.sparsegpt; its level 0 is the budget")
    space.add_argument("--max_level", type=int, metavar="LEVELS", help="bound on every layer's |level| (default: none)")
    space.add_argument("--max_total_deviation", type=int, metavar="LEVELS",
                       help="bound on the sum of the layers' |level| (default: none)")
    add_unit_flags(space)
    space.add_argument("--level_cache_gb", type=float, default=24.0, metavar="GB",
                       help="packed levels kept on the device; the rest is read from disk (default: 24)")
    search = flags.add_search_flags(
        parser, generations=400, offspring=64, survivors=[8, 2, 1], tokens=[2048, 16384, 65536],
        init={"uniform": "level 0 everywhere, or as near to it as allowed",
              "random": "the best of --initially_generated, as many random switches from that as there are units",
              "measured": "the best sum of errors, of each unit alone on --initial_tokens"},
        initially_generated=32, initial_tokens=2048, generations_help="default: 400",
        fitness=["kl", "ppl", "sparse_kl"])              # how each is measured: utils/fitness.py
    search.add_argument("--refine", type=int, default=0, metavar="GENERATIONS",
                        help="in the first so many generations, until one is no better, the offspring is the best sum "
                             "of changes, of each unit a level up or down from the best parent, which follow from one "
                             "measurement of the unit on twice --initial_tokens (default: 0)")
    flags.add_evaluation_flags(parser)
    flags.add_output_flags(parser, "evo_unstructured").add_argument(
        "--configuration_name", default="final_configuration.txt", metavar="NAME",
        help="of the result, in --output_dir and in the database (default: final_configuration.txt)")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


# ---- the search space ------------------------------------------------------------------------------------------------


class Space:
    """All candidates that keep exactly as many weights as level 0 everywhere does.

    One step of a unit moves `len(unit)` times the same number of weights, so the budget is that the steps of all
    layers add up to zero.
    """

    def __init__(self, units: list[Unit], max_total_deviation: int | None = None):
        self.units = units
        self.sizes = [len(unit) for unit in units]
        self.of_experts = [unit.of_experts for unit in units]
        self.max_total_deviation = max_total_deviation

    def steps(self, candidate: Candidate) -> int:
        """Sum of the layers' levels: 0 where the budget is met."""
        return sum(map(mul, self.sizes, candidate))

    def deviation(self, candidate: Candidate) -> int:
        return sum(map(mul, self.sizes, map(abs, candidate)))

    def feasible(self, candidate: Candidate) -> bool:
        return (self.steps(candidate) == 0
                and all(level in unit.levels for unit, level in zip(self.units, candidate))
                and (self.max_total_deviation is None or self.deviation(candidate) <= self.max_total_deviation))

    def levels(self, candidate: Candidate) -> dict[str, int]:
        """Level by layer name, in the units' order."""
        return {name: level for unit, level in zip(self.units, candidate) for name in unit.names}

    def moved(self, candidate: Candidate, index: int, direction: int) -> Candidate | None:
        """The candidate with one unit a level higher (+1) or lower (-1); None where it has no such level."""
        level = candidate[index] + direction
        return (*candidate[:index], level, *candidate[index + 1:]) if level in self.units[index].levels else None


# ---- start, mutation and selection -----------------------------------------------------------------------------------


def start_candidate(space: Space, rng: random.Random) -> Candidate | None:
    """Level 0 everywhere where that is allowed; else levels as near to it as allowed, moved at random to the budget."""
    nearest = tuple(min(unit.levels, key=abs) for unit in space.units)
    return nearest if space.feasible(nearest) else balance(space, nearest, set(), rng)


def random_candidate(space: Space, rng: random.Random) -> Candidate | None:
    """As many random switches from the start as there are units, without those that are not drawn."""
    candidate = start_candidate(space, rng)
    for _ in range(len(space.units) if candidate else 0):
        candidate = switch(space, candidate, rng) or candidate
    return candidate


def allocated_candidates(space: Space, estimates: list[list[dict[int, float]]]) -> list[Candidate]:
    """The least sum of errors within the budget, for each estimate that can meet it. Of every unit it has level ->
    error, where levels that may not be taken are missing."""
    steps = [{level: len(unit) * level for level in unit.levels} for unit in space.units]
    found = []
    for errors in estimates:
        with suppress(ValueError):
            found.append(tuple(allocate(errors, steps, 0, exact=True)))
    return found


def balance(space: Space, candidate: Candidate, fixed: Collection[int], rng: random.Random) -> Candidate | None:
    """Move units outside `fixed`, drawn at random, until the steps add up to zero. None where that fails."""
    while steps := space.steps(candidate):
        direction = -1 if steps > 0 else 1
        moves = [i for i, unit in enumerate(space.units) if candidate[i] + direction in unit.levels
                 and space.sizes[i] <= abs(steps) and i not in fixed]
        if not moves:
            return None
        candidate = space.moved(candidate, rng.choice(moves), direction)
    return candidate if space.feasible(candidate) else None


def switch(space: Space, candidate: Candidate, rng: random.Random) -> Candidate | None:
    """Level-switch mutation: one unit a level up, another a level down; more than one where tied units differ in
    size. A step of all of a block's experts is one of a hundred other layers: experts give to experts, and others to
    others, where they can. None where no such switch is drawn."""
    up = [i for i, unit in enumerate(space.units) if candidate[i] + 1 in unit.levels]
    if not up:
        return None
    raised = rng.choice(up)
    child = space.moved(candidate, raised, 1)
    others = {i for i, of_experts in enumerate(space.of_experts) if of_experts != space.of_experts[raised]}
    return balance(space, child, {raised, *others}, rng) or (others and balance(space, child, {raised}, rng)) or None


def mutate(space: Space, parents: list[Candidate], max_mutations: int, rng: random.Random,
           fixed_mutations: int | None = None) -> Candidate | None:
    """A copy of a random parent with min(U1, U2) level switches, or with a fixed number of them."""
    child = rng.choice(parents)
    for _ in range(fixed_mutations or min(rng.randint(1, max_mutations), rng.randint(1, max_mutations))):
        child = child and switch(space, child, rng)
    return child


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


def check_flags(args: argparse.Namespace) -> None:
    flags.check_search_flags(args)
    check_unit_flags(args)
    for flag in ("max_level", "max_total_deviation"):
        value = getattr(args, flag)
        if value is not None and value < 0:
            raise ValueError(f"--{flag} {value}: must be 0 or more")
    if args.max_total_deviation is not None and (args.init == "measured" or args.refine):
        raise ValueError(f"--max_total_deviation {args.max_total_deviation}: --init measured and --refine cannot hold "
                         f"it; bound each layer with --max_level, or leave them out")
    check_configuration_name(args.configuration_name)


def drawn_candidates(args: argparse.Namespace, space: Space, rng: random.Random) -> list[Candidate]:
    """The uniform candidate where it may start, else --initially_generated others. Raises RunError for none."""
    uniform = tuple(0 for _ in space.units)
    draw = random_candidate if args.init == "random" else start_candidate
    drawn = [uniform] if args.init != "random" and space.feasible(uniform) else draw_distinct(
        lambda: draw(space, rng), args.initially_generated, set())
    if not drawn:
        raise RunError("--pin, --bounds, --tie, --max_level and --max_total_deviation leave no allocation that keeps "
                       "as many weights as level 0; loosen them")
    return drawn


def first_candidates(args: argparse.Namespace, search: Search, space: Space, switcher: LevelSwitcher,
                     database: Database, predictor: AdditiveModel, drawn: list[Candidate]) -> list[Candidate]:
    """Candidates of which the best are the first parents: those `drawn`, or what --init measured allocates and one."""
    if args.init == "measured":
        errors, within, measured = estimate_alone(search.fitness, switcher, database, space.units, 0,
                                                  search.draw(args.initial_tokens))
        search.tokens += measured * args.initial_tokens
        if args.fitness_fn != "ppl":                         # errors are KL divergences
            predictor.expect(errors)
        allocated = allocated_candidates(space, within) or allocated_candidates(space, [errors])
        return list(dict.fromkeys([*allocated, drawn[0]]))
    return drawn


def refined_candidates(args: argparse.Namespace, search: Search, space: Space, switcher: LevelSwitcher,
                       database: Database, predictor: AdditiveModel) -> list[Candidate]:
    """The best sum of changes, of each unit a level up or down from the best parent; none where that is a parent. It is
    to compete alone: steps on few tokens would drop it for what they cannot tell apart."""
    num_tokens = min(args.calibration_tokens, REFINE_TOKENS * args.initial_tokens)
    changes, measured = estimate_around(search.fitness, switcher, database, space.units, search.parents[0],
                                        search.draw(num_tokens))
    search.tokens += len(measured) * num_tokens
    if args.fitness_fn != "ppl":                             # what is measured here is KL divergence
        predictor.observe(measured, num_tokens)
    return [candidate for candidate in allocated_candidates(space, [changes]) if candidate not in search.parents]


def new_offspring(args: argparse.Namespace, search: Search, space: Space, predictor: AdditiveModel) -> list[Candidate]:
    """Mutations of the parents; with --screen those that are predicted best."""
    offspring = draw_distinct(
        lambda: mutate(space, search.parents, args.max_mutations, search.rng, args.fixed_mutations),
        args.offspring * args.screen, set(search.parents))
    return predictor.screen(offspring, args.offspring, search.rng) if args.screen > 1 and offspring else offspring


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict:
    """Run the search of the flags, or resume it; returns what summary.json holds."""
    args = parse_arguments(argv)
    with user_errors():
        if args.search_tokens is None:                       # else once that has set the others
            check_flags(args)
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        database = open_database(args, "sparse", config)
        units = len(units_of({name: database.levels(name) for name in database.layers}, args))
        args = flags.spread_search_tokens(args, argv, make_parser(), check_flags, RECOMMENDED, 2 * units + 2,
                                          4 * REFINE_TOKENS * (units + 1))
        search = Search("evo_unstructured", args, config, flags.flag_defaults(make_parser()))
        if search.run.finished:
            return search.earlier_summary(sparse_weights_path=database.sha256)
        check_writable(args.sparse_weights_path, "--sparse_weights_path")     # a copy of the result goes there
        search.load(sparse_weights_path=database.sha256)      # a run goes on only with the levels it was begun on
        switcher = LevelSwitcher(search.decoder, database, args.level_cache_gb)
        bound = math.inf if args.max_level is None else args.max_level
        levels = {name: [level for level in database.levels(name) if abs(level) <= bound] for name in database.layers}
        space = Space(build_units(switcher.names, levels, args), args.max_total_deviation)
        drawn = drawn_candidates(args, space, search.rng)        # before the model is run: there may be none
    search.prepare(switcher.set_block, lambda candidate: switcher.states(space.levels(candidate)),
                   logged=lambda candidate: {"levels": candidate},
                   divergences=args.init == "measured" or args.refine > 0)
    predictor = AdditiveModel([unit.levels for unit in space.units])     # of fitness, for --screen

    def measure(candidates: list[Candidate], num_tokens: int) -> list[tuple[float, Candidate]]:
        """(fitness, candidate), best first, on a minibatch of that many tokens."""
        values = search.measure(candidates, search.draw(num_tokens))
        ranked = sorted(zip(values, candidates), key=lambda pair: pair[0])
        predictor.observe(ranked, num_tokens)
        return ranked

    refining = args.refine > 0                               # until what that finds is no better

    def state() -> dict:
        return {"model": predictor.state if args.screen > 1 else None, "refining": refining}

    if not search.resumed:
        initial = first_candidates(args, search, space, switcher, database, predictor, drawn)
        search.begin(measure(initial, args.initial_tokens), **state())
    else:
        refining = search.saved.get("refining", refining)    # which earlier versions did not save
        if args.screen > 1:
            predictor.restore(search.saved["model"])
    print(f"budget: {describe(space, search.parents[0], database)}")

    steps = list(zip(args.survivors_per_selection, args.tokens_per_selection))
    # Algorithm 1: offspring of the parents, selected in steps of fewer on more tokens each; survivors are parents next
    for generation in search.generations():
        refining &= generation <= args.refine
        refined = refined_candidates(args, search, space, switcher, database, predictor) if refining else []
        offspring = refined or new_offspring(args, search, space, predictor)
        if not offspring:
            print("no other candidate meets the budget: nothing to search")
            break
        survivors = search.confirm(select(offspring, search.parents, steps, measure, args.strategy))
        refining &= any(candidate in refined for _, candidate in survivors)
        search.record(survivors, **state())

    # in the model's order of layers
    winner = {name: space.levels(search.parents[0])[name] for names in switcher.names for name in names}
    files = [folder / args.configuration_name for folder in (search.run.folder, database.path)]
    for file in files:
        write_level_config(file, winner)
    whole = describe_whole(search.decoder, config, database, winner)
    print(f"whole model: {whole}")
    search.evaluate("uniform" if not any(search.start) else "measured start" if args.init == "measured"
                    else f"best of {args.initially_generated} random")
    sparsity = {name: 1 - database.kept(name, level) / math.prod(database.shape(name))
                for name, level in winner.items()}
    return search.finish(describe(space, search.parents[0], database), *level_map(switcher.names, sparsity), "sparsity",
                         files, database=str(database.path), database_sha256=database.sha256,
                         levels=winner, whole_model=whole)


def describe(space: Space, candidate: Candidate, database: Database) -> str:
    """The budget as met, in words: weights counted in the database, not computed from the flags."""
    return describe_levels(database, space.levels(candidate))


if __name__ == "__main__":
    distributed.launch(main)
