"""Verification sets: from embeddings to figures, against docs/formats.md in plain NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import normalize_embeddings
from pipelines.evaluate.in_training import evaluate_in_training
from pipelines.evaluate.metrics import bootstrap
from pipelines.evaluate.metrics.pair_sampling import SamplePairs, squared_distances
from pipelines.evaluate.metrics.verification import roc_curve, tar_at_far, ten_fold_accuracy
from pipelines.evaluate.pair_sets import read_bin_sets, score_pairs, verify_pair_sets
from tests.support import tiny

EXACT = 1e-12


def embed(images: torch.Tensor) -> torch.Tensor:
    """Something that tells an image from its mirror image."""
    weights = torch.randn(3 * 16 * 16, 8, generator=torch.Generator().manual_seed(0))
    return images.float().flatten(1) / 255 @ weights


def reference(left: np.ndarray, right: np.ndarray, same: np.ndarray, far: float) -> list[float]:
    """docs/formats.md section 2, sentence by sentence: accuracy, its std, thresholds, TAR@FAR."""
    left, right = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (left, right))
    distance = ((left - right) ** 2).sum(axis=1)
    parts, right_share, chosen, tars = np.array_split(np.arange(len(same)), 10), [], [], []
    for number, test in enumerate(parts):
        train = np.concatenate([part for other, part in enumerate(parts) if other != number])
        grid = np.arange(400) * 0.01
        shares = [np.mean((distance[train] < t) == same[train]) for t in grid]
        chosen.append(grid[int(np.argmax(shares))])
        right_share.append(np.mean((distance[test] < chosen[-1]) == same[test]))
        grid = np.arange(4000) * 0.001
        fars = np.array([np.mean(distance[train][~same[train]] < t) for t in grid])
        rising = np.flatnonzero(np.append(fars, 1.0)[:-1] >= far)
        limit = 0.0
        if len(rising) and rising[0] > 0:
            i = rising[0]
            limit = grid[i - 1] + (far - fars[i - 1]) / (fars[i] - fars[i - 1]) * 0.001
        tars.append(np.mean(distance[test][same[test]] < limit))
    return [np.mean(right_share), np.std(right_share), np.mean(tars), *chosen]


@pytest.mark.parametrize("seed", range(3))
def test_random_embeddings_score_as_written(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 200 + 7 * seed  # folds of unequal size, too
    same = np.arange(count) % 2 == 0
    centre = rng.standard_normal((count, 16))
    left = centre + 0.5 * rng.standard_normal((count, 16))
    right = np.where(same[:, None], centre, rng.standard_normal((count, 16)))
    right = right + 0.7 * rng.standard_normal((count, 16))
    rows = np.stack([left, right], axis=1).reshape(-1, 16)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    first = np.arange(0, 2 * count, 2)
    distances = squared_distances(rows, SamplePairs(first, first + 1, same))
    folds, tar = ten_fold_accuracy(distances, same), tar_at_far(distances, same, 0.05)
    found = [folds.mean, folds.std, tar.tar, *folds.thresholds]
    np.testing.assert_allclose(found, reference(left, right, same, 0.05), atol=EXACT, rtol=0)


def test_a_set_from_file_to_figures(tmp_path: Path) -> None:
    """Embedding = f(x) + f(mirrored x), and nothing depends on what else is in a block."""
    sets = read_bin_sets([tiny.write_bin(tmp_path / "lfw.bin")])
    (found,) = verify_pair_sets(embed, sets, Topology(), tiny.SIDE)
    images = sets[0].images.read(0, 80, tiny.SIDE)
    rows = (embed(images) + embed(images.flip(-1))).double().numpy()
    same = np.arange(40) % 2 == 0
    expected = reference(rows[0::2], rows[1::2], same, 1e-2)
    assert found.metrics["accuracy"] == pytest.approx(expected[0], abs=EXACT)
    assert found.metrics["tar@far=1e-2"] == pytest.approx(expected[2], abs=EXACT)
    assert found.metrics["threshold"] == pytest.approx(np.mean(expected[3:]), abs=EXACT)
    assert found.named_metrics()["lfw/accuracy"] == found.metrics["accuracy"]
    low, high = found.intervals["accuracy"]
    assert low <= found.metrics["accuracy"] <= high
    assert found.to_dict()["pairs"] == 40
    config = tiny.config(tmp_path, "unused", evaluate={"verification": [str(tmp_path / "lfw.bin")]})
    assert config.evaluate.has_sets
    seed = config.run.seed
    evaluation = evaluate_in_training(embed, config.evaluate, config.data, seed, Topology())
    during = evaluation.metrics
    assert during == {f"lfw/{key}": value for key, value in found.metrics.items()}


def of_a_dead_network(kind: str) -> np.ndarray:
    """Embeddings of 400 images by which none can be told from another."""
    noise = np.random.default_rng(0).standard_normal((400, 16))
    return {
        "not finite": np.full((400, 16), np.nan),
        "zeros": np.zeros((400, 16)),
        "one direction": np.outer(np.arange(1, 401), noise[0]),
        "all but one direction": noise[0] + 1e-3 * noise,
        "zeros among others": np.where(np.arange(400)[:, None] % 4 == 0, 0, noise),
    }[kind].astype(np.float32)


@pytest.mark.parametrize(
    "kind",
    ["not finite", "zeros", "one direction", "all but one direction", "zeros among others"],
)
def test_a_dead_network_verifies_nothing(kind: str) -> None:
    """It had a TAR of 1 at every FAR, and `keep_best` would have kept it."""
    same = np.arange(200) % 2 == 0
    first = np.arange(0, 400, 2)
    rows = normalize_embeddings(of_a_dead_network(kind))
    found = score_pairs("lfw", squared_distances(rows, SamplePairs(first, first + 1, same)), same)
    assert [found.metrics[f"tar@far=1e-{n}"] for n in (2, 3)] == [0.0, 0.0]
    assert found.intervals["tar@far=1e-3"] == (0.0, 0.0)
    assert found.metrics["accuracy"] <= 0.55


@pytest.mark.slow
def test_the_interval_narrows_with_more_pairs_and_is_the_same_again() -> None:
    rng = np.random.default_rng(0)

    def width(count: int) -> float:
        same = np.arange(count) % 2 == 0
        distances = np.where(same, 1.0, 2.0) + 0.6 * rng.standard_normal(count)
        one = score_pairs("a", distances, same).intervals["accuracy"]
        assert one == score_pairs("b", distances, same).intervals["accuracy"]
        return one.high - one.low

    assert 1.5 < width(400) / width(3600) < 6  # three, in the limit


def test_the_interval_covers_the_binomial_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every threshold is as good as any other, accuracy is a share of independent pairs."""
    same = np.arange(1000) % 2 == 0
    wrong = np.arange(1000) % 10 < 2
    distances = np.where(same ^ wrong, 0.5, 3.5)
    monkeypatch.setattr(bootstrap, "DRAWS", 400)
    low, high = bootstrap.bootstrap_interval(
        lambda d, s: ten_fold_accuracy(d, s).mean, distances, same
    )
    assert (low, high) == pytest.approx((0.8 - 0.025, 0.8 + 0.025), abs=0.006)


def test_the_curve_by_hand() -> None:
    distances = np.array([0.1, 0.2, 0.4, 0.9, 0.3, 0.8, 0.8, 3.0])
    same = np.array([True] * 4 + [False] * 4)
    far, tar = roc_curve(distances, same, points=3)
    np.testing.assert_allclose(far, [0.25, 0.5, 1.0])
    # At most one impostor: t = 0.8 accepts 0.3 alone. At most two: the same, 0.8 is a tie.
    assert tar.tolist() == [0.75, 0.75, 1.0]


def test_pairs_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 pairs are too few for 10 folds"):
        read_bin_sets([tiny.write_bin(tmp_path / "a.bin", pairs=4)])
    with pytest.raises(UserError, match=r"b\.bin: all pairs of fold 1 of 10 .* are same"):
        read_bin_sets([tiny.write_bin(tmp_path / "b.bin", pairs=10)])
    path = tiny.write_bin(tmp_path / "c.bin")
    with pytest.raises(UserError, match="two verification sets are called c"):
        read_bin_sets([path, path])
