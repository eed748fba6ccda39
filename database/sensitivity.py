"""How sensitive the model is to each unit of layers: its KL divergence with that unit alone compressed."""
import math
import time
from collections.abc import Mapping, Sequence

from database.levels import LevelSwitcher
from database.store import Database
from utils.allocation import interpolate
from utils.fitness import Fitness, Row
from utils.runs import RunError
from utils.units import Unit


def measure_alone(fitness: Fitness, switcher: LevelSwitcher, units: Sequence[Sequence[str]],
                  levels: Sequence[Sequence[int]], minibatch: Row | None = None) -> list[dict[int, float]]:
    """level -> KL divergence, in nats a token, of the model in which one unit is at that level and all else
    uncompressed, for each of a unit's `levels`.

    units: names of the layers that change level together, which are in one block. `fitness` switches by `switcher`,
    and the model is uncompressed before and after. Candidates that share what is before their unit's block share its
    walk, so one costs half a forward pass on average. minibatch: by default all documents of `fitness`.
    """
    block_of = {name: index for index, names in enumerate(switcher.names) for name in names}
    uncompressed = {name: None for name in block_of}
    errors: list[dict[int, float]] = [{} for _ in units]
    began = shown = time.time()
    with switcher.restorable():
        for index in range(len(switcher.names)):
            alone = [(i, level) for i, names in enumerate(units) for level in levels[i] if block_of[names[0]] == index]
            if not alone:
                continue
            candidates = [switcher.states(uncompressed | dict.fromkeys(units[i], level)) for i, level in alone]
            for (i, level), (value,) in zip(alone, fitness.measure(candidates, minibatch)):
                errors[i][level] = value
            if time.time() - shown > 10:
                shown = time.time()
                print(f"measuring units alone: block {index + 1} of {len(switcher.names)}, "
                      f"{(shown - began) / (index + 1) * (len(switcher.names) - index - 1):.0f} s left", flush=True)
    fitness.decoder.states[:] = [None] * len(fitness.decoder.states)
    return errors


def layer_errors(database: Database, names: Sequence[str], levels: Sequence[int]) -> dict[int, float]:
    """level -> sum of the layers' relative output errors, as the database was built; costs no tokens."""
    return {level: sum(database.error(name, level) for name in names) for level in levels}


def estimate_alone(fitness: Fitness, switcher: LevelSwitcher, database: Database, units: Sequence[Unit],
                   target: float, minibatch: Row) -> tuple[list[dict[int, float]], list[dict[int, float]], int]:
    """(of every unit, level -> KL divergence with it alone at that level; the same of levels not more compressed than
    any that was measured; number of candidates that were measured).

    Two levels of a unit are measured, half-way from `target` to its most and to its least compressed one; the others
    follow what the database says of the unit's layers. Units that have one level have no error. Where predictions are
    not finite the error is infinite; raises RunError when they are at neither level.
    """
    shapes = [layer_errors(database, unit.names, unit.levels) for unit in units]
    levels = [halfway_levels(unit.levels, shape, target) for unit, shape in zip(units, shapes)]
    alone = measure_alone(fitness, switcher, [unit.names for unit in units], levels, minibatch)
    estimates, within = [], []
    for unit, errors, shape in zip(units, alone, shapes):
        finite = {level: error for level, error in errors.items() if math.isfinite(error)}
        if errors and not finite:
            raise RunError(f"{unit.names[0]}: the model's predictions are not finite with it alone at levels "
                           f"{' and '.join(map(str, errors))}; hold it at another level with --bounds")
        estimates.append(interpolate(finite, shape) | errors if errors else dict.fromkeys(unit.levels, 0.0))
        most = max((shape[level] for level in finite), default=math.inf)
        within.append({level: error for level, error in estimates[-1].items() if shape[level] <= most})
    return estimates, within, sum(map(len, levels))


def halfway_levels(levels: Sequence[int], errors: Mapping[int, float], target: float) -> list[int]:
    """Of the levels more and of those less compressed than `target` the middle ones, nearer to it where there are two;
    where a side has none, of the others the nearest. None where there is no choice. errors: level -> layers' errors."""
    worst, best = max(levels, key=errors.get), min(levels, key=errors.get)
    if len(levels) < 2 or worst == best:
        return []
    outward = sorted(levels, key=lambda level: abs(level - target))
    sides = [[level for level in outward if (level - target) * (end - other) > 0]
             for end, other in ((worst, best), (best, worst))]
    middles = [side[(len(side) - 1) // 2] for side in sides if side]
    return sorted([*middles, *(level for level in outward if level not in middles)][:2])
