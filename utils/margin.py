"""Selection with a margin: how much of a difference measured on one minibatch may be the luck of its documents.

Parents and offspring of the last selection step see the same documents, so the error of their difference is that of a
paired comparison, which is far smaller than that of either fitness. It is taken from the differences on parts of the
minibatch and costs no further tokens.
"""
import math
from collections.abc import Collection, Sequence

from utils.fitness import Candidate, Fitness, Row

PARTS = 8                # of a minibatch: enough for a standard error, few enough to fill microbatches


def rank_with_margin(fitness: Fitness, candidates: Sequence[Candidate], minibatch: Row, kind: str,
                     parents: Collection[int], margin: float, sign: int = 1) -> list[tuple[float, int]]:
    """(sign * fitness, index) of every candidate, best first, where all but `parents` (indices) are ranked by it plus
    `margin` standard errors of their difference to the best parent.

    "ppl" is compared by its logarithm, the mean loss in nats a token. What is not finite is +inf, and last.
    """
    parts = split(minibatch)
    tokens = [sum(length - 1 for _, length in part) for part in parts]       # predicted ones, which fitness averages
    shares = [count / sum(tokens) for count in tokens]
    measured = zip(*(fitness.measure(candidates, part, (kind,)) for part in parts))
    values = [[sign * (math.log(value) if kind == "ppl" else value) for (value,) in row] for row in measured]
    means = [_mean(shares, row) if all(map(math.isfinite, row)) else math.inf for row in values]

    scores = list(means)                                                     # to rank by
    best = min(parents, key=means.__getitem__)
    if math.isfinite(means[best]):
        for i in set(range(len(candidates))) - set(parents):
            if math.isfinite(means[i]):
                differences = [ours - theirs for ours, theirs in zip(values[i], values[best])]
                scores[i] += margin * standard_error(shares, differences)
    reported = [sign * math.exp(sign * mean) if kind == "ppl" and math.isfinite(mean) else mean for mean in means]
    return [(reported[i], i) for i in sorted(range(len(candidates)), key=scores.__getitem__)]


def split(minibatch: Row) -> list[Row]:
    """Parts of whole documents and about equal tokens, as many as there are documents or PARTS. Documents go in the
    order they were drawn, which is random, so that parts differ by chance alone."""
    parts: list[Row] = [[] for _ in range(min(PARTS, len(minibatch)))]
    tokens = [0] * len(parts)
    for document in minibatch:
        smallest = tokens.index(min(tokens))
        parts[smallest].append(document)
        tokens[smallest] += document[1]
    return parts


def standard_error(shares: Sequence[float], values: Sequence[float]) -> float:
    """Of the mean of `values` weighted by `shares` (sum 1), both [parts]; 0 for a single part, which shows none."""
    count, mean = len(values), _mean(shares, values)
    if count < 2:
        return 0.0
    squares = math.fsum((share * (value - mean))**2 for share, value in zip(shares, values))
    return math.sqrt(count / (count - 1) * squares)


def _mean(shares: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(share * value for share, value in zip(shares, values))
