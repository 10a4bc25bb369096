"""What a report shows of mistakes equals a plain look at all pairs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.evaluate.metrics import hard_cases
from pipelines.evaluate.metrics.hard_cases import IdentifiedSet, find_hard_cases
from pipelines.evaluate.metrics.identification import identify
from pipelines.evaluate.metrics.projection import CLASSES, IMAGES_PER_CLASS, map_embeddings


def noisy_set(classes: int, per_class: int, enrolled: int, noise: float) -> IdentifiedSet:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes) * 7 + 3, per_class)
    centres = rng.normal(size=(classes, 8)).repeat(per_class, 0)
    rows = centres + noise * rng.normal(size=centres.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    is_entry = np.tile(np.arange(per_class) < enrolled, classes)
    gallery, probes = np.flatnonzero(is_entry), np.flatnonzero(~is_entry)
    result = identify(rows[gallery], labels[gallery], rows[probes], labels[probes])
    return IdentifiedSet(rows, labels, gallery, probes, result)


@pytest.mark.parametrize("enrolled", [1, 3])
def test_they_are_those_of_all_pairs(enrolled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hard_cases, "_PAIRS", 7)
    found = noisy_set(9, 6, enrolled, 0.6)
    cases = find_hard_cases(found)
    scores = found.rows @ found.rows.T
    lowest: dict[int, float] = {}
    highest: dict[tuple[int, int], float] = {}
    for probe in found.probes:
        for entry in found.gallery:
            own, other, score = found.labels[probe], found.labels[entry], scores[probe, entry]
            if own == other:
                lowest[own] = min(lowest.get(own, 9.0), score)
            else:
                pair = (min(own, other), max(own, other))
                highest[pair] = max(highest.get(pair, -9.0), score)
    wanted = sorted(lowest.values())
    np.testing.assert_allclose(cases["genuine_scores"], wanted[: hard_cases.SHOWN])
    for kind in ("genuine", "impostor"):
        pairs = cases[f"{kind}_pairs"]
        np.testing.assert_allclose(cases[f"{kind}_scores"], scores[tuple(pairs.T)])
        np.testing.assert_array_equal(cases[f"{kind}_classes"], found.labels[pairs])
        assert (
            np.isin(pairs[:, 0], found.probes).all() and np.isin(pairs[:, 1], found.gallery).all()
        )
    np.testing.assert_allclose(cases["impostor_scores"][:3], sorted(highest.values())[::-1][:3])


def test_confused_classes_are_counted_over_both_directions() -> None:
    found = noisy_set(9, 6, 1, 0.9)
    cases = find_hard_cases(found)
    missed = found.result.ranks > 1
    taken = found.labels[found.gallery[found.result.nearest[:, 0]]]
    own = found.labels[found.probes]
    counts: dict[frozenset[int], int] = {}
    for a, b in zip(own[missed].tolist(), taken[missed].tolist(), strict=True):
        counts[frozenset((a, b))] = counts.get(frozenset((a, b)), 0) + 1
    assert cases["confused_counts"][:, 0].tolist() == sorted(counts.values())[::-1][:12]
    for pair, (count, of) in zip(
        cases["confused"].tolist(), cases["confused_counts"].tolist(), strict=True
    ):
        assert counts[frozenset(pair)] == count and of == 10
    np.testing.assert_array_equal(cases["confused"], found.labels[cases["confused_images"]])


def test_accuracy_by_class_adds_up_to_rank_1() -> None:
    found = noisy_set(9, 6, 1, 0.6)
    counts = find_hard_cases(found)["class_accuracy"]
    assert counts.sum() == 9
    own = found.labels[found.probes]
    share = [(found.result.ranks[own == each] == 1).mean() for each in np.unique(own)]
    assert counts[-1] == sum(each == 1 for each in share)
    assert counts[:5].sum() == sum(each < 0.499 for each in share)


def uneven_set() -> IdentifiedSet:
    """Classes of 2 to 9 images, of which 0 to 3 are enrolled: of class 0 and 4 none is."""
    rng = np.random.default_rng(3)
    sizes, enrolled = np.array([4, 9, 3, 6, 2, 7, 5, 8]), np.array([0, 1, 2, 3, 0, 1, 2, 3])
    labels = np.repeat(np.arange(8) * 5, sizes)
    rows = rng.normal(size=(8, 6)).repeat(sizes, 0) + 0.9 * rng.normal(size=(len(labels), 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    within = np.concatenate([np.arange(size) for size in sizes])
    is_entry = within < np.repeat(enrolled, sizes)
    gallery, probes = np.flatnonzero(is_entry), np.flatnonzero(~is_entry)
    result = identify(rows[gallery], labels[gallery], rows[probes], labels[probes])
    return IdentifiedSet(rows, labels, gallery, probes, result)


def test_strangers_are_no_mistake_and_no_class_with_an_accuracy() -> None:
    """A probe whose class is not enrolled cannot be found, so it is neither missed nor counted."""
    found = uneven_set()
    cases, ranks = find_hard_cases(found), found.result.ranks
    own = found.labels[found.probes]
    bins, counts = [0] * 11, dict[frozenset[int], int]()
    for each in sorted(set(own[ranks > 0].tolist())):
        bins[int(10 * np.mean(ranks[own == each] == 1) + 1e-9)] += 1
    assert cases["class_accuracy"].tolist() == bins and sum(bins) == 6
    assert any(bins[1:10]), "some classes are found in part"
    for probe in np.flatnonzero(ranks > 1).tolist():
        nearest = found.labels[found.gallery[found.result.nearest[probe]]]
        pair = frozenset((int(own[probe]), int(nearest[nearest != own[probe]][0])))
        counts[pair] = counts.get(pair, 0) + 1
    sizes = {each: int((own == each).sum()) for each in range(0, 40, 5)}
    assert cases["confused_counts"][:, 0].tolist() == sorted(counts.values())[::-1][:12]
    for pair, (count, of) in zip(
        cases["confused"].tolist(), cases["confused_counts"].tolist(), strict=True
    ):
        assert (count, of) == (counts[frozenset(pair)], sizes[pair[0]] + sizes[pair[1]])


def test_the_furthest_entry_of_a_class_is_one_of_that_class() -> None:
    """Of as many entries as it has: none, one, two or three."""
    found = uneven_set()
    lowest: dict[int, float] = {}
    for probe in found.probes.tolist():
        own = found.gallery[found.labels[found.gallery] == found.labels[probe]]
        if len(own):
            score = float((found.rows[own] @ found.rows[probe]).min())
            label = int(found.labels[probe])
            lowest[label] = min(lowest.get(label, 9.0), score)
    cases = find_hard_cases(found)
    np.testing.assert_allclose(cases["genuine_scores"], sorted(lowest.values()))
    assert (cases["genuine_classes"][:, 0] == cases["genuine_classes"][:, 1]).all()


def test_a_perfect_model_confuses_nothing() -> None:
    cases = find_hard_cases(noisy_set(4, 3, 1, 0.0))
    assert cases["confused"].shape == cases["confused_images"].shape == (0, 2)
    assert cases["class_accuracy"].tolist() == [0] * 10 + [4]
    assert len(cases["genuine_scores"]) == 4 and len(cases["impostor_scores"]) > 0


def test_what_is_kept_does_not_grow_with_the_set() -> None:
    small, large = (find_hard_cases(noisy_set(n, 6, 1, 0.9)) for n in (30, 300))
    assert {k: v.shape for k, v in small.items()} == {k: v.shape for k, v in large.items()}


def test_the_map_shows_whole_classes_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    found = noisy_set(40, 20, 1, 0.1)
    drawn = map_embeddings(found.rows, found.labels, 1)
    counts = np.unique(drawn["map_classes"], return_counts=True)[1]
    assert counts.tolist() == [IMAGES_PER_CLASS] * CLASSES
    again = map_embeddings(found.rows, found.labels, 1)
    np.testing.assert_array_equal(drawn["map_points"], again["map_points"])
    assert "principal components" in str(drawn["map_method"])
    other = map_embeddings(found.rows, found.labels, 2)
    assert set(drawn["map_classes"]) != set(other["map_classes"])


def test_the_map_is_the_plane_of_most_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    rows = noisy_set(5, 6, 1, 0.5).rows
    drawn = map_embeddings(rows, np.repeat(np.arange(5), 6), 0)
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    np.testing.assert_allclose(drawn["map_points"].var(axis=0), values[:2], rtol=1e-5)
    assert f"{values[:2].sum() / values.sum():.0%}" in str(drawn["map_method"])


def test_umap_makes_the_map_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, **settings: Any) -> None:
            assert settings == {
                "n_neighbors": 15,
                "metric": "cosine",
                "random_state": 1,
                "n_jobs": 1,
            }

        def fit_transform(self, rows: Any) -> Any:
            return rows[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Fake))
    found = noisy_set(9, 6, 1, 0.6)
    drawn = map_embeddings(found.rows, found.labels, 1)
    assert str(drawn["map_method"]).startswith("UMAP")
    np.testing.assert_allclose(drawn["map_points"], found.rows[drawn["map_images"], :2], rtol=1e-6)


def test_the_map_leaves_out_classes_of_a_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than four are no cluster, unless no class has more."""
    monkeypatch.setitem(sys.modules, "umap", None)
    rows = np.random.default_rng(0).normal(size=(30, 5))
    labels = np.repeat([0, 1, 2, 3, 4], [3, 4, 9, 1, 13])
    assert set(map_embeddings(rows, labels, 0)["map_classes"]) == {1, 2, 4}
    few = np.repeat(np.arange(15), 2)
    assert set(map_embeddings(rows, few, 0)["map_classes"]) == set(range(15))


@pytest.mark.parametrize(("images", "dim"), [(2, 8), (9, 2)])
def test_too_little_for_a_map(images: int, dim: int) -> None:
    assert map_embeddings(np.eye(images, dim), np.zeros(images, np.int64), 0) == {}
