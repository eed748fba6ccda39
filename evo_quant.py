"""EvoPress, quantization: search the bitwidth of each linear layer (arXiv 2410.14649, Algorithm 1, section 4.3).

    python -m database.gptq --model_name_or_path meta-llama/Meta-Llama-3-8B --group_size 128 --perchannel --save_dir db
    python evo_quant.py --model_name_or_path meta-llama/Meta-Llama-3-8B --quant_weights_path db --target_bitwidth 2.5

A candidate is a bitwidth for every layer. Raising one layer and lowering others of the same group keeps the model's
average at the target. Offspring are selected in steps, on more tokens each time, by their KL divergence from the
uncompressed model. The result has one line a layer: `layer.name: bitwidth`.
"""
import argparse
import math
import random
from collections.abc import Callable
from contextlib import suppress
from operator import getitem

import torch

from database.exported import FORMATS, announce_packed, exportable_levels, layer_bytes, other_bytes
from database.levels import LevelSwitcher, describe_levels, describe_whole, open_database
from database.sensitivity import estimate_alone
from database.store import Database
from utils import distributed, flags
from utils.allocation import allocate
from utils.configs import check_configuration_name, write_level_config
from utils.errors import RunError, user_errors
from utils.experts import ExpertLayer
from utils.files import check_writable
from utils.model import dtype_in, load_config
from utils.screening import AdditiveModel
from utils.search import Search
from utils.units import Unit, add_unit_flags, build_units, check_unit_flags, level_map, units_of

Candidate = tuple[float, ...]      # the bitwidth of every unit
RECOMMENDED = ["--init", "measured", "--screen", "4"]
FAILED_DRAWS = 200               # draws without a new candidate after which a generation makes do with fewer offspring


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_model_flags(parser, offload=True, compiled=True)
    flags.add_calibration_flags(parser, tokens=524288)
    space = parser.add_argument_group("search space")
    space.add_argument("--quant_weights_path", required=True, metavar="FOLDER",
                       help="database built by python -m database.gptq")
    space.add_argument("--target_bitwidth", type=float, metavar="BITS",
                       help="average bits a weight, never exceeded, e.g. 2.5")
    space.add_argument("--budget_file_gb", type=float, metavar="GB",
                       help="instead: at most of the file that export.py writes in --for_format, in 10^9 bytes")
    space.add_argument("--count_everything", action="store_true",
                       help="the target is that file's bits a parameter, with embeddings, head, norms and scales")
    space.add_argument("--count_overhead", action="store_true",
                       help="count scales and zeros towards the target, not the codes alone")
    space.add_argument("--for_format", choices=FORMATS,
                       help="leave out levels that export.py --format cannot hold as they are (default: all are "
                            "searched)")
    space.add_argument("--group_rule", choices=["size", "name", "none"], default="size",
                       help="bits move between layers of the same size, of the same name, or any (default: size)")
    space.add_argument("--step_size", type=int, default=1, metavar="BITS",
                       help="a switch goes to the next level at least this far away (default: 1)")
    add_unit_flags(space)
    space.add_argument("--level_cache_gb", type=float, default=24.0, metavar="GB",
                       help="packed levels kept on the device; the rest is read from disk (default: 24)")
    flags.add_search_flags(
        parser, generations=150, offspring=128, survivors=[16, 4, 1], tokens=[2048, 16384, 131072],
        init={"uniform": "the target everywhere, or where that is no candidate as random",
              "random": "the best of --initially_generated",
              "measured": "the best sum of errors, of each unit alone on --initial_tokens"},
        initially_generated=32, initial_tokens=2048, generations_help="default: 150",
        fitness=["kl", "ppl", "sparse_kl"])              # how each is measured: utils/fitness.py
    flags.add_evaluation_flags(parser)
    flags.add_output_flags(parser, "evo_quant").add_argument(
        "--configuration_name", metavar="NAME", help="of the result, in --output_dir and in the database (default: "
                                                     "evo-<fitness>-configuration-<target>.txt)")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


# ---- the search space ------------------------------------------------------------------------------------------------


class Space:
    """All candidates within the budget of bits, short of it by less than any legal single step up would cost."""

    def __init__(self, units: list[Unit], bits: list[dict[float, int]], groups: list[int], budget: int, step_size: int,
                 target: float = 0.0, other: int = 0):
        """`bits`: of every unit, level -> bits in total; `groups`: of every unit, the group within which bits move;
        `target`: bits that there are for a weight, on average; `other`: bits of the whole file that no level changes.
        """
        self.units = units
        self.bits = bits
        self.groups = groups
        self.budget = budget
        self.target = target
        self.other = other
        # levels a step up or down leads to: the nearest one at least step_size bits away, fractions of a bit aside
        self.up = [{level: min((l for l in unit.levels if l // 1 >= level // 1 + step_size), default=None)
                    for level in unit.levels} for unit in units]
        self.down = [{level: max((l for l in unit.levels if l // 1 <= level // 1 - step_size), default=None)
                      for level in unit.levels} for unit in units]
        self.step_costs = [{level: costs[above] - costs[level] for level, above in steps.items() if above is not None}
                           for costs, steps in zip(bits, self.up)]

    def total(self, candidate: Candidate) -> int:
        return sum(map(getitem, self.bits, candidate))

    def slack(self, candidate: Candidate) -> int:
        return self.budget - self.total(candidate)

    def raisable(self, candidate: Candidate, most: float) -> list[int]:
        """Units whose step up costs at most `most` bits."""
        return [i for i, (costs, level) in enumerate(zip(self.step_costs, candidate)) if level in costs
                and costs[level] <= most]

    def feasible(self, candidate: Candidate) -> bool:
        slack = self.slack(candidate)
        return (slack >= 0 and not self.raisable(candidate, slack)
                and all(level in unit.levels for unit, level in zip(self.units, candidate)))

    def levels(self, candidate: Candidate) -> dict[str, int]:
        """Bitwidth by layer name, in the units' order."""
        return {name: level for unit, level in zip(self.units, candidate) for name in unit.names}


def build_space(args: argparse.Namespace, database: Database, units: list[Unit],
                search: Search | None = None) -> Space:
    """Raises ValueError when the target is out of what the levels allow. Of the search, its model is counted where the
    budget is of a whole file; for any other it is not needed."""
    weights = [sum(math.prod(database.shape(name)) for name in unit.names) for unit in units]
    if whole_file(args):
        model, most = search.decoder.model, {name: unit.levels[-1] for unit in units for name in unit.names}
        other = 8 * other_bytes(model, search.tokenizer, dtype_in(search.config) or torch.float32, database, most,
                                args.for_format)
        bits = [{level: 8 * sum(layer_bytes(database, name, level, args.for_format) for name in unit.names)
                 for level in unit.levels} for unit in units]
        counted, how = sum(parameter.numel() for parameter in model.parameters()), "everything counted"
    else:
        other = 0
        bits = [{level: sum(database.bits(name, level, args.count_overhead) for name in unit.names)
                 for level in unit.levels} for unit in units]
        counted, how = sum(weights), "with scales and zeros" if args.count_overhead else "without scales and zeros"
    lowest, highest = (sum(pick(costs.values()) for costs in bits) + other for pick in (min, max))
    if args.budget_file_gb is None:
        budget = math.floor(args.target_bitwidth * counted + 1e-6)
        reason = (f"--target_bitwidth {args.target_bitwidth}: the levels that are left allow averages from "
                  f"{lowest / counted:.4g} to {highest / counted:.4g} ({how})")
    else:
        budget = 8 * math.floor(args.budget_file_gb * 10**9 + 1e-6)
        reason = (f"--budget_file_gb {args.budget_file_gb:g}: the levels that are left allow files from "
                  f"{lowest / 8e9:.6g} to {highest / 8e9:.6g} GB")
    if not lowest <= budget <= highest:
        raise ValueError(f"{reason}; choose one between, or other levels")
    budget -= other
    keys = [{"size": weight, "name": tuple(name.rpartition(".")[2] for name in unit.names),
             "none": None}[args.group_rule] for unit, weight in zip(units, weights)]
    return Space(units, bits, [keys.index(key) for key in keys], budget, args.step_size,
                 budget / sum(weights) if whole_file(args) else args.target_bitwidth, other)


def whole_file(args: argparse.Namespace) -> bool:
    """Whether the budget is of all that an export writes."""
    return args.count_everything or args.budget_file_gb is not None


# ---- start, mutation and selection -----------------------------------------------------------------------------------


def uniform_candidate(space: Space, target: float) -> Candidate | None:
    """The target everywhere, where it is a level of every unit and meets the budget."""
    uniform = tuple(level for unit in space.units for level in unit.levels if level == target)
    return uniform if len(uniform) == len(space.units) and space.feasible(uniform) else None


def random_candidate(space: Space, target: float, rng: random.Random) -> Candidate:
    """All units at the first level not below the target, then random ones lowered until the budget holds; where that
    would be the uniform candidate, as many random switches from it as there are units."""
    if uniform := uniform_candidate(space, target):
        return mutate(space, [uniform], 1, rng, fixed_mutations=len(space.units)) or uniform
    candidate = tuple(next((level for level in unit.levels if level >= target), unit.levels[-1])
                      for unit in space.units)
    while space.slack(candidate) < 0:        # every unit once before any a second time
        lowered = [i for i, level in enumerate(candidate) if space.down[i][level] is not None]
        if not lowered:                      # steps of several bits passed the cheapest levels by
            candidate = tuple(min(costs, key=costs.get) for costs in space.bits)
            break
        for i in rng.sample(lowered, len(lowered)):
            if space.slack(candidate) >= 0:
                break
            candidate = moved(candidate, i, space.down[i][candidate[i]])
    return fill_budget(space, candidate, rng)


def allocated_candidates(space: Space, estimates: list[list[dict[int, float]]], rng: random.Random) -> list[Candidate]:
    """The least sum of errors within the budget, for each estimate that can meet it. Of every unit it has level ->
    error, where levels that may not be taken are missing."""
    found = []
    for errors in estimates:
        with suppress(ValueError):
            found.append(fill_budget(space, tuple(allocate(errors, space.bits, space.budget)), rng))
    return found


def fill_budget(space: Space, candidate: Candidate, rng: random.Random) -> Candidate:
    """Raise random units for as long as bits are left that pay for a step."""
    while affordable := space.raisable(candidate, space.slack(candidate)):
        i = rng.choice(affordable)
        candidate = moved(candidate, i, space.up[i][candidate[i]])
    return candidate


def switch(space: Space, candidate: Candidate, rng: random.Random) -> Candidate | None:
    """Level-switch mutation: one unit a step up, others of its group, drawn at random, down until the budget holds.

    A group is chosen in proportion to its number of units. None where no group can give what a step up needs. Bits that
    lowering has left over pay for steps up of any units, since a candidate may not be short of what a step costs.
    """
    raisable = set(space.raisable(candidate, math.inf))
    units = rng.sample(range(len(space.units)), len(space.units))
    for group in dict.fromkeys(space.groups[i] for i in units):
        for raised in (i for i in units if i in raisable and space.groups[i] == group):
            child = moved(candidate, raised, space.up[raised][candidate[raised]])
            givers = [i for i, own in enumerate(space.groups) if own == group and i != raised]
            while space.slack(child) < 0:
                lowered = [i for i in givers if space.down[i][child[i]] is not None]
                if not lowered:
                    break
                i = rng.choice(lowered)
                child = moved(child, i, space.down[i][child[i]])
            else:
                return fill_budget(space, child, rng)
    return None


def moved(candidate: Candidate, index: int, level: float) -> Candidate:
    return (*candidate[:index], level, *candidate[index + 1:])


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
    if (args.target_bitwidth is None) == (args.budget_file_gb is None):
        raise ValueError(f"--target_bitwidth {args.target_bitwidth}, --budget_file_gb {args.budget_file_gb}: give one "
                         f"of the two")
    if args.budget_file_gb is not None and not 0 < args.budget_file_gb < math.inf:
        raise ValueError(f"--budget_file_gb {args.budget_file_gb}: a size in GB is needed, e.g. 4.5")
    if whole_file(args) and (not args.for_format or args.count_overhead):
        raise ValueError("--count_everything, --budget_file_gb: count a file that export.py writes, scales included; "
                         "name its --format with --for_format, and leave out --count_overhead")
    if args.target_bitwidth is not None and not 0 < args.target_bitwidth < math.inf:
        raise ValueError(f"--target_bitwidth {args.target_bitwidth}: an average in bits is needed, e.g. 2.5")
    if args.step_size < 1:
        raise ValueError(f"--step_size {args.step_size}: must be at least 1")
    budget = f"{args.budget_file_gb:g}gb" if args.target_bitwidth is None else f"{args.target_bitwidth:g}"
    args.configuration_name = args.configuration_name or f"evo-{args.fitness_fn}-configuration-{budget}.txt"
    check_configuration_name(args.configuration_name)


def first_candidates(args: argparse.Namespace, search: Search, space: Space, switcher: LevelSwitcher,
                     database: Database, predictor: AdditiveModel) -> list[Candidate]:
    """Candidates of which the best are the first parents, as --init says. Raises RunError where there is none."""
    uniform = uniform_candidate(space, space.target)
    if args.init == "measured":
        errors, within, measured = estimate_alone(search.fitness, switcher, database, space.units, space.target,
                                                  search.draw(args.initial_tokens))
        search.tokens += measured * args.initial_tokens
        if args.fitness_fn != "ppl":                         # errors are KL divergences
            predictor.expect(errors)
        allocated = (allocated_candidates(space, within, search.rng)
                     or allocated_candidates(space, [errors], search.rng))
        if not allocated and not uniform:
            raise RunError("--init measured: levels at which each layer's predictions are finite do not meet the "
                           "budget; use --init random, or another --dtype")
        return list(dict.fromkeys([*allocated, *filter(None, [uniform])]))
    if args.init == "uniform" and uniform:
        return [uniform]
    return draw_distinct(lambda: random_candidate(space, space.target, search.rng), args.initially_generated,
                         set())


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict:
    """Run the search of the flags, or resume it; returns what summary.json holds."""
    args = parse_arguments(argv)
    with user_errors():
        if args.search_tokens is None:                       # else once that has set the others
            check_flags(args)
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        database = open_database(args, "quant", config)
        levels = exportable_levels(database, args.for_format)
        units = units_of(levels, args)
        args = flags.spread_search_tokens(args, argv, make_parser(), check_flags, RECOMMENDED, 2 * len(units) + 1)
        if not whole_file(args):                             # else the model is needed to know what there may be
            build_space(args, database, units)
        search = Search("evo_quant", args, config, flags.flag_defaults(make_parser()))
        if search.run.finished:
            return search.earlier_summary(quant_weights_path=database.sha256)
        check_writable(args.quant_weights_path, "--quant_weights_path")     # a copy of the result goes there
        search.load(quant_weights_path=database.sha256)      # a run goes on only with the levels it was begun on
        switcher = LevelSwitcher(search.decoder, database, args.level_cache_gb)
        if whole_file(args) and any(isinstance(layer, ExpertLayer) for layer in search.decoder.layers.values()):
            raise ValueError("--count_everything, --budget_file_gb: a file has all of a mixture's experts in the width "
                             "of the widest, which cannot be counted layer by layer; give --target_bitwidth alone")
        announce_packed(search.decoder, database, args.for_format)
        space = build_space(args, database, build_units(switcher.names, levels, args), search)
    search.prepare(switcher.set_block, lambda candidate: switcher.states(space.levels(candidate)),
                   logged=lambda candidate: {"levels": candidate}, divergences=args.init == "measured")
    predictor = AdditiveModel([unit.levels for unit in space.units])     # of fitness, for --screen

    def measure(candidates: list[Candidate], num_tokens: int) -> list[tuple[float, Candidate]]:
        """(fitness, candidate), best first, on a minibatch of that many tokens."""
        values = search.measure(candidates, search.draw(num_tokens))
        ranked = sorted(zip(values, candidates), key=lambda pair: pair[0])
        predictor.observe(ranked, num_tokens)
        return ranked

    def state() -> dict:
        return {"model": predictor.state if args.screen > 1 else None}

    if not search.resumed:
        initial = first_candidates(args, search, space, switcher, database, predictor)
        search.begin(measure(initial, args.initial_tokens), **state())
    elif args.screen > 1:
        predictor.restore(search.saved["model"])
    print(f"budget: {describe(space, search.parents[0], database)}")

    steps = list(zip(args.survivors_per_selection, args.tokens_per_selection))
    # Algorithm 1: make offspring, keep the best of them in steps, each of fewer candidates on more tokens; they are the
    # next parents
    for _ in search.generations():
        offspring = draw_distinct(
            lambda: mutate(space, search.parents, args.max_mutations, search.rng, args.fixed_mutations),
            args.offspring * args.screen, set(search.parents))
        if not offspring:
            print("no other candidate meets the budget: nothing to search")
            break
        if args.screen > 1:
            offspring = predictor.screen(offspring, args.offspring, search.rng)
        survivors = select(offspring, search.parents, steps, measure, args.strategy)
        search.record(search.confirm(survivors), **state())

    # in the model's order of layers
    winner = {name: space.levels(search.parents[0])[name] for names in switcher.names for name in names}
    files = [folder / args.configuration_name for folder in (search.run.folder, database.path)]
    for file in files:
        write_level_config(file, winner)
    whole = describe_whole(search.decoder, config, database, winner)
    print(f"whole model: {whole}")
    search.evaluate("uniform" if search.start == uniform_candidate(space, space.target) else "measured start"
                    if args.init == "measured" else f"best of {args.initially_generated} random")
    return search.finish(describe(space, search.parents[0], database), *level_map(switcher.names, winner), "bits",
                         files, database=str(database.path), database_sha256=database.sha256,
                         levels=winner, whole_model=whole)


def describe(space: Space, candidate: Candidate, database: Database) -> str:
    """The budget as met, in words: bits counted in the database, not computed from the flags."""
    levels = space.levels(candidate)
    weights = sum(math.prod(database.shape(name)) for name in levels)
    if space.other:
        used, allowed = ((bits + space.other) // 8 for bits in (space.total(candidate), space.budget))
        return f"{describe_levels(database, levels)}, {used:,} bytes in all, budget {allowed:,}"
    return f"{describe_levels(database, levels)}, budget {space.budget / weights:.4f}"


if __name__ == "__main__":
    distributed.launch(main)
