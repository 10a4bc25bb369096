"""Pairs drawn for verification, and their distances."""

import numpy as np

from pipelines.evaluate.metrics import pair_sampling
from pipelines.evaluate.metrics.pair_sampling import SamplePairs, draw_pairs, squared_distances

EXACT = 1e-12

LABELS = np.array([3, 1, 3, 3, 0, 1, 7])


def test_all_pairs_are_drawn_when_all_are_asked_for():
    pairs = draw_pairs(LABELS, 1000, seed=0)
    assert len(pairs.same) == 8  # 3 + 1 same pairs exist
    same = {
        frozenset(p) for p in zip(pairs.first[pairs.same], pairs.second[pairs.same], strict=True)
    }
    assert same == {frozenset(p) for p in ((0, 2), (0, 3), (2, 3), (1, 5))}


def test_pairs_are_what_they_say_distinct_and_alternate():
    labels = np.random.default_rng(0).integers(0, 30, 200)
    pairs = draw_pairs(labels, 400, seed=5)
    assert pairs.same.tolist() == [True, False] * 200
    np.testing.assert_array_equal(labels[pairs.first] == labels[pairs.second], pairs.same)
    assert len({frozenset(p) for p in zip(pairs.first, pairs.second, strict=True)}) == 400
    assert not (pairs.first == pairs.second).any()


def test_every_pair_of_a_kind_is_equally_likely():
    counts = {}
    for seed in range(1200):
        pairs = draw_pairs(LABELS, 4, seed)
        for kind in (True, False):
            chosen = pairs.same == kind
            for p in zip(pairs.first[chosen], pairs.second[chosen], strict=True):
                counts.setdefault((kind, frozenset(p)), []).append(seed)
    for kind, population in ((True, 4), (False, 17)):
        seen = [len(v) for (k, _), v in counts.items() if k == kind]
        expected = 2 * 1200 / population
        assert len(seen) == population
        assert max(abs(n - expected) for n in seen) < 5 * expected**0.5


def test_the_seed_alone_decides():
    first, again, other = (draw_pairs(LABELS, 6, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.first, again.first)
    assert (first.first != other.first).any() or (first.second != other.second).any()


def test_squared_distances_in_chunks(monkeypatch):
    monkeypatch.setattr(pair_sampling, "_COMPARED", 3)
    rows = np.random.default_rng(0).standard_normal((9, 4))
    pairs = SamplePairs(np.array([0, 1, 2, 3]), np.array([5, 6, 7, 8]), np.ones(4, bool))
    expected = ((rows[:4] - rows[5:]) ** 2).sum(axis=1)
    np.testing.assert_allclose(squared_distances(rows, pairs), expected, atol=EXACT)


def test_a_pair_with_a_row_of_zeros_is_wrong():
    rows = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    same = np.array([True, False, True, False])
    pairs = SamplePairs(np.array([0, 0, 1, 1]), np.array([1, 2, 2, 2]), same)
    assert squared_distances(rows, pairs).tolist() == [4.0, 0.0, 4.0, 0.0]
