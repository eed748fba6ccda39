"""What the parents were measured at, document by document, so that no document is run for them twice.

A parent competes in the last selection step of every generation, on another minibatch of the same calibration text.
Fitness is a mean over documents, each of which gives the same value whatever it is measured together with; so what a
parent has seen in earlier generations is looked up, and only the rest is run. The search is the same, for fewer tokens.
"""
import math
from collections.abc import Callable, Hashable, Iterable, Sequence

from utils.fitness import Fitness, Row, mean_of

Candidate = tuple[Hashable, ...]     # the level of every unit


class Measurements:
    """Fitness of candidates, of one kind (see `Fitness.measure`), where what was measured before need not be again."""

    def __init__(self, fitness: Fitness, states: Callable[[Candidate], Sequence[Hashable]], kind: str,
                 reuse: bool = True):
        """states(candidate): what `fitness` takes, the state of every block. Without `reuse`, everything is measured
        again whenever it is asked for."""
        self._fitness, self._states, self._kind, self._reuse = fitness, states, kind, reuse
        self._sums: dict[Candidate, dict[tuple[int, int], float]] = {}   # over a document's (index, length) tokens

    def measure(self, candidates: Sequence[Candidate], minibatch: Row) -> tuple[list[float], int]:
        """(every candidate's mean over the predicted tokens of `minibatch`, +inf where it is not finite; the number of
        tokens that were run for it, of all candidates together)."""
        if not self._reuse:
            self._sums.clear()
        missing: dict[tuple[int, ...], Row] = {}                         # candidates that have not seen -> documents
        for document in minibatch:
            members = tuple(i for i, c in enumerate(candidates) if document not in self._sums.get(c, ()))
            missing.setdefault(members, []).append(document)
        missing.pop((), None)
        for members, documents in missing.items():
            sums = self._fitness.sums([self._states(candidates[i]) for i in members], documents, (self._kind,))
            for document, values in zip(documents, sums[..., 0].tolist()):
                for i, value in zip(members, values):
                    self._sums.setdefault(candidates[i], {})[document] = value
        spent = sum(len(members) * length for members, documents in missing.items() for _, length in documents)
        return [mean_of([self._sums[c][document] for document in minibatch], minibatch, self._kind)
                for c in candidates], spent

    def ties(self, candidate: Candidate, best: Candidate, minibatch: Row) -> bool:
        """Whether the two, which were just measured on it, differ there by less than the standard error over documents
        of their difference."""
        differences = [self._sums[candidate][document] - self._sums[best][document] for document in minibatch]
        tokens = sum(length - 1 for _, length in minibatch)
        mean = sum(differences) / tokens
        spread = sum((difference - mean * (length - 1))**2 for difference, (_, length) in zip(differences, minibatch))
        return abs(mean) * tokens < math.sqrt(spread)

    def keep(self, candidates: Iterable[Candidate]) -> None:
        """Forget all but these, and what of them is not finite."""
        candidates = candidates if self._reuse else ()
        self._sums = {c: {document: value for document, value in self._sums[c].items() if math.isfinite(value)}
                      for c in candidates if c in self._sums}

    @property
    def state(self) -> list:
        """What JSON can hold and `restore` takes."""
        return [[c, [[*document, value] for document, value in sums.items()]] for c, sums in self._sums.items()]

    def restore(self, state: list) -> None:
        self._sums = {tuple(c): {(index, length): value for index, length, value in sums} for c, sums in state}
