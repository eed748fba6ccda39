"""The best levels under a budget when the errors of units add up: what baselines and measured starts solve.

A multiple-choice knapsack: every unit takes one level, the costs (bits, or steps of sparsity) add up to at most the
budget or to exactly it, and the sum of the errors is least.
"""
import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

STEEPEST = 4.0           # power of the layer error beyond what was measured: both are quadratic, which makes it about 1


def allocate(errors: Sequence[Mapping[int, float]], costs: Sequence[Mapping[int, int]], budget: int,
             exact: bool = False) -> list[int]:
    """The level of every unit; the least sum of errors at a total cost of at most `budget`, or with `exact` of it.

    errors: level -> error of every unit; only these levels may be taken, so bounds and pins are left to the caller, as
    are the sums over the layers of a tied unit. A level whose error is infinite is never taken. costs: level -> integer
    of any size or sign. Of solutions with equal errors the dearest counts, so where no error grows with its cost no
    level can be raised within what is left of the budget. The same input always gives the same levels.

    Dynamic programming over the totals that can still matter (Nemhauser & Ullmann, 1969): those that fit the budget
    and, without `exact`, that no total at least as cheap beats. Nothing is rounded. With costs that are multiples of
    something large, as layer sizes are, totals are few: the 224 layers of an 8B model at 5 bitwidths take 0.3 s and at
    most 3,329 totals on one core; layers of random sizes, the worst case, 8 s and 64,831; 17 levels of sparsity 0.4 s.
    Raises ValueError where no combination of levels meets the budget.
    """
    levels = [sorted(level for level in unit if unit[level] < math.inf) for unit in errors]
    if not all(levels):
        raise ValueError(f"unit {[bool(unit) for unit in levels].index(False)} has no level with a finite error")
    unit_costs = [np.array([cost[level] for level in unit], dtype=np.int64) for cost, unit in zip(costs, levels)]
    unit_errors = [np.array([error[level] for level in unit]) for error, unit in zip(errors, levels)]
    cheapest, dearest = ([int(pick(unit)) for unit in unit_costs] for pick in (np.min, np.max))

    total, error = np.zeros(1, dtype=np.int64), np.zeros(1)      # of every combination of the units so far that matters
    came_from: list[np.ndarray] = []                             # predecessor's index * levels + level's index
    for i in range(len(levels)):
        total = (total[:, None] + unit_costs[i]).ravel()
        error = (error[:, None] + unit_errors[i]).ravel()
        order = np.lexsort((error, total))                       # stable: of equal ones the lower level is first
        fits = total[order] + sum(cheapest[i + 1:]) <= budget
        if exact:
            fits &= total[order] + sum(dearest[i + 1:]) >= budget
        order = order[fits]
        total, error = total[order], error[order]
        matters = np.diff(total, prepend=total[:1] - 1) > 0      # the best of every total
        if not exact:
            matters &= error <= np.minimum.accumulate(error)
        total, error = total[matters], error[matters]
        came_from.append(order[matters])
        if not len(total):
            raise ValueError(f"no levels of the {len(levels)} units add up to {'exactly' if exact else 'at most'} "
                             f"{budget}; they cost from {sum(cheapest)} to {sum(dearest)}")

    best = int(np.lexsort((-total, error))[0])
    chosen = []
    for unit, predecessors in zip(reversed(levels), reversed(came_from)):
        best, level = divmod(int(predecessors[best]), len(unit))
        chosen.append(unit[level])
    return chosen[::-1]


def interpolate(measured: Mapping[int, float], layer_errors: Mapping[int, float]) -> dict[int, float]:
    """level -> error at every level of `layer_errors`, from what was measured at one or more of them.

    Both the divergence of the model and the output error of a layer are quadratic in a small change of its weights, so
    the one is taken to be a power of the other: between two measured levels, and beyond the outermost, the power that
    these two show; where only one was measured, the first. Where that has no logarithm, a straight line replaces it.
    What is measured is noisy, so a larger layer error never has the smaller divergence, and no power beyond the
    outermost levels is larger than STEEPEST.
    """
    points = sorted(measured, key=lambda level: (layer_errors[level], level))
    largest = accumulate((max(measured[point], 0.0) for point in points), max)
    measured = dict(zip(points, largest))
    estimates = {}
    for level, x in layer_errors.items():
        if level in measured:
            estimates[level] = measured[level]
            continue
        if len(points) == 1:
            (x0, y0), (x1, y1) = (0.0, 0.0), (layer_errors[points[0]], measured[points[0]])
        else:
            right = min(max(bisect([layer_errors[point] for point in points], x), 1), len(points) - 1)
            (x0, y0), (x1, y1) = ((layer_errors[point], measured[point]) for point in points[right - 1:right + 1])
        if min(x, x0, y0, x1, y1) > 0 and x0 != x1:
            distance, power = math.log(x1 / x0), math.log(y1 / y0) / math.log(x1 / x0)
            inside = 0 <= math.log(x / x0) / distance <= 1
            estimates[level] = y0 * (x / x0) ** (power if inside else min(power, STEEPEST))
        else:
            estimates[level] = max(0.0, y0 + (y1 - y0) * ((x - x0) / (x1 - x0) if x0 != x1 else 0.5))
    return estimates
