"""TAR over all pairs in bounded memory, against a plain loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.evaluate.metrics import all_pairs, roc
from pipelines.evaluate.metrics.all_pairs import compare_all_pairs

FARS = (0.0, 1e-3, 1e-2, 0.2, 1.0)


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(-3, 20, 90)  # some have one image only
    rows = rng.standard_normal((23, 8))[labels + 3] + 0.8 * rng.standard_normal((90, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[7] = rows[3]  # ties
    return rows, labels


@pytest.mark.parametrize("tile", [2048, 16, 1])
def test_all_pairs_equal_a_plain_loop(case, tile: int, monkeypatch) -> None:
    monkeypatch.setattr(all_pairs, "_TILE", tile)
    monkeypatch.setattr(roc, "_SPARE", 10)
    rows, labels = case
    same, values = [], []
    for a, b in itertools.combinations(range(90), 2):
        same.append(labels[a] == labels[b])
        values.append(round(float(rows[a] @ rows[b]), 12))
    same, values = np.array(same), np.array(values)
    found = compare_all_pairs(rows, labels, FARS[:-1])
    assert (found.genuine, found.impostors) == (same.sum(), (~same).sum())
    assert not found.skipped_fars
    for far in FARS[:-1]:
        limits = [t for t in np.unique(values) if np.mean(values[~same] > t) <= far]
        expected = np.mean(values[same] > min(limits))
        assert found.tar[far] == pytest.approx(expected, abs=1e-12), far
    assert found.tar[1e-3] < found.tar[0.2] < 1


@pytest.mark.slow
def test_memory_is_bounded_and_what_does_not_fit_is_named(case, monkeypatch) -> None:
    monkeypatch.setattr(all_pairs, "KEPT", 50)
    whole = compare_all_pairs(*case, (1e-3, 1e-2, 0.2, 1.0))
    assert whole.skipped_fars == [0.2, 1.0]
    assert list(whole.tar) == [1e-3, 1e-2]
    highest = roc.TopScores(5)
    for part in np.random.default_rng(0).permutation(10_000_000).reshape(100, -1):
        highest.add(part.astype(float))
        assert highest._size <= 10 + roc._SPARE + 100_000
    assert highest.descending().tolist() == [9_999_999.0 - n for n in range(5)]
    with pytest.raises(UserError, match="0 pairs of one class"):
        compare_all_pairs(case[0], np.arange(90), FARS)
    with pytest.raises(UserError, match="and 0 of two classes"):
        compare_all_pairs(case[0], np.zeros(90, int), FARS)
