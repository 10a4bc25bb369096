"""Figures of ranked labels against a plain computation, one sample after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.evaluate.metrics.label_ranking import (
    KS,
    find_labels,
    propensities,
    rank_figures,
)
from tests.support.data.label_sets import as_lists

CLASSES = 12


def test_figures_are_those_of_a_plain_computation() -> None:
    rng = np.random.default_rng(0)
    predicted = np.stack([rng.permutation(CLASSES)[:5] for _ in range(300)])
    given = [rng.integers(0, CLASSES, rng.integers(0, 9)).tolist() for _ in range(300)]
    counts = rng.integers(0, 400, CLASSES)
    p = propensities(counts, 3000)
    found = rank_figures(predicted, as_lists(given), 1 / p)
    pairs = [(row, set(each)) for row, each in zip(predicted.tolist(), given, strict=True) if each]
    for k in KS:
        hits = [[label in own for label in row[:k]] for row, own in pairs]
        precision = np.mean([sum(each) / k for each in hits])
        recall = np.mean([sum(h) / len(own) for h, (_, own) in zip(hits, pairs, strict=True)])
        gains = [sum(hit / math.log2(r + 2) for r, hit in enumerate(each)) for each in hits]
        best = [sum(1 / math.log2(r + 2) for r in range(min(k, len(own)))) for _, own in pairs]
        scored = [sum(1 / p[label] for label in row[:k] if label in own) for row, own in pairs]
        largest = [
            sum(sorted((1 / p[label] for label in own), reverse=True)[:k]) for _, own in pairs
        ]
        assert found[f"p@{k}"] == pytest.approx(precision, abs=1e-12)
        assert found[f"recall@{k}"] == pytest.approx(recall, abs=1e-12)
        assert found[f"ndcg@{k}"] == pytest.approx(np.mean(np.divide(gains, best)), abs=1e-12)
        assert found[f"psp@{k}"] == pytest.approx(sum(scored) / sum(largest), abs=1e-12)


def test_propensities_are_those_of_the_paper() -> None:
    c = (math.log(1000) - 1) * 2.5**0.55
    wanted = [1 / (1 + c * math.exp(-0.55 * math.log(n + 1.5))) for n in (0, 7, 1000)]
    assert propensities(np.array([0, 7, 1000]), 1000) == pytest.approx(wanted, abs=1e-12)
    assert propensities(np.array([0, 2]), 2).tolist() == [1, 1]


def test_a_class_that_is_missing_or_comes_twice_is_no_second_hit() -> None:
    hits, ranks = find_labels(np.array([[3, 1, -1], [2, 0, -1]]), as_lists([[1, 1, 0], [2]]))
    assert hits.tolist() == [[False, True, False], [True, False, False]]
    assert ranks.tolist() == [3, 1, 0], "label 0 is not found, label 1 second, label 2 first"
