"""The nearest image of each image, looked for among those that have the same nearest class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.audit.classes.centres import group_by_size
from pipelines.audit.images.scores import ImageScores
from pipelines.audit.settings import PER_CLASS
from pipelines.clustering.kmeans import find_nearest
from pipelines.clustering.members import Members, sort_members
from pipelines.clustering.rows import Ints, Rows, UnitRows
from pipelines.clustering.settings import chunk_rows
from pipelines.clustering.state import ClusterState

NO_IMAGE: Final = -1
BUCKETS: Final = 2  # nearest classes of an image that its neighbours are looked for in
_PART: Final = 1 << 18  # images that are looked at together
_BATCH_BYTES: Final = 1 << 25  # of the rows that are multiplied together
_QUERIES: Final = PER_CLASS  # images of a class that are looked up together, at most
_PROBED: Final = 256  # images that are compared with every other one
_BLOCK: Final = 1 << 14  # images that these are compared with at a time


class Bucketed(NamedTuple):
    """Images of a data set by their nearest classes.

    Attributes:
        rows: of all images.
        members: for each position among the nearest, the images of each class that has it.
    """

    rows: UnitRows
    members: list[Members]


def nearest_classes(
    scores: ImageScores, labels: npt.NDArray[Any], name: str, state: ClusterState
) -> npt.NDArray[Any]:
    """int32 `[N, 2]`: the two nearest classes of each image, its own without it among them."""
    count = len(labels)
    found = state.array(name, (count, BUCKETS), "int32")

    def _choose(piece: int) -> None:
        here = slice(piece * _PART, (piece + 1) * _PART)
        own = np.asarray(scores.own[here])[:, None]
        cosines = np.concatenate(
            [np.nan_to_num(own, nan=-2.0), np.asarray(scores.cosines[here])], axis=1
        )
        classes = np.concatenate(
            [np.asarray(labels[here])[:, None], np.asarray(scores.others[here])], axis=1
        )
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :BUCKETS]
        found[here] = np.take_along_axis(classes, best, 1)

    state.run(name, -(-count // _PART), _choose)
    return found


def fill_buckets(
    rows: UnitRows, nearest: npt.NDArray[Any], classes: int, name: str, state: ClusterState
) -> Bucketed:
    """Sort images by their nearest classes."""
    members = [
        sort_members(state, f"{name}_{position}", nearest[:, position], classes)
        for position in range(nearest.shape[1])
    ]
    return Bucketed(rows, members)


def find_neighbours(
    base: Bucketed, queries: Bucketed, name: str, state: ClusterState
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The nearest image of the base for every query, and its cosine.

    It is looked for among the images of the base whose nearest class is one of the two nearest of
    the query. Of a class with very many images so many are looked at; all are looked up, a part at
    a time.

    Args:
        base: images that are found.
        queries: images that are looked up; the same ones as `base`: none finds itself.
        name: of the files.
        state: gets them.

    Returns:
        int64 `[Q]`, `NO_IMAGE` where there is none, and float32 `[Q]`.
    """
    shape = (queries.rows.count, BUCKETS)
    found = state.array(f"{name}_image", shape, "int64")
    cosines = state.array(f"{name}_cosine", shape, "float32")
    is_same, together = base.rows is queries.rows, chunk_rows(base.rows.dim)
    listed = base.members[0]
    for position, asking in enumerate(queries.members):
        groups = group_by_size(np.minimum(listed.counts, PER_CLASS) + asking.counts, together)

        def _find(
            piece: int, position: int = position, asking: Members = asking, groups: Any = groups
        ) -> None:
            first, stop = groups[piece]
            images = listed.some_between(first, stop, PER_CLASS)
            every = asking.between(first, stop)
            if not len(every):
                return
            rows = base.rows.gather(images), np.minimum(listed.counts[first:stop], PER_CLASS)
            for start, counts in _parts(asking.counts[first:stop], together):
                numbers = every[start : start + together]
                best, scores = nearest_in_groups(
                    rows,
                    (queries.rows.gather(numbers), counts),
                    (images, numbers) if is_same else None,
                )
                found[numbers, position] = np.append(images, NO_IMAGE)[best]  # -1: the last one
                cosines[numbers, position] = np.where(best < 0, -1.0, scores)

        state.run(f"{name}_{position}", len(groups), _find)
    images, scores = np.asarray(found), np.asarray(cosines)
    best = scores.argmax(axis=1)
    rows = np.arange(len(best))
    return images[rows, best], scores[rows, best]


def _parts(counts: Ints, together: int) -> Iterator[tuple[int, Ints]]:
    """Where each part of so many queries begins, and how many of each group are in it."""
    ends = np.cumsum(counts)
    for start in range(0, int(ends[-1]), together):
        here: Ints = np.clip(ends, start, start + together)
        yield start, np.diff(here, prepend=start)


def nearest_in_groups(
    base: tuple[Rows, Ints], queries: tuple[Rows, Ints], numbers: tuple[Ints, Ints] | None
) -> tuple[Ints, Rows]:
    """The nearest row of the base for each query, among those of its group.

    Memory beside rows is that of the products of `_QUERIES` queries with the rows of a group.

    Args:
        base: rows float32 `[b, D]`, group after group, and int64 `[g]`, how many of each.
        queries: rows float32 `[q, D]` and their counts, in the same way.
        numbers: of the images of both; a query does not find the one with its own number.

    Returns:
        int64 `[q]`, positions in the base, -1: the group has none; and float32 `[q]`.
    """
    (rows, counts), (asking, query_counts) = base, queries
    best = np.full(len(asking), NO_IMAGE, np.int64)
    scores = np.full(len(asking), -1.0, np.float32)
    starts, begins = np.cumsum(counts) - counts, np.cumsum(query_counts) - query_counts
    owner, before = _pieces(query_counts)
    counts, starts, begins = counts[owner], starts[owner], begins[owner] + before
    query_counts = np.minimum(query_counts[owner] - before, _QUERIES)
    for groups in _batches(counts, query_counts, rows.shape[1]):
        inside = _places(starts[groups], counts[groups])
        wanted = _places(begins[groups], query_counts[groups])
        cosines = np.matmul(asking[wanted], rows[inside].transpose(0, 2, 1))
        cosines[np.broadcast_to((inside < 0)[:, None, :], cosines.shape)] = -np.inf
        if numbers is not None:
            cosines[numbers[1][wanted][:, :, None] == numbers[0][inside][:, None, :]] = -np.inf
        nearest = cosines.argmax(axis=2)
        value = np.take_along_axis(cosines, nearest[:, :, None], 2)[:, :, 0]
        there = (wanted >= 0) & np.isfinite(value)
        best[wanted[there]] = np.take_along_axis(inside, nearest, 1)[there]
        scores[wanted[there]] = value[there]
    return best, scores


def _pieces(query_counts: Ints) -> tuple[Ints, Ints]:
    """The group of each piece of at most `_QUERIES` queries, and its queries before this piece."""
    pieces = np.maximum(1, -(-query_counts // _QUERIES))
    owner = np.repeat(np.arange(len(pieces)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    return owner, (np.arange(len(owner)) - first) * _QUERIES


def _places(starts: Ints, counts: Ints) -> Ints:
    """int64 `[g, largest]`: consecutive positions; -1 behind the last one of a group."""
    position = np.arange(int(counts.max()))
    return np.where(position < counts[:, None], starts[:, None] + position, -1)


def _batches(counts: Ints, query_counts: Ints, dim: int) -> Iterator[Ints]:
    """Groups of about the same size that are multiplied together."""
    filled = np.flatnonzero((counts > 0) & (query_counts > 0))
    order = filled[np.lexsort((query_counts[filled], counts[filled]))]
    start = 0
    while start < len(order):
        largest = np.maximum.accumulate(
            np.maximum(counts[order[start:]], query_counts[order[start:]])
        )
        size = largest * (8 * dim + 4 * largest) * np.arange(1, len(largest) + 1)
        stop = start + max(1, int(np.searchsorted(size, _BATCH_BYTES, side="right")))
        yield order[start:stop]
        start = stop


def measure_recall(rows: UnitRows, cosines: npt.NDArray[Any], seed: int) -> float:
    """Share of some images whose nearest image, of all, was found.

    Args:
        rows: of all images.
        cosines: float32 `[N]`, to the neighbour that was found.
        seed: of the choice of images.
    """
    count = min(_PROBED, rows.count)
    drawn = sample_without_replacement(rows.count, count, generator(seed, "audit/recall"))
    images = rows.gather(drawn)
    best = np.full(count, -1.0, np.float32)
    for start in range(0, rows.count, _BLOCK):
        part = rows.read(start, min(start + _BLOCK, rows.count))
        found, positions = find_nearest(images, part, min(2, len(part)))
        found[positions + start == drawn[:, None]] = -1.0
        best = np.maximum(best, found.max(axis=1))
    return float((np.asarray(cosines[drawn]) >= best - 1e-5).mean()) if count else 1.0
