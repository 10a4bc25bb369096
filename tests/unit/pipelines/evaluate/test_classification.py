"""The figures of a classification against counting one sample after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.bench.scale.index import write_synthetic_index
from pipelines.evaluate import classification
from pipelines.evaluate.classification import _figures, count_images
from pipelines.shards.index import ShardIndex


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


@pytest.mark.parametrize("together", [13, 1 << 24])
def test_images_of_each_class_are_counted_part_by_part(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "_COUNTED_TOGETHER", together)
    write_synthetic_index(str(tmp_path), 500, 60)
    index = ShardIndex.load(str(tmp_path))
    labels = np.concatenate([shard.labels for shard in index.shards])
    found = count_images(index)
    assert found is not None and found.sum() == 500
    assert found.tolist() == [int((labels == n).sum()) for n in range(index.num_classes)]
