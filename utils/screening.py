"""A model of fitness in which the levels of units add up: it ranks offspring before any token is spent on them."""
import math
import random
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from utils.distributed import from_main

Candidate = tuple[Hashable, ...]     # the level of every unit
WINDOW = 1024                        # latest measurements it is fitted to: errors change as the search moves
RANDOM_SHARE = 4                     # one in four of those kept is drawn at random, so that a wrong model misleads less
LEAST_SCALE = 0.1                    # how far an effect may stray at least, of how far they may on average
RIDGES = 10.0 ** np.arange(-4, 1.5, 0.5)    # of the largest eigenvalue


class AdditiveModel:
    """Fitness as a sum of one effect for the level of each unit, up to what all candidates on a minibatch share.

    The effects start from errors of units measured alone, and are fitted to every candidate that is measured: ridge
    regression towards them, on differences between candidates on the same tokens, which is where the parent and
    its offspring can be compared. The ridge is the one with the least leave-one-out error.
    """

    def __init__(self, levels: Sequence[Sequence[Hashable]]):
        """levels: that each unit may take."""
        columns = iter(range(sum(map(len, levels))))
        self._columns = [{level: next(columns) for level in unit} for unit in levels]
        self._expected = np.zeros(sum(map(len, levels)))     # effects before anything is measured, [columns]
        self._measured: list[tuple[int, int, float, Candidate]] = []     # (minibatch, its tokens, fitness, candidate)
        self._effects: np.ndarray | None = None

    def expect(self, errors: Sequence[Mapping[Hashable, float]]) -> None:
        """Start from errors: of every unit, level -> error of the unit alone at that level."""
        expected = np.array([unit[level] for unit, columns in zip(errors, self._columns) for level in columns])
        finite = np.isfinite(expected)
        self._expected = np.where(finite, expected, expected[finite].max(initial=0.0))
        self._effects = None

    @property
    def state(self) -> dict:
        """What JSON can hold and `restore` takes."""
        return {"expected": self._expected.tolist(), "measured": self._measured}

    def restore(self, state: dict) -> None:
        self._expected = np.array(state["expected"])
        self._measured = [(step, tokens, fitness, tuple(candidate)) for step, tokens, fitness, candidate in
                          state["measured"]]
        self._effects = None

    def observe(self, ranked: Sequence[tuple[float, Candidate]], tokens: int) -> None:
        """Learn from (fitness, candidate) pairs that were measured on one minibatch of that many tokens."""
        step = self._measured[-1][0] + 1 if self._measured else 0
        self._measured += [(step, tokens, fitness, candidate) for fitness, candidate in ranked
                           if math.isfinite(fitness)]
        del self._measured[:-WINDOW]
        self._effects = None

    def predict(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """[candidates] fitness, up to a constant."""
        if self._effects is None:
            self._effects = self._fit()
        return self._effects[self._indices(candidates)].sum(axis=1)

    def screen(self, candidates: list[Candidate], count: int, rng: random.Random) -> list[Candidate]:
        """`count` of the candidates: those predicted best, and a share of the others drawn at random."""
        order = [candidates[i] for i in np.argsort(self.predict(candidates), kind="stable")]
        best = order[:count - count // RANDOM_SHARE]
        others = order[len(best):]
        return best + rng.sample(others, min(count - len(best), len(others)))

    def _indices(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """[candidates, units] column of every unit's level."""
        return np.array([[columns[level] for columns, level in zip(self._columns, candidate)]
                         for candidate in candidates])

    @from_main                                               # processors differ in the last digit, searches may not
    def _fit(self) -> np.ndarray:
        """[columns] effects."""
        if not self._measured:
            return self._expected
        steps, tokens, fitness, candidates = zip(*self._measured)
        indices = self._indices(candidates)
        scale = np.abs(self._expected)                                       # how far effects may stray, ...
        scale = np.maximum(scale, LEAST_SCALE * scale.mean()) if scale.any() else 1.0    # ... also those expected at 0
        levels = np.zeros((len(indices), len(self._expected)))
        np.put_along_axis(levels, indices, 1.0, axis=1)
        unexplained = np.array(fitness) - levels @ self._expected
        levels *= scale
        for step in sorted(set(steps)):
            same = np.array(steps) == step
            levels[same] -= levels[same].mean(axis=0)
            unexplained[same] -= unexplained[same].mean()
        weight = np.sqrt(np.array(tokens) / max(tokens))             # a mean over n tokens has a variance of 1/n
        levels, unexplained = levels * weight[:, None], unexplained * weight
        # of levels @ levels.T [measured, measured]; the cheaper way where features are fewer
        if levels.shape[1] < len(levels):
            eigenvalues, features = np.linalg.eigh(levels.T @ levels)
            kept = eigenvalues > np.finfo(float).eps * len(levels) * eigenvalues[-1]
            eigenvalues = eigenvalues[kept]
            vectors = levels @ features[:, kept] / np.sqrt(eigenvalues)
        else:
            eigenvalues, vectors = np.linalg.eigh(levels @ levels.T)
        if not eigenvalues.max(initial=0.0) > 0:
            return self._expected
        rotated, best = vectors.T @ unexplained, (math.inf, None)
        for ridge in RIDGES * eigenvalues[-1]:
            shrunk = 1 / (np.maximum(eigenvalues, 0) + ridge) - 1 / ridge    # beyond the eigenvectors it is 1 / ridge
            dual = unexplained / ridge + vectors @ (shrunk * rotated)
            left_out = dual / (1 / ridge + vectors**2 @ shrunk)              # residual of each with the others fitted
            best = min(best, (float(left_out @ left_out), dual), key=lambda pair: pair[0])
        return self._expected + scale * (levels.T @ best[1])
