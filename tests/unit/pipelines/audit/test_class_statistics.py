"""Statistics of classes against plain float64 loops: centres, relatedness, cuts, neighbours."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest

from pipelines.audit.classes.centres import (
    Segments,
    alternate,
    group_classes,
    keep_similar,
    leave_one_out,
    mix,
    relatedness,
    within_cosine,
)
from pipelines.audit.classes.mixed import cut_classes
from pipelines.audit.classes.pairs import count_crossings, group_pairs, measure_mixing, merged_ids
from pipelines.audit.images.neighbours import nearest_in_groups
from tests.support.data.rows import unit

DIM = 12


def around(rng: np.random.Generator, count: int, noise: float = 0.5) -> np.ndarray:
    """Images of a class."""
    centre = unit(rng.normal(size=DIM))
    return unit(centre + noise * rng.normal(size=(count, DIM)) / DIM**0.5)


def segments_of(sizes: list[int]) -> Segments:
    counts = np.array(sizes)
    return Segments(np.arange(len(sizes)), np.cumsum(counts) - counts, np.arange(counts.sum()))


def test_an_image_has_no_part_in_the_centre_that_it_is_compared_with() -> None:
    rng = np.random.default_rng(0)
    rows = around(rng, 6)
    used = np.array([1, 1, 0, 1, 1, 1])
    sums = np.repeat(rows[used > 0].sum(0)[None], 6, 0)
    found = leave_one_out(rows, sums, used, np.full(6, 5))
    for number, row in enumerate(rows.astype(np.float64)):
        others = [each for each in np.flatnonzero(used) if each != number]
        centre = rows[others].astype(np.float64).sum(0)
        assert found[number] == pytest.approx(row @ centre / np.linalg.norm(centre), abs=1e-6)
    alone = leave_one_out(rows[:1], rows[:1], np.array([1]), np.array([1]))
    assert np.isnan(alone).all()


def test_strays_have_no_part_in_the_centre() -> None:
    rng = np.random.default_rng(1)
    rows = np.concatenate([around(rng, 9), around(rng, 1), around(rng, 7), around(rng, 2)])
    kept = keep_similar(rows, segments_of([10, 7, 2]))
    assert np.flatnonzero(~kept).tolist() == [9]
    rows[3] = 0
    assert np.flatnonzero(~keep_similar(rows, segments_of([10, 7, 2]))).tolist() == [3, 9]


def test_strays_are_left_out_where_they_are_more_than_half_of_a_class() -> None:
    strays = np.eye(DIM, dtype=np.float32)
    right = unit(strays[-1] + 0.1 * np.random.default_rng(7).normal(size=(5, DIM)))
    rows = np.concatenate([right[:2], strays[:3], right[2:], strays[3:6]])
    kept = keep_similar(rows, segments_of([5, 6]))
    assert np.flatnonzero(kept).tolist() == [0, 1, 5, 6, 7]


def test_mean_cosines_come_from_sums_alone() -> None:
    rng = np.random.default_rng(2)
    one, other = around(rng, 5).astype(np.float64), around(rng, 4).astype(np.float64)
    pairs = [a @ b for a, b in combinations(one, 2)]
    sums = [np.array([(rows.sum(0) ** 2).sum()]) for rows in (one, other)]
    assert within_cosine(sums[0], np.array([5]))[0] == pytest.approx(np.mean(pairs))
    assert np.isnan(within_cosine(np.array([1.0]), np.array([1]))[0])
    found = relatedness(
        np.array([one.sum(0) @ other.sum(0)]),
        (sums[0], sums[1]),
        (np.array([5]), np.array([4])),
        0.5,
    )
    # Three pairs of the typical cosine count beside those of a class.
    within = [
        (sum(a @ b for a, b in combinations(rows, 2)) + 3 * 0.5) / (n * (n - 1) / 2 + 3)
        for rows, n in ((one, 5), (other, 4))
    ]
    exact = (one @ other.T).mean() / np.sqrt(within[0] * within[1])
    assert found[0] == pytest.approx(exact)


def test_halves_are_halves_of_what_is_kept() -> None:
    segments, kept = segments_of([8, 5, 1]), np.ones(14, bool)
    kept[[2, 9]] = False
    half = alternate(segments, kept, 0)
    assert not half[~kept].any()
    assert segments.sum(half.astype(int)).tolist() == [4, 2, 1]
    assert (alternate(segments, kept, 0) == half).all()
    assert (alternate(segments, kept, 1) != half).any()


def test_the_hash_of_an_image_is_the_one_that_it_was() -> None:
    """An audit that goes on must cut classes and draw others as it did before."""
    numbers = np.array([0, 1, 10**12])
    assert mix(numbers, 5).tolist() == [
        614480483733483466,
        5833679380957638813,
        17389099152049945591,
    ]
    assert mix(numbers, 2**63 - 1)[0] == 17519071339639777313


def test_groups_of_classes_cover_all_of_them() -> None:
    counts = np.array([0, 5, 0, 3, 9, 0, 1, 0])
    for limit in (1, 4, 100):
        groups = group_classes(counts, limit)
        assert [first for first, _ in groups] == [0, *(stop for _, stop in groups[:-1])]
        assert groups[-1][1] == len(counts)


def test_no_chain_merges_classes_that_were_not_confirmed() -> None:
    first, second = np.array([0, 1, 5, 5, 6, 8]), np.array([1, 2, 6, 7, 7, 9])
    groups = group_pairs(first, second)
    assert groups.tolist() == [0, -1, 1, 1, 1, 2]
    ids = merged_ids(first, second, groups, 10)
    assert ids.tolist() == [0, 0, 2, 3, 4, 5, 5, 5, 8, 8]
    assert group_pairs(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []


def test_images_of_one_class_are_mixed_and_those_of_two_are_not() -> None:
    rng = np.random.default_rng(3)
    same = around(rng, 40)
    two = np.stack([around(rng, 20), around(rng, 20)])
    first = np.stack([same[:20], two[0], np.concatenate([same[:3], np.zeros((17, DIM))])])
    second = np.stack([same[20:], two[1], same[20:]]).astype(np.float32)
    first = first.astype(np.float32)
    crossing, expected = count_crossings(first, second)
    assert expected[0] == pytest.approx(40 * 20 / 39) and expected[1] == expected[0]
    assert expected[2] == pytest.approx((3 * 20 + 20 * 3) / 22)
    mixing = measure_mixing(first, second)
    assert mixing[0] == pytest.approx(crossing[0] / expected[0]) and mixing[0] > 0.6
    assert mixing[1] == 0 and mixing[2] > 0.4


def test_a_class_of_two_is_cut_where_they_meet() -> None:
    rng = np.random.default_rng(4)
    strays = unit(rng.normal(size=(2, DIM)))
    parts = [around(rng, 9), around(rng, 5), around(rng, 12), around(rng, 10), strays]
    rows = np.concatenate([*parts, around(rng, 3)])
    segments = segments_of([14, 12, 12, 3])
    found = cut_classes(rows, segments, np.ones(len(rows), bool))
    assert np.flatnonzero(found.second[:14]).tolist() == [9, 10, 11, 12, 13]
    one, other = rows[:9].astype(np.float64), rows[9:14].astype(np.float64)
    within = [np.mean([a @ b for a, b in combinations(part, 2)]) for part in (one, other)]
    assert found.apart[0] == pytest.approx(min(within) - (one @ other.T).mean(), abs=1e-6)
    assert found.apart[0] > 2 * max(found.apart[1], found.apart[2])  # strays are no part
    assert np.isnan(found.apart[3])  # parts have two images


def test_the_nearest_image_is_looked_for_in_its_group() -> None:
    rng = np.random.default_rng(5)
    counts, query_counts = np.array([3, 0, 40, 5]), np.array([2, 4, 0, 30])
    rows, asking = unit(rng.normal(size=(48, DIM))), unit(rng.normal(size=(36, DIM)))
    numbers = np.arange(48), np.concatenate([[0, 1], 100 + np.arange(4), 43 + np.arange(30) % 9])
    best, cosines = nearest_in_groups((rows, counts), (asking, query_counts), numbers)
    group = np.repeat(np.arange(4), counts)
    for query, owner in enumerate(np.repeat(np.arange(4), query_counts).tolist()):
        inside = [n for n in np.flatnonzero(group == owner) if n != numbers[1][query]]
        if not inside:
            assert best[query] == -1
            continue
        exact = rows[inside] @ asking[query]
        assert best[query] == inside[int(exact.argmax())]
        assert cosines[query] == pytest.approx(exact.max(), abs=1e-6)


def test_memory_of_the_search_does_not_grow_with_the_queries_of_a_class() -> None:
    rng = np.random.default_rng(6)
    counts, query_counts = np.array([2, 2048]), np.array([3, 20_000])
    rows, asking = unit(rng.normal(size=(2050, DIM))), unit(rng.normal(size=(20_003, DIM)))
    numbers = np.arange(2050), np.arange(20_003)
    tracemalloc.start()
    try:
        best, cosines = nearest_in_groups((rows, counts), (asking, query_counts), numbers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80 << 20  # the products of all would be 156 MiB
    assert best[:3].tolist() == [1, 0, int((rows[:2] @ asking[2]).argmax())]
    for query in (3, 2049, 4098, 4099, 20_002):
        exact = rows[2:] @ asking[query]
        exact[np.arange(2, 2050) == query] = -1
        assert best[query] == 2 + exact.argmax()
        assert cosines[query] == pytest.approx(exact.max(), abs=1e-6)
