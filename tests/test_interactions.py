"""utils/interactions.py: sketched changes against the exact ones, and what follows from them."""
import itertools
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from utils.decoder import Decoder
from utils.fitness import Fitness
from utils.interactions import Columns, Sketch, descend, gram_matrix, pairs_of, quadratic


def exact_gram(logits: torch.Tensor, changed: list[torch.Tensor]) -> torch.Tensor:
    """Mean over tokens of δᵢᵀ(diag(q) - qqᵀ)δⱼ, with every product written out."""
    q = logits.double().softmax(-1)
    hessian = torch.diag_embed(q) - q[:, :, None] * q[:, None]
    deltas = torch.stack([other.double() - logits.double() for other in changed])
    return torch.einsum("itv,tvw,jtw->ij", deltas, hessian, deltas) / len(logits)


@pytest.mark.parametrize("samples, tolerance", [(16, 0.1), (256, 0.02)])
def test_products_of_sketches_are_those_of_the_whole_vocabulary(samples, tolerance):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(300, 60, generator=generator)
    shared = torch.randn(300, 60, generator=generator)       # so that two of the changes go together
    changed = [logits + scale * torch.randn(300, 60, generator=generator) + along * shared
               for scale, along in ((0.3, 0.2), (0.1, 0.2), (0.2, 0.0))]
    sketch = Sketch(logits, samples)
    gram = gram_matrix(torch.stack([sketch.change(other) for other in changed], dim=1))
    exact = exact_gram(logits, changed).numpy()
    scale = np.sqrt(np.diag(exact))
    assert (np.abs(gram - exact) < tolerance * np.outer(scale, scale)).all()
    assert exact[0, 1] > 0.3 * scale[0] * scale[1]


@pytest.mark.parametrize("around", [None, 2], ids=["uncompressed", "without another"])
def test_changes_of_a_walk_are_those_of_whole_models_whatever_document_is_first(around, checkpoint):
    """Attentions dropped one at a time."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    decoder = Decoder(model)

    def set_block(index, state):
        decoder.blocks[index].drop(*(state or (False, False)))

    documents = [torch.arange(3, 23), torch.arange(30, 42), torch.arange(5, 40)]
    fitness = Fitness(decoder, documents, set_block)
    minibatch = [(2, 30), (0, 20), (1, 12)]
    candidates = [tuple((i in (unit, around), False) for i in range(len(decoder.blocks))) for unit in (0, 1, 3)]
    center = tuple((i == around, False) for i in range(len(decoder.blocks)))
    sums, changes = fitness.changes(candidates, minibatch, center, samples=512)
    assert torch.equal(sums, fitness.sums(candidates, minibatch)[..., 0])

    def logits(candidate):
        for i, state in enumerate(candidate):
            set_block(i, state)
        with torch.no_grad():
            return torch.cat([model(documents[i][None, :length]).logits[0, :-1] for i, length in minibatch])

    exact = exact_gram(logits(center), [logits(candidate) for candidate in candidates]).numpy()
    assert changes.shape == (59, 3, 512)
    assert gram_matrix(changes) == pytest.approx(exact, rel=0.03, abs=0.003 * exact.max())


def test_second_order_is_exact_where_logits_add_up_and_changes_are_small():
    """KL divergence of every subset of six changes of the logits, predicted from each alone and their products."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(400, 50, generator=generator, dtype=torch.float64)
    shared = torch.randn(400, 50, generator=generator, dtype=torch.float64)
    deltas = [0.05 * torch.randn(400, 50, generator=generator, dtype=torch.float64) + weight * shared
              for weight in (0.1, -0.1, 0.05, 0.0, 0.02, -0.08)]

    def divergence(subset):
        p, q = (z.log_softmax(-1) for z in (logits, logits + sum((deltas[i] for i in subset), torch.zeros(()))))
        return float((p.exp() * (p - q)).sum(-1).mean())

    columns = Columns([(False, True)] * 6)
    sketch = Sketch(logits, 4096)
    gram = gram_matrix(torch.stack([sketch.change(logits + delta) for delta in deltas], dim=1))
    pairs = pairs_of(columns, [columns.of(i, True) for i in range(6)], gram)
    effects = np.array([0.0 if level is False else divergence([unit]) for unit, level in zip(columns.unit,
                                                                                             columns.level)])
    subsets = [subset for size in range(7) for subset in itertools.combinations(range(6), size)]
    indices = columns.indices([tuple(i in subset for i in range(6)) for subset in subsets])
    truth = np.array(list(map(divergence, subsets)))
    assert quadratic(effects, pairs, indices) == pytest.approx(truth, rel=0.05, abs=1e-5)
    assert np.abs(quadratic(effects, None, indices) - truth).max() > 0.5 * truth.max()


@pytest.mark.parametrize("levels, kinds", [((False, True), 2), ((-1, 0, 1, 2), 1)])
def test_descents_keep_the_budget_and_the_best_of_a_few_is_the_best_of_all(levels, kinds):
    found = 0
    for seed in range(10):
        rng, random_ = np.random.default_rng(seed), random.Random(seed)
        units = 8 if len(levels) == 2 else 5
        columns = Columns([levels] * units)
        gram = rng.normal(size=(len(columns), 4))
        effects, pairs = rng.random(len(columns)), pairs_of(columns, range(len(columns)), gram @ gram.T / 8)
        effects[rng.integers(len(columns))] = np.inf
        costs = np.zeros((len(columns), kinds), dtype=int)
        costs[np.arange(len(columns)), columns.unit % kinds] = [int(level) for level in columns.level]
        budget = np.full(kinds, 2)
        everything = [c for c in itertools.product(levels, repeat=units) if np.isfinite(
            effects[columns.indices([c])[0]]).all() and (costs[columns.indices([c])[0]].sum(axis=0) == budget).all()]
        values = quadratic(effects, pairs, columns.indices(everything))
        ends = [descend(columns, effects, pairs, costs, budget, budget, start)
                for start in random_.sample(everything, 6)]
        assert set(ends) <= set(everything)
        found += min(quadratic(effects, pairs, columns.indices(ends))) == pytest.approx(values.min())
    assert found >= 9
