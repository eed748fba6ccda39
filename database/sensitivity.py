"""How sensitive the model is to each unit of layers: its KL divergence with that unit alone compressed."""
import math
import time
from collections.abc import Sequence

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
                   target: float, minibatch: Row) -> tuple[list[dict[int, float]], int]:
    """(of every unit, level -> KL divergence with it alone at that level; number of candidates that were measured).

    Two levels of a unit are measured, the most compressed one and of the others that nearest to `target`; the rest
    follows what the database says of the unit's layers. Units that have one level have no error. Where predictions are
    not finite the error is infinite; raises RunError when they are at neither level.
    """
    shapes = [layer_errors(database, unit.names, unit.levels) for unit in units]
    levels: list[list[int]] = []
    for unit, shape in zip(units, shapes):
        worst = max(unit.levels, key=shape.get)
        nearest = min((level for level in unit.levels if level != worst), key=lambda level: abs(level - target),
                      default=None)
        levels.append([worst, nearest] if nearest is not None else [])
    alone = measure_alone(fitness, switcher, [unit.names for unit in units], levels, minibatch)
    estimates = []
    for unit, errors, shape in zip(units, alone, shapes):
        finite = {level: error for level, error in errors.items() if math.isfinite(error)}
        if errors and not finite:
            raise RunError(f"{unit.names[0]}: the model's predictions are not finite with it alone at levels "
                           f"{' and '.join(map(str, errors))}; hold it at another level with --bounds")
        estimates.append(interpolate(finite, shape) | errors if errors else {unit.levels[0]: 0.0})
    return estimates, sum(map(len, levels))
