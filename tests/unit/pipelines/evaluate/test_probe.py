"""Probes of embeddings: k-NN and a linear classifier."""

from __future__ import annotations

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.evaluate.probe import probe_embeddings, split_by_class


def test_probes_tell_a_good_embedding_from_a_bad_one() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    centres = rng.standard_normal((5, 16))
    good = (centres[labels] + 0.3 * rng.standard_normal((300, 16))).astype(np.float32)
    bad = rng.standard_normal((300, 16)).astype(np.float32)
    train, test = split_by_class(labels)
    assert len(test) == 60
    assert sorted([*train, *test]) == list(range(300))
    found = probe_embeddings(good[train], labels[train], good[test], labels[test], k=500)
    assert found["knn"] < 0.5  # all neighbours vote: the majority
    found = probe_embeddings(good[train], labels[train], good[test], labels[test], k=5)
    assert min(found["knn"], found["linear"]) > 0.95
    blind = probe_embeddings(bad[train], labels[train], bad[test], labels[test], k=5)
    assert max(blind["knn"], blind["linear"]) < 0.45
    assert found["majority"] == blind["majority"] < 0.3
    with pytest.raises(UserError, match="one class"):
        probe_embeddings(good, np.zeros(300, int), good, labels)
    with pytest.raises(UserError, match="cannot be split"):
        split_by_class(np.arange(10))


def test_the_nearest_neighbours_vote_by_the_cosine() -> None:
    """Lengths do not matter: 2 of the 3 nearest directions are of class 1."""
    train = np.array([[9, 0], [0.1, 0.02], [0.1, 0.03], [0, 5]], np.float32)
    found = probe_embeddings(
        train, np.array([0, 1, 1, 0]), np.array([[3, 0.1]], np.float32), np.array([1]), 3
    )
    assert found["knn"] == 1.0
