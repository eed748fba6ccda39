"""Provable convergence: on linear fitness a search takes generations of the order of k(n - k) / λ (paper, section 3.2).

Each script's own mutation, drawing and selection run on synthetic landscapes without a model: n units of which k are
dropped (or a level higher than the rest), the fitness a sum of the units' weights, so that the best k are known. One
switch in k(n - k) leads from one wrong unit to none, so the order is also what the last step alone takes.
"""
import math
import random
from itertools import compress
from statistics import mean

import pytest

import evo_drop
import evo_quant
import evo_unstructured
from utils.units import Unit

K = 2
SEEDS = {16: 30, 32: 20, 64: 12, 128: 7, 256: 6}          # searches of each size: small ones are cheap, and noisy


def drop_space(n: int) -> evo_drop.Space:
    units = tuple(evo_drop.Unit("attn+mlp", ((i, 0), (i, 1)), 1, True) for i in range(n))
    return evo_drop.Space(units, {"attn+mlp": K})


def sparsity_space(n: int) -> evo_unstructured.Space:
    """n units at level 0 or 1, and one at -K, so that the budget has K units at level 1."""
    units = [Unit((f"layer{i}",), (0, 1)) for i in range(n)]
    return evo_unstructured.Space([*units, Unit(("fixed",), (-K,))])


def bit_space(n: int) -> evo_quant.Space:
    """n units of 2 or 3 bits, and a budget for K of 3 bits."""
    units = [Unit((f"layer{i}",), (2, 3)) for i in range(n)]
    return evo_quant.Space(units, [{2: 2, 3: 3}] * n, [0] * n, 2 * n + K, 1)


# script -> (its module, its space of n units, the candidate of a set of chosen units, the chosen ones as 0 and 1)
SCRIPTS = {
    "evo_drop": (evo_drop, drop_space, lambda n, chosen: tuple(i in chosen for i in range(n)), tuple),
    "evo_unstructured": (evo_unstructured, sparsity_space,
                         lambda n, chosen: (*(int(i in chosen) for i in range(n)), -K),
                         lambda candidate: candidate[:-1]),
    "evo_quant": (evo_quant, bit_space, lambda n, chosen: tuple(2 + (i in chosen) for i in range(n)),
                  lambda candidate: tuple(level - 2 for level in candidate)),
}


def generations(script: str, n: int, offspring: int, strategy: str, planted: bool, seed: int) -> int:
    """Generations until the best candidate is found. Starts at random, or in a planted local optimum: the K worst
    units, made better than all that is one switch away."""
    module, make_space, candidate_of, chosen_of = SCRIPTS[script]
    rng, space = random.Random(seed), make_space(n)
    weights = [rng.random() for _ in range(n)]
    order = sorted(range(n), key=weights.__getitem__)
    best, trap = candidate_of(n, order[:K]), candidate_of(n, order[-K:])
    bonus = weights[order[-1]] - weights[order[0]] if planted else 0

    def fitness(candidate) -> float:
        return sum(compress(weights, chosen_of(candidate))) - bonus * (candidate == trap)

    def measure(candidates, num_tokens):
        return sorted(((fitness(candidate), candidate) for candidate in candidates), key=lambda pair: pair[0])

    population = [trap if planted else candidate_of(n, rng.sample(range(n), K))]
    for generation in range(100 * K * (n - K)):
        if population == [best]:
            return generation
        drawn = module.draw_distinct(lambda: module.mutate(space, population, 2 if planted else 1, rng), offspring,
                                     set(population))
        assert all(map(space.feasible, drawn))
        survivors = module.select(drawn, population, [(2, 64), (1, 64)], measure, strategy)
        population = [candidate for _, candidate in survivors]
    pytest.fail(f"{n} units: not found in {generation} generations")


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the line through (log x, log y) with the least squares."""
    xs, ys = ([math.log(value) for value in values] for values in (xs, ys))
    center = sum(xs) / len(xs)
    return sum((x - center) * y for x, y in zip(xs, ys)) / sum((x - center)**2 for x in xs)


@pytest.mark.parametrize("planted", [False, True], ids=["linear", "local optimum"])
@pytest.mark.parametrize("strategy", ["plus", "comma"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_generations_grow_no_faster_than_k_times_n_minus_k_over_offspring(script, strategy, planted):
    # offspring alone survive: where none of them is an improvement one is lost, so there have to be many
    offspring = {n: 8 if strategy == "plus" else K * (n - K) // 2 for n in SEEDS}
    taken = [mean(generations(script, n, offspring[n], strategy, planted, seed) for seed in range(SEEDS[n]))
             for n in SEEDS]
    # generations against k(n - k) / λ: the same line as generations times λ against k(n - k), also where λ grows
    found = slope([K * (n - K) for n in SEEDS], [count * offspring[n] for n, count in zip(SEEDS, taken)])
    assert 0.5 < found < 1.1, f"slope {found:.2f}: {dict(zip(SEEDS, taken))} generations"
