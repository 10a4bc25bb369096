"""The nearest rows of a large gallery, found approximately by faiss, with the recall measured.

An inverted file: the gallery is cut into cells by k-means, and a query is compared with the rows of
the nearest cells alone. How many cells these are is tried out on some of the queries, whose exact
answers are known, until `RECALL` of those is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

RECALL: Final = 0.95  # share of the exact answers that is asked for
SAMPLE: Final = 256  # queries that it is measured on
# Measured with faiss 1.15 on two cores, rows of 128 and 512 numbers, 200,000 of them: below about
# 5e11 products the time that the cells take outweighs what they save. Comparing with the rows of a
# cell takes five times as long per pair as a matrix product, so more than an eighth never pays.
_PRODUCTS: Final = 1e12
_QUERIES_PER_CELL: Final = 4
_LARGEST_SHARE: Final = 8
_FIRST_CELLS: Final = 4
_ROUNDS, _ROWS_PER_CELL = 8, 64  # of k-means
_SEED: Final = 0


class ApproximateNeighbours(NamedTuple):
    """The nearest rows of each query, as far as they were found.

    Attributes:
        numbers: int64 `[Q, k]` of gallery rows, the nearest first.
        scores: float32 `[Q, k]`.
        recall: share of the exact answers to the sampled queries that is among these.
        sampled: how many queries those are.
    """

    numbers: Numbers
    scores: Rows
    recall: float
    sampled: int


def is_worth_it(gallery: int, queries: int, dim: int) -> bool:
    """Whether an approximate search saves time, by the sizes alone."""
    is_large = float(gallery) * queries * dim >= _PRODUCTS
    return is_large and queries >= _QUERIES_PER_CELL * _count_cells(gallery)


def find_neighbours(
    gallery: Rows,
    queries: Rows,
    count: int,
    excluded: Numbers,
    exactly: Callable[[Numbers], Numbers],
) -> ApproximateNeighbours | None:
    """Look queries up in cells of the gallery.

    The same arguments give the same answers: k-means has a fixed seed, and the sample is every
    n-th query.

    Args:
        gallery: `[G, D]`, rows of length 1.
        queries: `[Q, D]`, rows of length 1.
        count: k, less than G.
        excluded: `[Q]`, the gallery row that a query must not find; -1: none.
        exactly: gives the exact answers `[n, k]` to queries by their numbers `[n]`.

    Returns:
        The neighbours; None if so many cells would be needed that an exact search is faster.
    """
    index = _build(gallery)
    sample = np.linspace(0, len(queries) - 1, min(SAMPLE, len(queries))).round().astype(np.int64)
    wanted = exactly(sample)
    cells = _FIRST_CELLS
    while (recall := _recall(index, queries[sample], excluded[sample], wanted, cells)) < RECALL:
        cells *= 2
        if cells * _LARGEST_SHARE > index.nlist:
            return None
    numbers = _look_up(index, queries, excluded, count, cells)
    unanswered = np.flatnonzero((numbers < 0).any(axis=1))  # their cells hold too few rows
    if len(unanswered):
        numbers[unanswered] = exactly(unanswered)
    return ApproximateNeighbours(*_sort(gallery, queries, numbers), recall, len(sample))


def _count_cells(gallery: int) -> int:
    return max(1, int(2 * gallery**0.5))


def _build(gallery: Rows) -> Any:
    import faiss  # takes a second, which no other command should

    dim, cells = gallery.shape[1], _count_cells(len(gallery))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter, index.cp.max_points_per_centroid = _SEED, _ROUNDS, _ROWS_PER_CELL
    index.cp.spherical = True
    index.train(gallery)
    index.add(gallery)
    return index


def _look_up(index: Any, rows: Rows, excluded: Numbers, count: int, cells: int) -> Numbers:
    """Numbers `[n, count]` without the excluded ones; -1 where there are too few."""
    index.nprobe = cells
    spare = int(bool((excluded >= 0).any()))
    numbers = index.search(rows, count + spare)[1].astype(np.int64)
    if not spare:
        return numbers
    own = (numbers == excluded[:, None]) & (excluded >= 0)[:, None]
    own[~own.any(axis=1), -1] = True  # the others lose their last
    return numbers[~own].reshape(len(numbers), count)


def _recall(index: Any, rows: Rows, excluded: Numbers, wanted: Numbers, cells: int) -> float:
    found = _look_up(index, rows, excluded, wanted.shape[1], cells)
    return float(np.mean((wanted[:, :, None] == found[:, None, :]).any(axis=2)))


def _sort(gallery: Rows, queries: Rows, numbers: Numbers) -> tuple[Numbers, Rows]:
    """The neighbours by their scores, computed anew in one way for all queries."""
    scores = np.empty(numbers.shape, np.float32)
    for start in range(0, len(queries), SAMPLE):
        part = slice(start, start + SAMPLE)
        scores[part] = np.einsum("qd,qkd->qk", queries[part], gallery[numbers[part]])
    order = np.lexsort((numbers, -scores), axis=1)
    return np.take_along_axis(numbers, order, 1), np.take_along_axis(scores, order, 1)
