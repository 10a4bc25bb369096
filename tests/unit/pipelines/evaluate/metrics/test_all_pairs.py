"""TAR over all pairs in bounded memory, against a plain loop."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import normalize_embeddings
from pipelines.evaluate.metrics import all_pairs, roc
from pipelines.evaluate.metrics.all_pairs import compare_all_pairs
from pipelines.storage.worker_pool import Processes

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
    monkeypatch.setattr(all_pairs, "_BAND", min(tile, 40))
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


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, np.ndarray]:
    """3,000 rows of any length in 300 classes; a tie, a row of zeros and one that is not finite."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 300, 3000)
    rows = rng.standard_normal((300, 16))[labels] + 1.2 * rng.standard_normal((3000, 16))
    rows = (5 * rows).astype(np.float32)
    rows[7], rows[11], rows[13] = rows[1500], 0, np.nan
    return rows, labels


def exact(rows: np.ndarray, labels: np.ndarray, fars: tuple[float, ...]) -> dict[float, float]:
    """TAR from all scores in float64, none left out."""
    unit = normalize_embeddings(rows)
    first, second = np.triu_indices(len(rows), 1)
    scores = np.round((unit @ unit.T)[first, second], 12)
    same = labels[first] == labels[second]
    impostors = -np.sort(-scores[~same])
    return {far: np.mean(scores[same] > impostors[int(far * len(impostors))]) for far in fars}


TYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sampled", [1 << 10, 1 << 14])
@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_products_only_choose_what_float64_decides(
    many: tuple[np.ndarray, np.ndarray],
    sampled: int,
    dense: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether few pairs of a tile are scored again or all of it; and none is missed."""
    monkeypatch.setattr(all_pairs, "_quickest_type", lambda width: dtype)
    monkeypatch.setattr(roc, "SAMPLED", sampled)
    monkeypatch.setattr(all_pairs, "_DENSE", dense)
    monkeypatch.setattr(all_pairs, "_BAND", 500)
    monkeypatch.setattr(all_pairs, "_TILE", 999)
    fars = (1e-6, 1e-5, 1e-4, 1e-3)
    found = all_pairs.compare_all_pairs(*many, fars)
    assert found.tar == exact(*many, fars)
    # A score that decided by itself would differ somewhere: each pair near the limit does.
    unit = normalize_embeddings(many[0])
    rounded = torch.tensor(unit).to(dtype)
    assert not np.array_equal((rounded @ rounded.T).double().numpy(), unit @ unit.T)


@pytest.mark.parametrize(("dtype", "reached"), [(torch.float32, 0.0), (torch.bfloat16, 0.5)])
def test_a_product_errs_by_no_more_than_its_bound(dtype: torch.dtype, reached: float) -> None:
    """In bfloat16, equal rows whose every number is nearly the mean of two come near it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 250, generator=generator, dtype=torch.float64)
    rows[:8] = 1  # 129.53 times the distance of two such numbers of bfloat16, once of length 1
    unit = (rows / rows.norm(dim=1, keepdim=True)).float()
    computed = (unit.to(dtype) @ unit.to(dtype).T).double()
    largest = float((computed - unit.double() @ unit.double().T).abs().max())
    bound = all_pairs.product_error(dtype, 250)
    assert reached * bound < largest <= bound


def test_a_bound_below_zero_is_not_compared_by_the_bits_of_bfloat16(
    many: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_pairs, "_quickest_type", lambda width: torch.bfloat16)
    monkeypatch.setattr(all_pairs, "sampled_bound", lambda *given: -0.2)
    assert compare_all_pairs(*many, (1e-3,)).tar == exact(*many, (1e-3,))


def test_a_sample_that_misleads_is_noticed(
    many: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roc, "SAMPLED", 1 << 10)
    bounds: list[float] = []

    def too_high(*given: Any) -> float:
        bounds.append(0.999 if len(bounds) < 2 else roc.sampled_bound(*given))
        return bounds[-1]

    monkeypatch.setattr(all_pairs, "sampled_bound", too_high)
    assert compare_all_pairs(*many, (1e-3,)).tar == exact(*many, (1e-3,))
    assert len(bounds) == 3


def test_few_pairs_are_scored_twice(
    many: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roc, "SAMPLED", 1 << 14)
    scored: list[int] = []
    score = all_pairs._RowFiles.score

    def counted(files: all_pairs._RowFiles, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        scored.append(len(first))
        return score(files, first, second)

    monkeypatch.setattr(all_pairs._RowFiles, "score", counted)
    found = compare_all_pairs(*many, (1e-4,))
    assert 448 < sum(scored[1:]) < 0.01 * found.impostors


def test_rows_that_are_mapped_in_half_precision(
    many: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    half = many[0].astype(np.float16)
    np.save(tmp_path / "rows.npy", half)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert compare_all_pairs(mapped, many[1], (1e-3,)).tar == exact(half, many[1], (1e-3,))


@pytest.mark.slow
def test_processes_find_the_same(many: tuple[np.ndarray, np.ndarray]) -> None:
    two = compare_all_pairs(*many, (1e-4,), Processes(2))
    assert two == compare_all_pairs(*many, (1e-4,))
