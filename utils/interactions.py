"""How changes of a model add up in its KL divergence, to second order, from what each of them does alone.

Where logits z become z + Σ δᵢ, the divergence from the uncompressed model changes by the sum of what each δᵢ alone
makes of it and by δᵢᵀ F δⱼ for every two, where F = diag(q) - qqᵀ is its Hessian at z, whose probabilities are q, and
the mean is over tokens. So a candidate with one change after another is all that has to be run: pairs follow from their
Gram matrix. How far logits add up is another matter: around a candidate, few changes do, and around the uncompressed
model as many as leave it near.
"""
import math
from collections.abc import Hashable, Sequence
from itertools import accumulate

import numpy as np
import torch

from utils.distributed import from_main
from utils.losses import log_probabilities

Candidate = tuple[Hashable, ...]     # the level of every unit
GOLDEN = (math.sqrt(5) - 1) / 2      # its multiples, modulo 1, are spread evenly


class Sketch:
    """Changes of the logits z [tokens, vocabulary] at a few ids a token, the same for all candidates, drawn from q.

    Less their mean under q, so that the product of two changes is that of the whole vocabulary under F on average.
    Ids are drawn systematically, at evenly spaced quantiles of q with another offset for every token: no random number,
    and less noise than from independent draws.
    """

    def __init__(self, logits: torch.Tensor, samples: int):
        self._q = log_probabilities(logits).exp()
        offsets = torch.arange(len(logits), dtype=torch.float64, device=logits.device) * GOLDEN % 1
        quantiles = (torch.arange(samples, device=logits.device) + offsets[:, None]) / samples
        cumulative = self._q.cumsum(-1)
        self._ids = torch.searchsorted(cumulative, quantiles.to(self._q.dtype) * cumulative[:, -1:]).clamp_(
            max=logits.shape[-1] - 1)
        self._before = self._sampled(logits)

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        """Of a candidate's logits [tokens, vocabulary] from z, float32 [tokens, samples]."""
        return (self._sampled(logits) - self._before).float()

    def _sampled(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.to(self._q.dtype)
        centred = logits.gather(-1, self._ids) - torch.linalg.vecdot(self._q, logits)[:, None]
        return centred / math.sqrt(self._ids.shape[-1])


@from_main                                                   # processors differ in the last digit, searches may not
def gram_matrix(changes: torch.Tensor) -> np.ndarray:
    """Mean over tokens of δᵢᵀ F δⱼ, [candidates, candidates], from sketched changes [tokens, candidates, samples]. What
    is not finite counts as no change: its divergence alone tells."""
    flat = changes.nan_to_num(0.0, 0.0, 0.0).transpose(0, 1).flatten(1)
    return (flat @ flat.T / len(changes)).double().numpy()


class Columns:
    """A column for each level of each unit."""

    def __init__(self, levels: Sequence[Sequence[Hashable]]):
        """levels: that each unit may take."""
        starts = accumulate(map(len, levels), initial=0)
        self._columns = [{level: start + i for i, level in enumerate(unit)} for start, unit in zip(starts, levels)]
        self.unit = np.repeat(np.arange(len(levels)), [len(unit) for unit in levels])    # of every column
        self.level = [level for unit in levels for level in unit]

    def __len__(self) -> int:
        return len(self.level)

    def of(self, unit: int, level: Hashable) -> int:
        return self._columns[unit][level]

    def indices(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """[candidates, units] column of every unit's level."""
        return np.array([[columns[level] for columns, level in zip(self._columns, candidate)]
                         for candidate in candidates])


def pairs_of(columns: Columns, changed: Sequence[int], gram: np.ndarray) -> np.ndarray:
    """What two levels of two units do beyond each alone, [columns, columns], from the Gram matrix of the changes to the
    levels in columns `changed`; the others, a candidate's own levels, do nothing."""
    pairs = np.zeros((len(columns), len(columns)))
    pairs[np.ix_(changed, changed)] = gram
    pairs[columns.unit[:, None] == columns.unit] = 0.0
    return pairs


def quadratic(effects: np.ndarray, pairs: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
    """[candidates] sums of effects [columns] and of pairs [columns, columns] of what is chosen, [candidates, units]."""
    total = effects[indices].sum(axis=1)
    if pairs is not None:
        total = total + np.array([pairs[np.ix_(chosen, chosen)].sum() / 2 for chosen in indices])
    return total


@from_main
def descend(columns: Columns, effects: np.ndarray, pairs: np.ndarray, costs: np.ndarray, low: np.ndarray,
            high: np.ndarray, start: Candidate) -> Candidate:
    """From `start`, the best change of one or two units' levels again and again, while `quadratic` gets less.

    Each of the costs [columns, kinds] adds up to between `low` and `high`, [kinds], for `start` and for what is found.
    Columns whose effect is infinite are not taken.
    """
    places = np.flatnonzero(np.isfinite(effects))
    effects, pairs, costs, unit = effects[places], pairs[np.ix_(places, places)], costs[places], columns.unit[places]
    chosen = np.searchsorted(places, columns.indices([start])[0])
    while True:
        own = chosen[unit]                                   # what each column would replace
        slope = effects + pairs[:, chosen].sum(axis=1)
        slope -= slope[own]
        cost = costs - costs[own]
        both = slope[:, None] + slope + pairs - pairs[own] - pairs[:, own] + pairs[np.ix_(own, own)]
        total = costs[chosen].sum(axis=0) + cost[:, None] + cost
        both[(unit[:, None] == unit) | ((total < low) | (total > high)).any(axis=2)] = np.inf
        best = int(both.argmin())
        if not both.flat[best] < -1e-12:
            return tuple(columns.level[place] for place in places[chosen])
        for column in divmod(best, len(unit)):
            chosen[unit[column]] = column
