"""The figures of a classification against counting one sample after the other."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluate.classification import _figures


def test_shares_by_training_images_of_the_class() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([0, 19, 20, 100, 101, 5000])
    labels = rng.integers(0, 6, 400)
    predicted = np.stack([rng.permutation(6)[:5] for _ in labels])
    found = _figures(predicted, labels, counts)
    shots = {"few_shot/": (0, 1), "medium_shot/": (2, 3), "many_shot/": (4, 5), "": range(6)}
    for prefix, classes in shots.items():
        chosen = [n for n in range(400) if labels[n] in classes]
        first = [predicted[n][0] == labels[n] for n in chosen]
        five = [labels[n] in predicted[n] for n in chosen]
        assert found[f"{prefix}samples"] == len(chosen)
        assert found[f"{prefix}top1"] == pytest.approx(sum(first) / len(chosen), abs=1e-15)
        assert found[f"{prefix}top5"] == pytest.approx(sum(five) / len(chosen), abs=1e-15)
    assert "beam_recall" not in found


def test_shots_without_samples_are_left_out_and_a_sixth_column_is_the_best_of_all() -> None:
    predicted = np.array([[0, 1, 2, 3, 4, 0], [1, 0, 2, 3, 4, 0], [2, -1, -1, -1, -1, 2]])
    found = _figures(predicted, np.array([0, 0, 1]), np.array([7, 8]))
    assert found["top1"] == pytest.approx(1 / 3) and found["top5"] == pytest.approx(2 / 3)
    assert found["beam_recall"] == pytest.approx(2 / 3)
    assert not any(name.startswith(("medium", "many")) for name in found)
    assert "few_shot/top1" not in _figures(predicted, np.array([0, 0, 1]), None)
