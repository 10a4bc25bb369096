"""Statistics of images against plain loops, in as many parts as large data has."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipelines.audit.classes.centres import (
    ClassCentres,
    find_centres,
    group_by_size,
    group_classes,
    halves_relatedness,
)
from pipelines.audit.classes.mixed import MixedStatistics, take_parts
from pipelines.audit.discriminant import learn_discriminant
from pipelines.audit.images import neighbours, scores, strays
from pipelines.audit.images.repeats import repeated_pairs
from pipelines.audit.images.scores import ImageScores
from pipelines.audit.settings import AuditSettings
from pipelines.clustering import settings
from pipelines.clustering.assign import ClassSearch
from pipelines.clustering.members import Members, sort_members
from pipelines.clustering.rows import UnitRows
from pipelines.clustering.state import ClusterState
from pipelines.storage.staging import Journal
from tests.support.data.rows import unit

DIM, CLASSES, IMAGES = 8, 10, 240


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def state(tmp_path: Path) -> ClusterState:
    journal = Journal(f"{tmp_path}/journal", {})
    return ClusterState(f"{tmp_path}/state", journal, lambda stage, done, total: None)


def members_of(counts: list[int]) -> Members:
    """Classes whose images have the numbers 100, 101, ..."""
    return Members(np.arange(100, 100 + sum(counts)), np.array(counts))


def assert_evenly_drawn(drawn: np.ndarray, images: np.ndarray, limit: int) -> None:
    assert len(drawn) == min(limit, len(images)) and np.isin(drawn, images).all()
    if len(drawn):
        gaps, step = np.diff(drawn), len(images) / len(drawn)
        assert ((gaps >= np.floor(step)) & (gaps <= np.ceil(step))).all()
        assert max(drawn[0] - images[0], images[-1] - drawn[-1]) < np.ceil(step)


def test_of_large_classes_some_images_are_drawn_evenly() -> None:
    counts, limit = [3, 0, 7, 4, 1, 25], 4
    members, first = members_of(counts), 1
    drawn = members.some_between(first, 6, limit)
    kept = np.minimum(counts[first:], limit)
    for number, part in enumerate(np.split(drawn, np.cumsum(kept)[:-1]), first):
        assert_evenly_drawn(part, members.of(number), limit)
    assert members.some_between(0, 6, 25).tolist() == members.between(0, 6).tolist()
    table = members.some(np.array([5, 1, 0, 2, 3]), limit)
    assert table.shape == (5, limit)
    for row, number in zip(table, (5, 1, 0, 2, 3), strict=True):
        there = row[row >= 0]
        assert_evenly_drawn(there, members.of(number), limit)
        assert (row[len(there) :] == -1).all()


def some_scores(rng: np.random.Generator) -> tuple[ImageScores, np.ndarray]:
    """Of images of ten classes, some without a label and some without others of their class."""
    labels = rng.integers(-1, CLASSES, IMAGES).astype(np.int32)
    others = np.full((IMAGES, 4), -1, np.int32)
    for row, own in zip(others, labels, strict=True):
        found = rng.permutation(np.delete(np.arange(CLASSES), own if own >= 0 else []))
        row[:] = np.where(np.arange(4) < rng.integers(0, 6), found[:4], -1)
    cosines = -np.sort(-rng.uniform(-1, 1, (IMAGES, 4)), axis=1).astype(np.float32)
    cosines[others < 0] = -1.0
    own = rng.uniform(-1, 1, IMAGES).astype(np.float32)
    own[rng.random(IMAGES) < 0.1] = np.nan
    own[labels < 0] = np.nan
    return ImageScores(own, others, cosines, rng.uniform(-1, 1, IMAGES).astype(np.float32)), labels


def test_classes_that_are_one_are_one_neighbour(rng: np.random.Generator) -> None:
    found, labels = some_scores(rng)
    ids = np.arange(CLASSES)
    ids[[3, 7, 8]] = 1, 2, 2
    near = strays.read_nearness(found, labels, ids, slice(0, IMAGES))
    merged, second = 0, 0
    for n in range(IMAGES):
        own_id = ids[labels[n]] if labels[n] >= 0 else None
        listed = [(c, float(v)) for c, v in zip(found.others[n], found.cosines[n]) if c >= 0]  # noqa: B905
        same = [value for c, value in listed if ids[c] == own_id]
        known = [value for value in (float(found.own[n]), *same) if not np.isnan(value)]
        merged += bool(same)
        np.testing.assert_equal(near.own[n], max(known) if known else np.nan)
        rest = [(c, value) for c, value in listed if ids[c] != own_id]
        after = [(c, value) for c, value in rest if ids[c] != ids[rest[0][0]]]
        wanted = [each[0] if each else (-1, np.nan) for each in (rest, after)]
        second += len(rest) > 1 and bool(after) and after[0] != rest[1]
        assert near.neighbours[n].tolist() == [c for c, _ in wanted]
        np.testing.assert_equal(near.others[n], [value for _, value in wanted])
    assert merged > 10 and second > 5, "both kinds of merging occur"
    assert near.own_class.tolist() == labels.tolist()
    np.testing.assert_equal(near.doubt, near.others[:, 0] - near.own)


@pytest.mark.parametrize("together", [7, 1 << 18])
def test_the_nearest_classes_have_the_own_one_among_them(
    together: int, rng: np.random.Generator, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_PART", together)
    found, labels = some_scores(rng)
    nearest = neighbours.nearest_classes(found, labels, "nearest", state)
    for n in range(IMAGES):
        own = -2.0 if np.isnan(found.own[n]) else float(found.own[n])
        listed = [(own, int(labels[n]))]
        listed += [(float(found.cosines[n, k]), int(found.others[n, k])) for k in range(4)]
        listed.sort(key=lambda pair: -pair[0])
        assert nearest[n].tolist() == [c for _, c in listed[:2]]


def test_a_class_is_described_by_its_images(
    rng: np.random.Generator, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strays, "chunk_rows", lambda dim: 40)  # several groups of classes
    found, labels = some_scores(rng)
    labels[labels == 4] = 5  # a class without images
    members = sort_members(state, "members", labels, CLASSES)
    figures = strays.describe_classes(members, found.own, DIM, state)
    for number in range(CLASSES):
        own = sorted(np.nan_to_num(found.own[labels == number]).tolist())
        if not own:
            assert not figures[number].any()
            continue
        middle, quarter = own[len(own) // 2], own[len(own) // 4]
        expected = [middle, middle - quarter, np.log(len(own))]
        np.testing.assert_allclose(figures[number], expected, atol=1e-6)


def test_a_picture_repeats_the_most_similar_earlier_one() -> None:
    neighbour = np.array([3, 3, -1, 0, 7, 4, 4, 4, 9, 8])
    cosine = np.array([0.95, 0.97, 1, 0.95, 0.99, 0.91, 0.899, 0.99, 0.9, 0.9], np.float32)
    later, earlier = repeated_pairs(neighbour, cosine)
    # 3 is near 0 and 1, which name it; 6 is not near enough to 4; 2 has no neighbour.
    assert later.tolist() == [3, 5, 7, 9] and earlier.tolist() == [1, 4, 4, 8]


@pytest.mark.parametrize("together", [7, 256])
def test_three_images_decide_which_class_is_nearer(
    together: int, rng: np.random.Generator, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strays, "_TESTED", together)
    labels = rng.integers(0, CLASSES, 90).astype(np.int32)
    labels[labels >= 8] = 7
    labels[:3] = 8, 8, 9  # classes of two images and of one
    rows, used = unit(rng.normal(size=(90, DIM))), rng.random(90) < 0.7
    members = sort_members(state, "members", labels, CLASSES + 1)
    images = np.arange(60)
    other = (labels[images] + 1 + rng.integers(0, 9, 60)) % (CLASSES + 1)  # one has no image
    found = strays.is_nearer(
        *(UnitRows(rows), members, used.astype(np.uint8)),
        *(images, labels[images].astype(np.int64), other),
    )

    def mean_of_nearest(image: int, number: int) -> float:
        there = [n for n in np.flatnonzero(labels == number) if used[n] and n != image]
        best = sorted((float(rows[n] @ rows[image]) for n in there), reverse=True)[:3]
        return sum(best) / len(best) if best else -1.0

    expected = [
        mean_of_nearest(n, int(other[n])) > mean_of_nearest(n, int(labels[n])) for n in range(60)
    ]
    assert found.tolist() == expected and 10 < sum(expected) < 50


def test_others_are_found_without_a_row_s_own_class(rng: np.random.Generator) -> None:
    centres, rows = unit(rng.normal(size=(6, DIM))), unit(rng.normal(size=(50, DIM)))
    own = rng.integers(-1, 6, 50)
    search = ClassSearch(centres, np.zeros((1, DIM), np.float32), np.zeros(6, np.int32))
    classes, cosines = scores.find_others(search, rows, own, 3)
    products = rows @ centres.T
    for n in range(50):
        expected = [c for c in np.argsort(-products[n]) if c != own[n]][:3]
        assert classes[n].tolist() == expected
        np.testing.assert_allclose(cosines[n], products[n, expected], atol=1e-6)


def test_images_of_a_large_class_are_looked_up_in_parts(
    rng: np.random.Generator, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "CHUNK_BYTES", 0)  # the least: 1024 images
    counts = [5, 0, 7]
    labels = np.repeat(np.arange(3), counts).astype(np.int32)
    rows, asking = unit(rng.normal(size=(12, 64))), unit(rng.normal(size=(20_000, 64)))
    nearest = np.stack([np.full(20_000, 2), np.full(20_000, 0)], 1).astype(np.int32)
    nearest[:10] = 1, 0  # the first has no image
    base = neighbours.fill_buckets(UnitRows(rows), labels[:, None], 3, "base", state)
    queries = neighbours.fill_buckets(UnitRows(asking), nearest, 3, "queries", state)
    tracemalloc.start()
    try:
        images, cosines = neighbours.find_neighbours(base, queries, "found", state)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < asking.nbytes // 2
    products = asking @ rows.T
    products[:10, 5:] = -1
    assert (images == products.argmax(axis=1)).all()
    np.testing.assert_allclose(cosines, products.max(axis=1), atol=1e-6)


def test_images_near_a_class_that_has_none_find_none(
    rng: np.random.Generator, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Very many are second nearest to a class that none is nearest to: it is a group of its own."""
    monkeypatch.setattr(settings, "CHUNK_BYTES", 0)  # the least: 1024 images
    rows, asking = unit(rng.normal(size=(12, 64))), unit(rng.normal(size=(2_000, 64)))
    base = neighbours.fill_buckets(UnitRows(rows), np.ones((12, 1), np.int32), 2, "base", state)
    empty = np.zeros((2_000, 2), np.int32)
    queries = neighbours.fill_buckets(UnitRows(asking), empty, 2, "queries", state)
    images, cosines = neighbours.find_neighbours(base, queries, "found", state)
    assert (images == neighbours.NO_IMAGE).all() and (cosines == -1).all()


def test_groups_of_classes_count_every_image_that_is_looked_up() -> None:
    """Of a class with very many so many are drawn; all are looked up."""
    sizes = np.array([3, 20_000, 5_000, 2])
    assert group_by_size(sizes, 8_000) == [(0, 2), (2, 3), (3, 4)]
    assert group_classes(sizes, 8_000) == [(0, 3), (3, 4)]


@pytest.mark.parametrize("together", [13, 1 << 14])
def test_recall_is_the_share_whose_nearest_image_was_found(
    together: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", together)
    rows = unit(rng.normal(size=(100, DIM)))
    products = rows @ rows.T
    np.fill_diagonal(products, -1)
    cosines = products.max(axis=1)
    assert neighbours.measure_recall(UnitRows(rows), cosines, 0) == 1.0
    cosines[:30] -= 0.01
    assert neighbours.measure_recall(UnitRows(rows), cosines, 0) == pytest.approx(0.7)


def test_a_part_that_is_cut_off_gets_a_class_of_its_own(
    state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.audit.classes.mixed._PART", 3)
    labels = np.array([0, 1, 1, 2, -1, 2, 1, 0, 2, 3], np.int32)
    part = np.array([1, 1, 0, 1, 1, 0, 1, 0, 1, 1], np.uint8)
    apart = np.array([0.1, 0.5, 0.9, np.nan])
    cut = MixedStatistics(apart, part, np.empty(0))
    found, parents = take_parts(labels, cut, 0.5, state)
    assert parents.tolist() == [0, 1, 2, 3, 1, 2]
    assert found.tolist() == [0, 4, 1, 5, -1, 2, 4, 0, 5, 3]


def test_both_kinds_weigh_the_same_however_many_there_are(rng: np.random.Generator) -> None:
    """The logarithm of the likelihood ratio of two normals, which their numbers do not shift."""
    few, many = rng.normal(1, 0.5, (400, 1)), rng.normal(-1, 0.5, (8000, 1))
    holes = np.concatenate([many, np.full((50, 1), np.nan)])
    learned = learn_discriminant(few, holes)
    assert learned is not None
    values = np.array([[-0.5], [0.0], [0.5]])
    np.testing.assert_allclose(learned.score(values), 8 * values[:, 0], atol=1.0)
    assert np.isnan(learned.score(np.array([[np.nan]]))).all()
    assert learn_discriminant(few[:1], many) is None


def test_centres_are_sums_of_what_is_used_in_two_halves(
    rng: np.random.Generator, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.audit.classes.centres.chunk_rows", lambda dim: 40)
    labels = rng.integers(0, CLASSES, IMAGES).astype(np.int32)
    labels[labels == 4] = 5
    rows = unit(rng.normal(size=(CLASSES, DIM)))[labels] + 0.3 * rng.normal(size=(IMAGES, DIM))
    rows = unit(rows)
    members = sort_members(state, "members", labels, CLASSES)
    found = find_centres(UnitRows(rows), members, AuditSettings(), state)
    used = np.asarray(found.used) > 0
    assert used.mean() > 0.8
    for number in range(CLASSES):
        here = used & (labels == number)
        np.testing.assert_allclose(found.sums[number], rows[here].sum(0), atol=1e-5)
        assert found.counts[number] == here.sum()
        total = (rows[here].astype(np.float64).sum(0) ** 2).sum()
        one, other, both = found.halves[number]
        assert one + other + 2 * both == pytest.approx(total, abs=1e-4)


def test_the_relatedness_of_halves_is_that_of_two_classes() -> None:
    """Of five images three are in one half; the mean cosines are those of the halves."""
    rng = np.random.default_rng(1)
    rows = unit(rng.normal(size=DIM) + 0.5 * rng.normal(size=(5, DIM))).astype(np.float64)
    one, other = rows[:3].sum(0), rows[3:].sum(0)
    halves = np.array([[one @ one, other @ other, one @ other]])
    centres = ClassCentres(np.empty((1, DIM)), np.array([5]), np.empty(0), halves)
    within = [
        (((part @ part.T).sum() - n) / 2 + 3 * 0.4) / (n * (n - 1) / 2 + 3)
        for part, n in ((rows[:3], 3), (rows[3:], 2))
    ]
    expected = (one @ other / 6) / np.sqrt(within[0] * within[1])
    assert halves_relatedness(centres, 0.4)[0] == pytest.approx(expected)
    assert np.isnan(halves_relatedness(centres._replace(counts=np.array([3])), 0.4)[0])


def test_classes_are_in_the_cell_that_is_nearest_to_them(
    rng: np.random.Generator, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "ONE_LEVEL", 10)
    monkeypatch.setattr(scores, "_PART", 7)
    sums = (3 * rng.normal(size=(100, DIM))).astype(np.float32)
    sums[41] = 0  # a class without an image
    empty = np.empty(0)
    search = scores.index_classes(ClassCentres(sums, empty, empty, empty), AuditSettings(), state)
    units = np.asarray(state.array("units", (100, DIM), "float32"))
    filled = np.delete(np.arange(100), 41)
    np.testing.assert_allclose(units[filled], unit(sums[filled]), atol=1e-6)
    assert not units[41].any()
    saved = state.load_small("class_cells")
    assert len(saved["cells"]) == 10
    nearest = (units @ saved["cells"].T).argmax(axis=1)
    assert (saved["owners"] == nearest)[filled].all()
    assert (search.find(units[filled], 1)[1][:, 0] == filled).all()
