"""All pairs in bounded memory, probes, files: against plain loops and scikit-learn."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mhe_dist.errors import RunError, UserError
from pipelines.evaluate.metrics import all_pairs, roc
from pipelines.evaluate.metrics.all_pairs import compare_all_pairs
from pipelines.evaluate.probe import probe_embeddings, split_by_class
from pipelines.evaluate.sets.image_files import folder_labels, list_images

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


def test_files_that_cannot_be_read_stop_or_are_marked(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8), 200).save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"a/2\.png: cannot be read"):
        list_images(str(tmp_path)).read(0, 2, 8)
    files = list_images(str(tmp_path), skip_bad=True)
    assert list(files.paths) == ["a/1.png", "a/2.png"]
    images = files.read(0, 2, 8)
    assert images.dtype == torch.uint8
    assert images[0].unique().tolist() == [200]
    assert files.bad.tolist() == [0, 1]
    Image.new("L", (8, 8)).save(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"3\.png: is in no folder"):
        folder_labels(list_images(str(tmp_path)))
    with pytest.raises(UserError, match="holds no image"):
        (tmp_path / "empty").mkdir()
        list_images(str(tmp_path / "empty"))
