"""A model of fitness in which the levels of units add up, or pairs of them: it ranks offspring before any token is
spent on them."""
import math
import random
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from utils.distributed import from_main
from utils.interactions import Candidate, Columns, quadratic

WINDOW = 1024                        # latest measurements it is fitted to: errors change as the search moves
RANDOM_SHARE = 4                     # one in four of those kept is drawn at random, so that a wrong model misleads less
LEAST_SCALE = 0.1                    # how far an effect may stray at least, of how far they may on average
TRUSTED = 4                          # generations whose rank correlations make up how far a model of pairs is trusted
LEAST_TRUST = 0.2                    # below which it is not
RIDGES = 10.0 ** np.arange(-4, 1.5, 0.5)    # of the largest eigenvalue


class AdditiveModel:
    """Fitness as a sum of one effect for the level of each unit, up to what all candidates on a minibatch share.

    The effects start from errors of units measured alone, and are fitted to every candidate that is measured: ridge
    regression towards them, on differences between candidates on the same tokens, which is where the parent and
    its offspring can be compared. The ridge is the one with the least leave-one-out error.

    With pairs (`expect_pairs`), only what they leave unexplained is fitted, and the model is trusted as far as it ranks
    offspring like the measurements after it.
    """

    def __init__(self, levels: Sequence[Sequence[Hashable]]):
        """levels: that each unit may take."""
        self.columns = Columns(levels)
        self._expected = np.zeros(len(self.columns))         # effects before anything is measured, [columns]
        self.pairs: np.ndarray | None = None                 # of two levels beyond the effects, [columns, columns]
        self._pair_tokens = 0                                # that they were measured on
        self.center: Candidate | None = None                 # around which they were measured last
        self.correlations: list[float] = []                  # of predicted and measured offspring, latest last
        self._drawn: set[Candidate] = set()                  # offspring that are to be measured first
        self._measured: list[tuple[int, int, float, Candidate]] = []     # (minibatch, its tokens, fitness, candidate)
        self._effects: np.ndarray | None = None

    def expect(self, errors: Sequence[Mapping[Hashable, float]]) -> None:
        """Start from errors: of every unit, level -> error of the unit alone at that level."""
        expected = np.array([errors[unit][level] for unit, level in zip(self.columns.unit, self.columns.level)])
        finite = np.isfinite(expected)
        self._expected = np.where(finite, expected, expected[finite].max(initial=0.0))
        self._effects = None

    def expect_pairs(self, effects: np.ndarray, pairs: np.ndarray, center: Candidate, tokens: int) -> None:
        """Start from effects [columns] and pairs [columns, columns] measured around `center` on that many tokens; from
        their mean with what was measured around others before. Trust begins anew."""
        finite = np.isfinite(effects)
        effects = np.where(finite, effects, effects[finite].max(initial=0.0))
        if self.pairs is not None:
            share = tokens / (tokens + self._pair_tokens)
            effects = self._expected + share * (effects - self._expected)
            pairs = self.pairs + share * (pairs - self.pairs)
        self._expected, self.pairs, self.center = effects, pairs, center
        self._pair_tokens, self.correlations, self._effects = self._pair_tokens + tokens, [], None

    @property
    def trust(self) -> float | None:
        """Mean rank correlation of predicted and measured fitness in the latest generations; None before that many."""
        latest = self.correlations[-TRUSTED:]
        return sum(latest) / TRUSTED if len(latest) == TRUSTED else None

    def reconsider(self, ranked: list[tuple[float, Candidate]], tied: Sequence[bool]) -> list[tuple[float, Candidate]]:
        """(fitness, candidate) pairs, of which those that are `tied` with the first come in the order of their fitness
        and what is predicted from all measurements, half and half; as they are where pairs are not trusted."""
        first = [pair for pair, is_tied in zip(ranked, tied) if is_tied]
        if len(first) < 2 or self.pairs is None or not self._trusted:
            return ranked
        fitness, candidates = zip(*first)
        order = np.argsort(self.predict(candidates) + fitness, kind="stable")
        return [first[i] for i in order] + [pair for pair in ranked if pair not in first]

    def astray(self, parent: Candidate) -> bool:
        """Whether pairs are not trusted, and better ones could be measured around the parent."""
        return self.pairs is not None and not self._trusted and parent != self.center

    @property
    def _trusted(self) -> bool:
        return self.trust is None or self.trust >= LEAST_TRUST

    @property
    def state(self) -> dict:
        """What JSON can hold and `restore` takes."""
        state = {"expected": self._expected.tolist(), "measured": self._measured}
        return state if self.pairs is None else state | {
            "pairs": self.pairs.tolist(), "pair_tokens": self._pair_tokens, "center": self.center,
            "correlations": self.correlations}

    def restore(self, state: dict) -> None:
        self._expected = np.array(state["expected"])
        self._measured = [(step, tokens, fitness, tuple(candidate)) for step, tokens, fitness, candidate in
                          state["measured"]]
        if "pairs" in state:
            self.pairs, self._pair_tokens = np.array(state["pairs"]), state["pair_tokens"]
            self.center, self.correlations = tuple(state["center"]), state["correlations"]
        self._effects = None

    def observe(self, ranked: Sequence[tuple[float, Candidate]], tokens: int) -> None:
        """Learn from (fitness, candidate) pairs that were measured on one minibatch of that many tokens."""
        finite = [(fitness, candidate) for fitness, candidate in ranked if math.isfinite(fitness)]
        if self._drawn and {candidate for _, candidate in ranked} == self._drawn and len(finite) > 2:
            fitness, candidates = zip(*finite)
            self.correlations = [*self.correlations, rank_correlation(self.predict(candidates), fitness)][-TRUSTED:]
        self._drawn = set()
        step = self._measured[-1][0] + 1 if self._measured else 0
        self._measured += [(step, tokens, fitness, candidate) for fitness, candidate in finite]
        del self._measured[:-WINDOW]
        self._effects = None

    def predict(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """[candidates] fitness, up to a constant."""
        return quadratic(self.effects, self.pairs, self.columns.indices(candidates))

    @property
    def effects(self) -> np.ndarray:
        """[columns], fitted to what was measured."""
        if self._effects is None:
            self._effects = self._fit()
        return self._effects

    def screen(self, candidates: list[Candidate], count: int, rng: random.Random) -> list[Candidate]:
        """`count` of the candidates: those predicted best, and a share of the others drawn at random; the first ones
        where pairs are not trusted."""
        if self.pairs is not None:
            kept = self._best(candidates, count, rng) if self._trusted else candidates[:count]
            self._drawn = set(kept)
            return kept
        return self._best(candidates, count, rng)

    def _best(self, candidates: list[Candidate], count: int, rng: random.Random) -> list[Candidate]:
        order = [candidates[i] for i in np.argsort(self.predict(candidates), kind="stable")]
        best = order[:count - count // RANDOM_SHARE]
        others = order[len(best):]
        return best + rng.sample(others, min(count - len(best), len(others)))

    @from_main                                               # processors differ in the last digit, searches may not
    def _fit(self) -> np.ndarray:
        """[columns] effects."""
        if not self._measured:
            return self._expected
        steps, tokens, fitness, candidates = zip(*self._measured)
        indices = self.columns.indices(candidates)
        scale = np.abs(self._expected)                                       # how far effects may stray, ...
        scale = np.maximum(scale, LEAST_SCALE * scale.mean()) if scale.any() else 1.0    # ... also those expected at 0
        levels = np.zeros((len(indices), len(self._expected)))
        np.put_along_axis(levels, indices, 1.0, axis=1)
        unexplained = np.array(fitness) - levels @ self._expected
        if self.pairs is not None:
            unexplained -= quadratic(np.zeros(len(self._expected)), self.pairs, indices)
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


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; of equal values the first is the least."""
    ranks = np.array([np.argsort(np.argsort(values, kind="stable")) for values in (first, second)], dtype=float)
    return float(np.corrcoef(ranks)[0, 1])
