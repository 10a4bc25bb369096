"""Parts of a clustering against plain NumPy: rows, cells, splits, bounds, figures."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.clustering.assign import NO_CLASS, ClassSearch, Labels
from pipelines.clustering.balance import balance_classes, plan_splits
from pipelines.clustering.estimate import Rates, estimate_work
from pipelines.clustering.hierarchy import _split_cells, deal_classes
from pipelines.clustering.kmeans import find_nearest, spherical_kmeans
from pipelines.clustering.members import Members, sort_members
from pipelines.clustering.quality import (
    choose_classes,
    mean_similarities,
    measure_agreement,
    measure_recall,
)
from pipelines.clustering.rows import UnitRows
from pipelines.clustering.selection import (
    DUPLICATE,
    KEPT,
    OUTLIER,
    KeptLabels,
    drop_images,
    find_duplicates,
    near_enough,
)
from pipelines.clustering.settings import (
    SAMPLE_BYTES,
    ClusterSettings,
    chunk_rows,
    sample_size,
)
from pipelines.clustering.state import ClusterState
from pipelines.shards.similarities import decode_similarities, encode_similarities
from pipelines.storage.staging import Journal
from tests.support.data.rows import unit


def draw(count: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


@pytest.fixture
def state(tmp_path: Path) -> ClusterState:
    journal = Journal(f"{tmp_path}/journal", {})
    return ClusterState(f"{tmp_path}/state", journal, lambda stage, done, total: None)


def mapped(path: Path, matrix: np.ndarray) -> np.ndarray:
    """A file of rows as a folder of embeddings maps it: not by `numpy.memmap`."""
    np.save(path, matrix)
    with path.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    begin = len(pages) - matrix.nbytes
    return np.frombuffer(pages, matrix.dtype, matrix.size, begin).reshape(matrix.shape)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_of_a_mapped_file_are_directions(tmp_path: Path, dtype: str) -> None:
    matrix = draw(50, 8).astype(dtype)
    matrix[3], matrix[4, 0], matrix[5, 1] = 0, np.nan, np.inf
    rows = UnitRows(mapped(tmp_path / "rows.npy", matrix))
    expected = matrix.astype(np.float64)
    expected[3:6] = 0
    expected[[*range(3), *range(6, 50)]] = unit(expected[[*range(3), *range(6, 50)]], float)
    numbers = np.array([40, 3, 7, 7])
    np.testing.assert_allclose(rows.read(2, 30), expected[2:30], atol=1e-6)
    np.testing.assert_allclose(rows.gather(numbers), expected[numbers], atol=1e-6)
    mean = np.full(8, 0.1, np.float32)
    centered = rows.centered(mean).read(0, 50)
    np.testing.assert_allclose(centered[6:], unit(expected[6:] - 0.1, float), atol=1e-6)
    assert not centered[3:6].any()


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.data())
def test_cells_get_their_share_of_the_classes(images: list[int], data: st.DataObject) -> None:
    counts = np.array(images)
    if not counts.any():
        counts[0] = 5
    classes = data.draw(st.integers(int((counts > 0).sum()), int(counts.sum())))
    shares = deal_classes(classes, counts)
    assert shares.sum() == classes
    assert ((shares >= (counts > 0)) & (shares <= counts)).all()
    exact = classes * counts / counts.sum()
    free = (shares > 1) & (shares < counts)  # neither bound holds them
    assert (np.abs(shares - exact)[free] < 1 + np.maximum(0, (counts > 0) - exact).sum()).all()


def test_a_crowded_cell_is_split_and_an_empty_one_left_out(state: ClusterState) -> None:
    """Of six cells one has 100 of 120 images, five times the average, and one has none."""
    cells = np.eye(8, dtype=np.float32)[:6]
    owner = np.repeat(np.arange(5), [100, 5, 5, 5, 5])
    rows = cells[owner] + 0.05 * draw(120, 8)
    rows[:100, 6] += np.tile([0.6, -0.6, 0, 0, 0], 20)
    rows[:100, 7] += np.tile([0, 0, 0.6, -0.6, 0], 20)
    _split_cells(UnitRows(rows), cells, ClusterSettings(36), state, 0)
    found = state.load_small("cells-1")["centres"]
    np.testing.assert_array_equal(found[:4], cells[1:5])
    assert len(found) == 4 + 5  # as many as make the average
    counts = np.bincount(np.argmax(unit(rows) @ found.T, axis=1), minlength=9)
    assert counts[:4].tolist() == [5] * 4
    assert counts[4:].sum() == 100 and counts[4:].min() > 0 and counts.max() <= 60


def test_a_kmeans_learns_from_a_bounded_sample() -> None:
    assert sample_size(10, 64, 1000) == 1000
    assert sample_size(10, 64, 10**6) == 2560
    assert sample_size(2000, 2048, 10**9) * 4 * 2048 == SAMPLE_BYTES


def test_images_are_read_in_bounded_parts() -> None:
    assert [chunk_rows(dim) for dim in (64, 512, 1024, 10**6)] == [32768, 32768, 16384, 1024]


def test_kmeans_is_spherical_and_the_same_each_time() -> None:
    points = unit(np.repeat(draw(12, 16, 1), 30, axis=0) + 0.2 * draw(360, 16, 2))
    points = points.astype(np.float32)
    centres = spherical_kmeans(points, 12, 5)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(centres, spherical_kmeans(points, 12, 5))
    assert (centres != spherical_kmeans(points, 12, 6)).any()
    products, positions = find_nearest(points, centres, 3)
    expected = points @ centres.T
    np.testing.assert_array_equal(positions, np.argsort(-expected, axis=1)[:, :3])
    np.testing.assert_allclose(products, -np.sort(-expected, axis=1)[:, :3], atol=1e-5)


def test_classes_are_found_in_the_cells_nearest_to_an_image() -> None:
    cells, centres = unit(draw(20, 16, 1)), unit(draw(200, 16, 2))
    cells, centres = cells.astype(np.float32), centres.astype(np.float32)
    owners = np.random.default_rng(3).integers(0, 20, 200).astype(np.int32)
    owners[owners == 4] = 5  # a cell without classes
    rows = unit(draw(300, 16, 4))
    rows[7] = 0
    cosines, classes = ClassSearch(centres, cells, owners).find(rows, 5)
    filled = np.array([cell for cell in range(20) if cell != 4])
    for row in (*range(0, 7), *range(8, 300, 17)):
        probed = filled[np.argsort(-cells[filled] @ rows[row])[:8]]
        products = np.where(np.isin(owners, probed), centres @ rows[row], -9)
        np.testing.assert_array_equal(classes[row], np.argsort(-products)[:5])
        np.testing.assert_allclose(cosines[row], -np.sort(-products)[:5], atol=1e-5)
    assert (classes[7] == NO_CLASS).all()
    one = ClassSearch(centres, cells[:1], np.zeros(200, np.int32)).find(rows, 5)[1]
    np.testing.assert_array_equal(one[8:], np.argsort(-rows[8:] @ centres.T, axis=1)[:, :5])


def test_cells_with_fewer_classes_than_asked_for_leave_places_empty() -> None:
    centres = unit(draw(3, 8))
    search = ClassSearch(centres, centres, np.arange(3, dtype=np.int32))
    cosines, classes = search.find(centres, 5)
    np.testing.assert_array_equal(classes[:, 0], [0, 1, 2])
    assert (np.sort(classes[:, :3]) == [0, 1, 2]).all() and (classes[:, 3:] == NO_CLASS).all()
    assert (cosines[:, 3:] == -1).all()


@pytest.mark.parametrize("together", [7, 1 << 15])
def test_recall_is_the_share_whose_nearest_class_of_all_was_found(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes are dealt to cells at random, so that the nearest one is often in none of the 8."""
    monkeypatch.setattr("pipelines.clustering.quality._CENTRES", together)
    cells, centres = unit(draw(20, 16, 1)), unit(draw(200, 16, 2))
    cells, centres = cells.astype(np.float32), centres.astype(np.float32)
    matrix = unit(draw(300, 16, 4))
    matrix[7] = 0  # has no nearest one
    owners = np.random.default_rng(3).integers(0, 20, 200).astype(np.int32)
    found = measure_recall(UnitRows(matrix), ClassSearch(centres, cells, owners), centres, 0)
    there = np.delete(matrix, 7, axis=0)
    right = []
    for row in there:
        probed = np.argsort(-cells @ row)[:8]
        right.append(bool(np.isin(owners[int(np.argmax(centres @ row))], probed)))
    assert found == pytest.approx(np.mean(right), abs=1e-12) and 0.2 < found < 0.8
    one = ClassSearch(centres, cells[:1], np.zeros(200, np.int32))
    assert measure_recall(UnitRows(matrix), one, centres, 0) == 1.0
    assert measure_recall(UnitRows(matrix[7:8]), one, centres, 0) == 1.0


def test_images_are_sorted_by_class(state: ClusterState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.clustering.members._CHUNK", 13)
    classes = np.random.default_rng(0).integers(-1, 9, 100).astype(np.int32)
    classes[classes == 4] = 3
    members = sort_members(state, "members", classes, 9)
    for number in range(9):
        np.testing.assert_array_equal(members.of(number), np.flatnonzero(classes == number))
    expected = np.concatenate([np.flatnonzero(classes == n) for n in range(2, 6)])
    np.testing.assert_array_equal(members.between(2, 6), expected)


@pytest.mark.parametrize(
    ("counts", "bound", "plan"),
    [
        ([10, 10, 10], 20, {}),
        ([30, 0, 10], 99, {0: [1]}),  # an empty class gets the largest one's images
        ([90, 0, 0, 10], 999, {0: [1, 2]}),
        ([60, 50, 0, 0], 999, {0: [2], 1: [3]}),
        ([100, 2, 20, 20, 20], 60, {0: [1]}),  # a tiny class is given up for one above the bound
        ([100, 2, 20, 20, 20], 200, {}),
        ([100, 12, 20, 20, 20], 60, {}),  # none is tiny
        ([1, 1, 0], 9, {}),  # nothing can be split
        ([3, 0, 0, 0], 9, {0: [1, 2]}),  # never into more parts than images
    ],
)
def test_places_of_empty_and_tiny_classes_go_to_large_ones(
    counts: list[int], bound: float, plan: dict[int, list[int]]
) -> None:
    found = plan_splits(np.array(counts), bound)
    assert {chosen: places.tolist() for chosen, places in found} == plan


def test_a_part_of_a_large_class_is_found_in_the_cell_of_the_large_one(
    state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is compared with the classes of the nearest cell alone; the place that becomes
    free is in the other one, where no image of the large class would look."""
    monkeypatch.setattr("pipelines.clustering.assign.PROBES", 1)
    axes = np.eye(8, dtype=np.float32)
    cells = unit(np.stack([axes[0], axes[7]]))
    directions = unit(
        np.stack([axes[0] + axes[1], axes[0] + axes[2], axes[7] + axes[3], axes[7] + axes[4]])
    )
    of = np.repeat([0, 1, 2, 3], [20, 20, 10, 10])
    rows = unit(directions[of] + 0.01 * draw(60, 8))
    settings = ClusterSettings(4, 1, max_size=1.0, rounds=1, center=False)
    centres = state.array("centres", (4, 8), "float32")
    centres[:] = [cells[0], *directions[2:], -cells[1]]  # the last one is nearest to no image
    state.save_small("layout", cells=cells, owners=np.array([0, 1, 1, 1], np.int32))
    labels = balance_classes(UnitRows(rows), settings, state)
    np.testing.assert_array_equal(labels.classes[:, 0], np.argmax(rows @ centres.T, axis=1))
    assert np.bincount(labels.classes[:, 0]).tolist() == [20, 10, 10, 20]


def test_a_further_class_is_kept_if_it_is_near_enough() -> None:
    classes = np.array([[4, 2, 7], [1, 0, NO_CLASS], [NO_CLASS] * 3], np.int32)
    cosines = np.array([[0.8, 0.71, 0.69], [1.0, 0.999, 0], [0, 0, 0]], np.float32)
    kept = near_enough(classes, encode_similarities(cosines), 1.5)
    assert kept.tolist() == [[True, True, False], [True, False, False], [False] * 3]
    kept = near_enough(classes, encode_similarities(cosines), 0)
    assert kept.tolist() == [[True, True, True], [True, True, False], [False] * 3]


def test_similarities_are_kept_to_sixteen_bits() -> None:
    cosines = np.linspace(-1.001, 1.001, 999).astype(np.float32)
    values = encode_similarities(cosines)
    assert values.dtype == np.uint16 and values[[0, -1]].tolist() == [0, 65535]
    np.testing.assert_allclose(decode_similarities(values), np.clip(cosines, -1, 1), atol=1.6e-5)


def greedy_duplicates(rows: np.ndarray, threshold: float) -> list[bool]:
    kept: list[int] = []
    for number, row in enumerate(rows):
        if all(rows[other] @ row < threshold for other in kept):
            kept.append(number)
    return [number not in kept for number in range(len(rows))]


def test_of_near_duplicates_the_first_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.clustering.selection._BLOCK", 16)
    base = draw(30, 8, 1)
    rows = unit(base[np.random.default_rng(2).integers(0, 30, 90)] + 0.05 * draw(90, 8, 3))
    images = np.arange(5, 90)
    found = find_duplicates(UnitRows(rows), images, 0.98)
    assert found.tolist() == greedy_duplicates(rows[5:], 0.98)
    assert 30 < found.sum() < 80


def some_labels(images: int, classes: int, per_image: int) -> Labels:
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((images, classes)) * np.arange(1, classes + 1), axis=1)
    cosines = -np.sort(-rng.integers(0, 40, (images, per_image)) / 40, axis=1)
    labels = Labels(ids[:, :per_image].astype(np.int32), encode_similarities(cosines))
    labels.classes[5] = NO_CLASS
    return labels


def test_no_class_is_larger_than_the_bound_and_none_is_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.clustering.selection._PART", 64)
    monkeypatch.setattr("pipelines.clustering.selection._PAIRS", 100)
    labels, dropped = some_labels(300, 12, 3), np.zeros(300, np.uint8)
    first = np.flatnonzero(np.isin(labels.classes[:, 0], [6, 9]))  # 9 is nobody's nearest
    labels.classes[first] = np.roll(labels.classes[first], -1, axis=1)
    first = first[np.isin(labels.classes[first, 0], [6, 9])]
    labels.classes[first] = np.roll(labels.classes[first], -1, axis=1)
    labels.classes[labels.classes == 6] = NO_CLASS  # an empty class
    dropped[[1, 2]] = 1, 2
    settings = ClusterSettings(12, 3, further_within=0, max_size=1.2)
    selection = KeptLabels(labels, dropped, settings)

    used = {int(labels.classes[n, 0]) for n in range(300) if not dropped[n]} - {NO_CLASS}
    assert len(used) == 10
    pairs = [
        (int(labels.classes[n, k]), -int(labels.similarities[n, k]), n, k)
        for n in range(300)
        for k in range(3)
        if not dropped[n] and int(labels.classes[n, k]) in used
    ]
    bound = int(1.2 * len(pairs) / len(used))
    kept = set()
    for number in range(12):
        kept.update(sorted(pair for pair in pairs if pair[0] == number)[:bound])
    numbers = {old: new for new, old in enumerate(sorted({pair[0] for pair in kept}))}
    expected = [
        [numbers[c] for k in range(3) for c in [int(labels.classes[n, k])] if (n, k) in places]
        for places in [{(pair[2], pair[3]) for pair in kept}]
        for n in range(300)
    ]
    found, similarities = [], []
    for part in selection.parts():
        found += [part.lists.of(n).tolist() for n in range(len(part.lists.ends))]
        similarities += part.similarities.tolist()
    assert found == expected
    assert selection.num_classes == len(used) and 6 not in numbers
    assert selection.sizes.tolist() == np.bincount(np.concatenate(found).astype(int)).tolist()
    assert selection.sizes.max() == bound and selection.bounded > 0
    assert similarities == [-q for n, k, q in sorted((n, k, q) for _, q, n, k in kept)]
    assert (selection.broken, selection.duplicates, selection.outliers) == (1, 1, 1)
    assert selection.by_count.tolist() == np.bincount([len(each) for each in found]).tolist()
    assert selection.full == found.count([]) - 3

    nearest = Labels(np.zeros(300, np.int32), np.zeros(300, np.uint16))
    selection.write_nearest(nearest)
    assert nearest.classes.tolist() == [each[0] if each else NO_CLASS for each in found]
    counts = np.bincount(nearest.classes[nearest.classes >= 0], minlength=len(used))
    monkeypatch.setattr("pipelines.clustering.quality._IMAGES", 64)
    means = mean_similarities(nearest, counts)
    cosines = decode_similarities(nearest.similarities)
    assert means[3] == pytest.approx(cosines[nearest.classes == 3].mean(), abs=1e-6)


def plain_outliers(labels: Labels, duplicate: np.ndarray, share: float) -> list[int]:
    """Whole ties of the least similar images, as long as they are at most the share."""
    considered = np.flatnonzero(~duplicate & (labels.classes[:, 0] != NO_CLASS))
    nearest = labels.similarities[considered, 0]
    outliers: list[int] = []
    for value in np.unique(nearest):
        tie = considered[nearest == value].tolist()
        if len(outliers) + len(tie) > share * len(considered):
            break
        outliers += tie
    return sorted(outliers)


@pytest.mark.parametrize("part", [64, 1 << 18])
@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_outliers_are_whole_ties_of_the_least_similar_within_the_share(
    share: float, part: int, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.clustering.selection._PART", part)
    labels = some_labels(300, 12, 3)
    rows = UnitRows(unit(draw(300, 8)))
    repeated = np.setdiff1d(np.arange(0, 300, 3), [5])  # they count in no share
    state.array("dropped", (300,), "uint8")[repeated] = DUPLICATE
    found = np.asarray(drop_images(rows, labels, ClusterSettings(12, 3, outliers=share), state))
    expected = plain_outliers(labels, found == DUPLICATE, share)
    assert np.flatnonzero(found == OUTLIER).tolist() == expected and expected
    assert np.flatnonzero(found == DUPLICATE).tolist() == repeated.tolist()
    assert found[5] == KEPT, "it has no class"


@pytest.mark.parametrize("together", [7, 1 << 20])
def test_agreement_with_labels_is_that_of_a_plain_computation(
    together: int, state: ClusterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.clustering.quality._IMAGES", together)
    rng = np.random.default_rng(4)
    labels = rng.integers(-1, 5, 200)
    classes = np.where(rng.random(200) < 0.7, labels % 4, rng.integers(0, 7, 200)).astype(np.int32)
    members = sort_members(state, "members", classes, 7)
    found = measure_agreement(members, lambda numbers: labels[numbers])

    both = labels >= 0
    table = np.zeros((7, 5))
    np.add.at(table, (classes[both], labels[both]), 1)
    p = table / table.sum()
    entropies = [-(q[q > 0] * np.log(q[q > 0])).sum() for q in (p.sum(0), p.sum(1), p.ravel())]
    nmi = (entropies[0] + entropies[1] - entropies[2]) / ((entropies[0] + entropies[1]) / 2)
    assert found.purity == pytest.approx(table.max(1).sum() / both.sum(), abs=1e-12)
    assert found.nmi == pytest.approx(nmi, abs=1e-9)
    assert (found.labels, found.images) == (5, both.sum())


def test_agreement_at_its_ends() -> None:
    members = Members(np.arange(40), np.full(8, 5))
    perfect = measure_agreement(members, lambda numbers: numbers // 5)
    assert (perfect.purity, perfect.nmi) == (1.0, pytest.approx(1.0))
    assert measure_agreement(members, lambda numbers: np.full(len(numbers), -1)).images == 0


def test_classes_to_look_at() -> None:
    counts, similarities = np.array([0, 5, 1, 9, 3]), np.array([0, 0.4, 0.1, 0.8, 0.3])
    shown = choose_classes(counts, similarities, 2, 0)
    assert shown["largest"] == [3, 1] and shown["loosest"] == [4, 1]
    assert len(shown["random"]) == 2 and 0 not in shown["random"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ClusterSettings(101), "--classes 101: there are 100 images"),
        (ClusterSettings(10, max_size=0.5), "--max-size 0.5: .* 1 or more, or 0"),
        (ClusterSettings(10, further_within=0.9), "--further-within 0.9: .*1 or more, or 0"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: ClusterSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.validate(100)


def test_the_estimate_grows_with_the_work() -> None:
    rates = Rates(1e10, 1e9)

    def seconds(samples: int, classes: int) -> float:
        return estimate_work(samples, 512, ClusterSettings(classes), 2, rates).seconds

    assert seconds(10**7, 10**5) > 5 * seconds(10**6, 10**5)
    assert seconds(10**7, 10**6) > 2 * seconds(10**7, 10**5)
    large = estimate_work(10**7, 512, ClusterSettings(10**5), 2, rates)
    assert large.memory < 4 << 30
    assert estimate_work(10**8, 512, ClusterSettings(10**5), 2, rates).memory == large.memory


def test_a_file_of_another_size_is_made_again(state: ClusterState) -> None:
    state.array("numbers", (4,), "int32")[:] = 7
    state.remove("numbers")
    assert state.array("numbers", (4,), "int32").tolist() == [0] * 4
    Path(f"{state.folder}/short").write_bytes(b"\1\2")
    assert state.array("short", (3,), "uint16").tolist() == [0] * 3


def test_a_stage_whose_file_is_gone_is_done_again(state: ClusterState, tmp_path: Path) -> None:
    def count() -> None:
        state.array("numbers", (4,), "int32")[:] += 7

    def begin_again() -> ClusterState:
        return ClusterState(
            f"{tmp_path}/state", Journal(f"{tmp_path}/journal", {}), lambda *_: None
        )

    state.once("count", count)
    state.array("used", (2,), "int32")
    state.mark("used")
    state.remove("used")  # no later stage reads it: it is not missed
    state = begin_again()
    assert state.is_done("count") and state.array("numbers", (4,), "int32").tolist() == [7] * 4
    Path(f"{tmp_path}/state/numbers").unlink()
    state = begin_again()
    assert not state.is_done("count")
    state.once("count", count)
    assert state.array("numbers", (4,), "int32").tolist() == [7] * 4
    state.finish()
    assert begin_again().is_finished
