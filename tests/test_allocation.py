"""The allocation solver against enumeration of all combinations of levels."""
import itertools
import math
import random

import pytest

from utils.allocation import allocate, interpolate


def enumerate_best(errors, costs, budget, exact):
    """Least error, then highest cost, over all combinations; None where none meets the budget."""
    best = None
    for levels in itertools.product(*[[level for level in unit if unit[level] < math.inf] for unit in errors]):
        cost = sum(unit[level] for unit, level in zip(costs, levels))
        if cost == budget if exact else cost <= budget:
            key = sum(unit[level] for unit, level in zip(errors, levels)), -cost
            best = key if best is None else min(best, key)
    return best


def solve(errors, costs, budget, exact):
    """What `allocate` finds, as `enumerate_best` has it."""
    try:
        levels = allocate(errors, costs, budget, exact)
    except ValueError:
        return None
    return (sum(unit[level] for unit, level in zip(errors, levels)),
            -sum(unit[level] for unit, level in zip(costs, levels)))


def random_instance(rng):
    """Bits or sparsity steps of a few layers; sizes equal, multiples of each other, or anything; errors whole numbers
    (exact sums, many ties), mostly falling with the cost, sometimes infinite."""
    bits = rng.random() < 0.5
    sizes = [rng.choice([[1], [1, 4, 14], range(1, 100)][rng.randrange(3)]) for _ in range(rng.randint(1, 6))]
    errors, costs = [], []
    for size in sizes:
        levels = rng.sample([2, 3, 4, 5, 6] if bits else [-2, -1, 0, 1, 2], rng.randint(1, 5))
        sign = -1 if bits else 1
        errors.append({level: math.inf if rng.random() < 0.05 else size * (7 + sign * level) + rng.randrange(6)
                       for level in levels})
        costs.append({level: level * size for level in levels})
    target = rng.uniform(1.8, 6.2) if bits else rng.choice([0, 0, rng.uniform(-2.2, 2.2)])
    return errors, costs, math.floor(target * sum(sizes)), rng.random() < (0.2 if bits else 0.8)


def test_finds_the_best_of_all_combinations_on_1000_random_instances():
    rng = random.Random(0)
    infeasible = {False: 0, True: 0}
    for _ in range(1000):
        errors, costs, budget, exact = random_instance(rng)
        expected = enumerate_best(errors, costs, budget, exact)
        infeasible[exact] += expected is None
        assert solve(errors, costs, budget, exact) == expected, (errors, costs, budget, exact)
    assert 20 < infeasible[False] < 300 and 20 < infeasible[True] < 500     # both outcomes are put to the test


def test_finds_the_best_with_errors_that_are_not_whole_numbers():
    rng = random.Random(1)
    for _ in range(100):
        sizes = [rng.randint(1, 50) for _ in range(5)]
        errors = [{bits: size * 4.0**-bits * rng.lognormvariate(0, 0.5) for bits in (2, 3, 4)} for size in sizes]
        costs = [{bits: bits * size for bits in (2, 3, 4)} for size in sizes]
        budget = math.floor(rng.uniform(2, 4) * sum(sizes))
        assert solve(errors, costs, budget, False)[0] == pytest.approx(enumerate_best(errors, costs, budget, False)[0])


def test_no_level_can_be_raised_within_the_budget_where_errors_fall_with_cost():
    rng = random.Random(2)
    for _ in range(20):
        sizes = [rng.randint(1, 1000) for _ in range(15)]
        # a third of the layers does not mind its bitwidth at all: even there bits are not left unspent
        errors = [{bits: size * 4.0**-bits if i % 3 else 0.0 for bits in range(2, 7)} for i, size in enumerate(sizes)]
        costs = [{bits: bits * size for bits in range(2, 7)} for size in sizes]
        budget = math.floor(rng.uniform(2, 6) * sum(sizes))
        levels = allocate(errors, costs, budget)
        left = budget - sum(bits * size for bits, size in zip(levels, sizes))
        assert 0 <= left < min(size for bits, size in zip(levels, sizes) if bits < 6)


def test_model_sized_instances_meet_the_budget():
    """224 layers of the shapes of an 8B model: bits at most the budget, sparsity steps exactly it."""
    rng = random.Random(3)
    sizes = [m * 2**22 for m in (4, 1, 1, 4, 14, 14, 14)] * 32
    errors = [{bits: size * 4.0**-bits * rng.lognormvariate(0, 1) for bits in range(2, 7)} for size in sizes]
    costs = [{bits: bits * size for bits in range(2, 7)} for size in sizes]
    budget = math.floor(2.3 * sum(sizes))
    levels = allocate(errors, costs, budget)
    assert 0 <= budget - sum(bits * size for bits, size in zip(levels, sizes)) < 2**22
    assert levels == allocate(errors, costs, budget)

    errors = [{level: rng.lognormvariate(0, 1) * 1.3**level for level in range(-8, 9)} for _ in sizes]
    steps = [{level: level for level in range(-8, 9)}] * len(sizes)
    assert sum(allocate(errors, steps, 0, exact=True)) == 0
    assert sum(allocate(errors, steps, 101, exact=True)) == 101


def test_an_impossible_budget_is_named_with_what_is_possible():
    errors, costs = [{2: 1.0, 4: 0.5}] * 3, [{2: 200, 4: 400}] * 3
    with pytest.raises(ValueError, match="at most 599; they cost from 600 to 1200"):
        allocate(errors, costs, 599)
    with pytest.raises(ValueError, match="exactly 700; they cost from 600 to 1200"):
        allocate(errors, costs, 700, exact=True)
    with pytest.raises(ValueError, match="unit 1 has no level with a finite error"):
        allocate([{2: 1.0}, {2: math.inf}], [{2: 2}, {2: 2}], 10)


def test_interpolation_is_exact_for_divergences_that_are_a_power_of_the_layer_error():
    layer_errors = {level: 0.2 * 1.7**level + 0.01 * level**2 for level in range(-8, 9)}
    truth = {level: 3 * error**1.3 for level, error in layer_errors.items()}
    measured = {level: truth[level] for level in (-6, 0, 8)}
    assert interpolate(measured, layer_errors) == pytest.approx(truth)      # -8 and -7 lie beyond what is measured
    proportional = {level: 3 * error for level, error in layer_errors.items()}
    assert interpolate({8: proportional[8]}, layer_errors) == pytest.approx(proportional)


def test_interpolation_without_a_logarithm_is_a_straight_line():
    assert interpolate({2: 0.4, 4: 0.0}, {2: 8.0, 3: 2.0, 4: 0.0}) == {2: 0.4, 3: pytest.approx(0.1), 4: 0.0}
    assert interpolate({2: 0.4}, {2: 8.0, 3: 2.0, 4: 0.0}) == {2: 0.4, 3: pytest.approx(0.1), 4: 0.0}
    assert interpolate({2: -0.4, 3: 0.2}, {2: 1.0, 3: 1.0, 4: 1.0})[4] == pytest.approx(0.1)
    noisy = interpolate({-4: 0.10, 4: 0.09}, {-8: 0.1, -4: 0.1001, 0: 0.1002, 4: 0.1003, 8: 0.2})
    assert all(0.09 <= error <= 0.11 for error in noisy.values())        # not the most compressed level for nothing
    steep = interpolate({1: 1.0, 2: 5.0}, {1: 0.1, 2: 0.1001, 3: 1.0})
    assert steep[1] == 1.0 and steep[2] == 5.0 and 5.0 < steep[3] <= 5.0 * 10**4
    assert interpolate({3: 0.1}, {3: 0.0}) == {3: 0.1}
