"""How sensitive the model is to each unit of layers: its KL divergence with that unit alone compressed."""
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from database.levels import LevelSwitcher
from database.store import Database
from utils.allocation import interpolate
from utils.errors import RunError
from utils.fitness import Fitness, Row
from utils.units import Unit

REACH = 2                # levels to either side that `estimate_around` measures
REFINE_TOKENS = 2        # for `estimate_around`, in those for `estimate_alone`: its changes are smaller


def measure_alone(fitness: Fitness, switcher: LevelSwitcher, units: Sequence[Sequence[str]],
                  levels: Sequence[Sequence[int]], minibatch: Row | None = None,
                  others: Mapping[str, int] | None = None) -> list[dict[int, float]]:
    """level -> KL divergence, in nats a token, of the model in which one unit is at that level and all else at
    `others`, or uncompressed, for each of a unit's `levels`.

    units: names of the layers that change level together, which are in one block. `fitness` switches by `switcher`.
    others: level by layer name; without it, the model is uncompressed before and after. Candidates that share what is
    before their unit's block share its walk, so one costs half a forward pass on average. minibatch: by default all
    documents of `fitness`.
    """
    block_of = {name: index for index, names in enumerate(switcher.names) for name in names}
    base = others or dict.fromkeys(block_of)
    errors: list[dict[int, float]] = [{} for _ in units]
    began = shown = time.time()
    with nullcontext() if others else switcher.restorable():
        for index in range(len(switcher.names)):
            alone = [(i, level) for i, names in enumerate(units) for level in levels[i] if block_of[names[0]] == index]
            if not alone:
                continue
            candidates = [switcher.states(base | dict.fromkeys(units[i], level)) for i, level in alone]
            for (i, level), (value,) in zip(alone, fitness.measure(candidates, minibatch)):
                errors[i][level] = value
            if time.time() - shown > 10:
                shown = time.time()
                print(f"measuring units one by one: block {index + 1} of {len(switcher.names)}, "
                      f"{(shown - began) / (index + 1) * (len(switcher.names) - index - 1):.0f} s left", flush=True)
    if not others:
        fitness.decoder.states[:] = [None] * len(fitness.decoder.states)
    return errors


def layer_errors(database: Database, names: Sequence[str], levels: Sequence[int]) -> dict[int, float]:
    """level -> sum of the layers' relative output errors, as the database was built; costs no tokens."""
    return {level: sum(database.error(name, level) for name in names) for level in levels}


def estimate_alone(fitness: Fitness, switcher: LevelSwitcher, database: Database, units: Sequence[Unit],
                   target: float, minibatch: Row
                   ) -> tuple[list[dict[int, float]], list[list[dict[int, float]]], int]:
    """(of every unit, level -> KL divergence with it alone at that level; the same within reach, narrowest first;
    number of candidates that were measured).

    Two levels of a unit are measured, half-way from `target` to its most and to its least compressed one; the others
    follow what the database says of the unit's layers. Units that have one level have no error. Where predictions are
    not finite the error is infinite; raises RunError when they are at neither level. Within reach is no level more
    compressed than the first one beyond `target`, than the second, the fourth and so on, and never than all that were
    measured: the more layers are compressed far beyond the target, the less their divergences add up.
    """
    shapes = [layer_errors(database, unit.names, unit.levels) for unit in units]
    levels = [halfway_levels(unit.levels, shape, target) for unit, shape in zip(units, shapes)]
    alone = measure_alone(fitness, switcher, [unit.names for unit in units], levels, minibatch)
    if fitness.decoder.dtype.itemsize == 2:
        block_of = {name: index for index, names in enumerate(switcher.names) for name in names}
        alone = without_rounding(alone, shapes, [block_of[unit.names[0]] for unit in units])
    estimates, beyond = [], []
    for unit, errors, shape in zip(units, alone, shapes):
        finite = {level: error for level, error in errors.items() if math.isfinite(error)}
        if errors and not finite:
            raise RunError(f"{unit.names[0]}: the model's predictions are not finite with it alone at levels "
                           f"{' and '.join(map(str, errors))}; hold it at another level with --bounds")
        infinite = dict.fromkeys(errors.keys() - finite.keys(), math.inf)
        estimates.append(interpolate(finite, shape) | infinite if errors else dict.fromkeys(unit.levels, 0.0))
        most = max(map(shape.get, finite), default=math.inf)
        more, _ = sides(unit.levels, shape, target)
        beyond.append((more, [level for level in more if shape[level] <= most]))
    widest = max(1, *(len(near) for _, near in beyond))
    within = [[{level: error for level, error in known.items() if level in near[:width] or level not in more}
               for known, (more, near) in zip(estimates, beyond)]
              for width in (2**k for k in range((widest - 1).bit_length() + 1))]
    return estimates, within, sum(map(len, levels))


def without_rounding(alone: Sequence[Mapping[int, float]], shapes: Sequence[Mapping[int, float]], blocks: Sequence[int]
                     ) -> list[dict[int, float]]:
    """level -> KL divergence of every unit alone, without what half precision adds to it.

    Whatever changes in a block, all numbers after it are rounded otherwise, which has a divergence of its own: one that
    hardly depends on the change, but on how many blocks follow, and that exceeds what a harmless level does by itself
    (SmolLM2-135M in bfloat16: 0.0016 for its first block, 0.0006 for its last; 3 bits in one layer: 0.0001 to 0.01).
    Taken off is what, in the unit of a block of which it is least, stays where the layer error goes to 0. shapes: level
    -> layer error; blocks: of every unit.
    """
    added: dict[int, float] = {}
    for errors, shape, block in zip(alone, shapes, blocks):
        points = sorted((shape[level], error) for level, error in errors.items() if math.isfinite(error))
        if len(points) > 1 and points[-1][0] > points[0][0]:
            (x0, y0), (x1, y1) = points[0], points[-1]
            added[block] = min(added.get(block, math.inf), max(0.0, (x1 * y0 - x0 * y1) / (x1 - x0)))
    return [{level: max(0.0, error - added.get(block, 0.0)) for level, error in errors.items()}
            for errors, block in zip(alone, blocks)]


def estimate_around(fitness: Fitness, switcher: LevelSwitcher, database: Database, units: Sequence[Unit],
                    candidate: tuple[int, ...], minibatch: Row
                    ) -> tuple[list[dict[int, float]], list[tuple[float, tuple[int, ...]]]]:
    """(of every unit, level -> change of the KL divergence, in nats a token, when it goes from its level in `candidate`
    to that one and all others stay; (divergence, candidate) of all that were measured).

    Of each unit there are its own level, with 0, and the next one to either side. One level is measured, REACH above
    its own or as far as there are any, since a larger change stands out more from the noise; where there is none above,
    below. Both sides follow from it by the layers' errors in the database: that is as good as a measurement of each
    side on half of the tokens. More error is never taken to be better. What is not finite is infinite.
    """
    levels = [sorted(unit.levels) for unit in units]
    places = [known.index(level) for known, level in zip(levels, candidate)]
    ends = [known[place + 1:][:REACH][-1:] or known[:place][-REACH:][:1] for known, place in zip(levels, places)]
    others = {name: level for unit, level in zip(units, candidate) for name in unit.names}
    [(before,)] = fitness.measure([switcher.states(others)], minibatch)
    values = measure_alone(fitness, switcher, [unit.names for unit in units], ends, minibatch, others)
    changes, measured = [], [(before, candidate)]
    for i, (unit, known, place) in enumerate(zip(units, levels, places)):
        own, shape = known[place], layer_errors(database, unit.names, known)
        change = {own: 0.0}
        for end, value in values[i].items():
            measured.append((value, (*candidate[:i], end, *candidate[i + 1:])))
            whole = shape[end] - shape[own]
            slope = max((value - before) / whole, 0.0) if whole else 0.0
            for near in [*known[:place][-1:], *known[place + 1:][:1]]:
                if math.isfinite(value):
                    change[near] = slope * (shape[near] - shape[own])
                else:
                    change[near] = math.inf if (near > own) == (end > own) else 0.0
        changes.append(change)
    return changes, measured


def halfway_levels(levels: Sequence[int], errors: Mapping[int, float], target: float) -> list[int]:
    """Of the levels more and of those less compressed than `target` the middle ones, nearer to it where there are two;
    where a side has none, of the others the nearest. None where there is no choice. errors: level -> layers' errors."""
    if len(levels) < 2 or len(set(errors.values())) < 2:
        return []
    middles = [side[(len(side) - 1) // 2] for side in sides(levels, errors, target) if side]
    outward = sorted(levels, key=lambda level: abs(level - target))
    return sorted([*middles, *(level for level in outward if level not in middles)][:2])


def sides(levels: Sequence[int], errors: Mapping[int, float], target: float) -> tuple[list[int], list[int]]:
    """The levels more and those less compressed than `target`, each from it outward."""
    up = 1 if errors[max(levels)] >= errors[min(levels)] else -1         # where compression grows
    outward = sorted(levels, key=lambda level: abs(level - target))
    more, less = ([level for level in outward if (level - target) * sign > 0] for sign in (up, -up))
    return more, less
