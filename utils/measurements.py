"""What the parents were measured at, document by document, so that no document is run for them twice.

A parent competes in the last selection step of every generation, on another minibatch of the same calibration text.
Fitness is a mean over documents, each of which gives the same value whatever it is measured together with; so what a
parent has seen in earlier generations is looked up, and only the rest is run. The search is the same, for fewer tokens.

Minibatches are small, and where candidates are nearly equal, the last step's is a lottery that some offspring wins in
every generation. `confirmed` has it show that it is better than its parent on more of what the parent has seen.
"""
import math
import random
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

    def keep(self, candidates: Iterable[Candidate]) -> None:
        """Forget all but these, and what of them is not finite."""
        candidates = candidates if self._reuse else ()
        self._sums = {c: {document: value for document, value in self._sums[c].items() if math.isfinite(value)}
                      for c in candidates if c in self._sums}

    def estimate(self, candidate: Candidate) -> float:
        """Its mean over all that it has seen."""
        sums = self._sums[candidate]
        return mean_of(list(sums.values()), list(sums), self._kind)

    def difference(self, a: Candidate, b: Candidate) -> tuple[float, float, int]:
        """(a's mean less b's over all documents that both have seen, its standard error, tokens of those documents).

        The error is that of paired differences: a document that is hard for one is hard for the other. Of "ppl" it is
        the mean losses that are compared. NaN where one of them is not finite.
        """
        seen = [document for document in self._sums[a] if document in self._sums[b]]
        predicted = sum(length - 1 for _, length in seen)
        differences = [self._sums[a][document] - self._sums[b][document] for document in seen]
        mean = sum(differences) / predicted
        squares = sum((value - mean * (length - 1))**2 for value, (_, length) in zip(differences, seen))
        error = math.sqrt(squares * len(seen) / max(1, len(seen) - 1)) / predicted
        return mean, error, sum(length for _, length in seen)

    def further(self, a: Candidate, b: Candidate, num_tokens: int, rng: random.Random) -> Row:
        """Documents to go on comparing them on, of `num_tokens` tokens or just above: first those that one of them has
        seen. Fewer where the text is at an end."""
        used = {index for index, length in self._sums[a] if (index, length) in self._sums[b]}
        lengths = dict([*self._sums[a], *self._sums[b]])
        ranks = {index: (index not in lengths, rng.random()) for index in range(len(self._fitness.documents))
                 if index not in used}
        minibatch: Row = []
        for index in sorted(ranks, key=ranks.get):
            if sum(length for _, length in minibatch) >= num_tokens:
                break
            minibatch.append((index, lengths.get(index, len(self._fitness.documents[index]))))
        return minibatch

    @property
    def state(self) -> list:
        """What JSON can hold and `restore` takes."""
        return [[c, [[*document, value] for document, value in sums.items()]] for c, sums in self._sums.items()]

    def restore(self, state: list) -> None:
        self._sums = {tuple(c): {(index, length): value for index, length, value in sums} for c, sums in state}


def confirmed(survivors: Sequence[tuple[float, Candidate]], parents: Sequence[Candidate], measurements: Measurements,
              measure: Callable[[Row, list[Candidate]], object], num_tokens: int, limit: int, rng: random.Random,
              sign: int = 1) -> list[tuple[float, Candidate]]:
    """(fitness, candidate) of the survivors of a last selection step, best first, with parents back in the places of
    those that are not seen to be better; fitness is the mean over all that a candidate has seen.

    A survivor and the parent that it displaces are compared on all documents that both have seen. While the difference
    is within its standard error, `measure` runs both on `num_tokens` more, up to `limit` tokens in all; then the mean
    decides. With `sign` -1 higher is better, and fitness is negative.
    """
    displaced = [parent for parent in parents if parent not in (candidate for _, candidate in survivors)]
    kept = []
    for _, candidate in reversed(survivors):
        while displaced and candidate not in parents:
            difference, error, tokens = measurements.difference(candidate, displaced[0])
            further = measurements.further(candidate, displaced[0], min(num_tokens, limit - tokens), rng)
            if abs(difference) > error or not further:
                if not sign * difference < 0:
                    candidate = displaced.pop(0)
                break
            measure(further, [candidate, displaced[0]])
        kept.append((sign * measurements.estimate(candidate), candidate))
    return sorted(kept, key=lambda pair: pair[0])
