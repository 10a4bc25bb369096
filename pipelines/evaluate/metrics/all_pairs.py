"""TAR at FAR over all pairs of a set, in memory that does not grow with their number.

Of the pairs of two classes only the highest scores are kept, which give the thresholds. They are
found in tiles of float32 or bfloat16 products, whichever this processor computes faster. These are
not trusted: a pair that may be among them by such a score is scored again in float64. How many are
needed is known, so a random sample of pairs tells a score that they surely exceed. So few pairs
are scored twice, and the figures are those of float64, bit for bit. Then the pairs of one class
above the thresholds are counted, class by class. Bands of rows are tasks for any number of
processes, which map the rows.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import normalize_embeddings
from pipelines.evaluate.metrics.roc import (
    KEPT,
    SPREAD,
    Floats,
    Ints,
    TopScores,
    round_scores,
    sampled_bound,
)
from pipelines.storage.mapped_file import create_mapped_array
from pipelines.storage.worker_pool import HERE, LazyTasks, Workers, run_tasks

_BAND: Final = 2048  # rows of a task
_TILE: Final = 512  # rows that they are compared with at a time: 2 to 4 MB of scores
_BLOCK: Final = 32  # rows whose highest score is looked at first
_CHUNK: Final = 1 << 11  # rows, or pairs, in float64 at a time
_TRIAL: Final = 512  # rows of the product that shows which type is quicker
_DENSE: Final = 1 / 32  # share of a tile above which one product is cheaper than single pairs

Rows = npt.NDArray[Any]


class AllPairs(NamedTuple):
    """The figures of all pairs.

    Attributes:
        genuine, impostors: numbers of pairs of one class, and of two.
        tar: FAR -> TAR at the lowest threshold whose FAR does not exceed it.
        skipped_fars: requested FARs that would take more memory.
    """

    genuine: int
    impostors: int
    tar: dict[float, float]
    skipped_fars: list[float]


class BandTask(NamedTuple):
    """The pairs of some rows with all rows that follow.

    Attributes:
        folder: of the rows, see `_RowFiles`.
        first: the first of the rows.
        bound: scores that are not above it are not needed.
    """

    folder: str
    first: int
    bound: float


def compare_all_pairs(
    embeddings: Rows,
    labels: Ints,
    fars: Sequence[float],
    workers: Workers = HERE,
    folder: str = "",
) -> AllPairs:
    """Compare every sample with every other one by the cosine.

    Args:
        embeddings: float `[N, D]`, of any length; a mapped file stays mapped.
        labels: integers `[N]`.
        fars: at which TAR is computed.
        workers: who compares.
        folder: which all of them reach, for the rows; empty: one of this machine.

    Raises:
        UserError: all samples are of one class, or each of its own.
    """
    labels = np.asarray(labels, np.int64)
    sizes = np.unique(labels, return_counts=True)[1].astype(np.int64)
    genuine = int((sizes * (sizes - 1) // 2).sum())
    impostors = len(labels) * (len(labels) - 1) // 2 - genuine
    if not genuine or not impostors:
        raise UserError(f"all pairs: {genuine} pairs of one class and {impostors} of two classes")
    allowed = {far: math.floor(far * impostors + 1e-9) for far in fars}
    held = {far: count for far, count in allowed.items() if count < min(KEPT, impostors)}
    count = max(held.values(), default=0) + 1
    with tempfile.TemporaryDirectory(prefix="mhe-pairs-", dir=folder or None) as files:
        _RowFiles.write(files, embeddings, labels)
        highest = _highest_scores(files, impostors, count, workers)
        limits = np.array([highest[kept] for kept in held.values()])
        shares = _count_above(_RowFiles(files), limits) / genuine
    tar = dict(zip(held, shares.tolist(), strict=True))
    return AllPairs(genuine, impostors, tar, [far for far in fars if far not in held])


class _RowFiles:
    """Files of rows that all processes map.

    Attributes:
        rows: float `[N, D]` as they are; a row that is not finite is zero.
        unit: float32 `[N, D]`, of length 1.
        short: int16 `[N, D]`, the bits of `unit` in bfloat16.
        norms: float64 `[N]`, lengths; 1 of a row of zeros.
        labels: int64 `[N]`.
    """

    def __init__(self, folder: str) -> None:
        # Copies on write, which nobody does: torch takes no array that is read-only.
        self.rows, self.unit, self.short, self.norms, self.labels = (
            np.load(Path(folder) / f"{name}.npy", mmap_mode="c")
            for name in ("rows", "unit", "short", "norms", "labels")
        )

    @staticmethod
    def write(folder: str, embeddings: Rows, labels: Ints) -> None:
        """Write the files into a folder, in flat memory."""
        np.save(Path(folder) / "labels.npy", labels)
        shape, count = embeddings.shape, len(embeddings)
        rows = _new_file(folder, "rows", embeddings.dtype, shape)
        unit = _new_file(folder, "unit", np.float32, shape)
        short = _new_file(folder, "short", np.int16, shape)
        norms = _new_file(folder, "norms", np.float64, (count,))
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            values = np.asarray(embeddings[part])
            unit[part] = scaled = normalize_embeddings(values)
            short[part] = _bits(torch.from_numpy(unit[part]).bfloat16())
            usable = np.isfinite(values).all(axis=1)
            rows[part] = np.where(usable[:, None], values, 0)
            lengths = np.linalg.norm(rows[part].astype(np.float64), axis=1)
            norms[part] = np.where(scaled.any(axis=1), lengths, 1.0)

    def score(self, first: Ints, second: Ints) -> Floats:
        """The rounded cosines of pairs, in float64."""
        scores = np.empty(len(first))
        for start in range(0, len(first), _CHUNK):
            part = slice(start, start + _CHUNK)
            one, other = first[part], second[part]
            left, right = (self.rows[each].astype(np.float64) for each in (one, other))
            scores[part] = np.einsum("nd,nd->n", left, right)
            scores[part] /= self.norms[one] * self.norms[other]
        return round_scores(scores)

    def factors(self, dtype: torch.dtype, start: int, count: int) -> torch.Tensor:
        """Rows of length 1 in float32 or bfloat16, not to be written to."""
        rows = self.short if dtype == torch.bfloat16 else self.unit
        return torch.from_numpy(rows[start : start + count]).view(dtype)

    def draw(self, generator: np.random.Generator, count: int) -> Floats:
        """The scores of so many random pairs, or of fewer: of those of two classes."""
        first, second = generator.integers(0, len(self.labels), (2, count))
        different = self.labels[first] != self.labels[second]
        return self.score(first[different], second[different])

    def scaled(self, which: Ints | slice) -> Floats:
        """Rows of length 1."""
        return self.rows[which].astype(np.float64) / self.norms[which][:, None]


def _new_file(folder: str, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Rows:
    return create_mapped_array(Path(folder) / f"{name}.npy", dtype, shape)


_open_rows = lru_cache(maxsize=1)(_RowFiles)


def _highest_scores(folder: str, impostors: int, count: int, workers: Workers) -> Floats:
    """The `count` highest scores of two classes, in descending order."""
    spread = SPREAD
    while True:
        bound = sampled_bound(_open_rows(folder).draw, impostors, count, spread)
        found = _scores_above(folder, bound, count, workers)
        if len(found) >= count or bound == -math.inf:
            return found
        spread *= 4  # the sample was not like the rest


def _scores_above(folder: str, bound: float, count: int, workers: Workers) -> Floats:
    """The `count` highest scores of two classes, if so many are above a bound."""
    highest = TopScores(count)

    def task(number: int) -> BandTask:
        # What is known when a task begins spares work; it changes nothing in the result.
        return BandTask(folder, number * _BAND, max(bound, highest.lower_bound))

    def record(number: int, scores: list[Floats]) -> None:
        highest.add(scores.pop())  # and forget them there

    bands = math.ceil(len(_open_rows(folder).labels) / _BAND)
    run_tasks(score_band, LazyTasks(bands, task), workers, record=record)
    return highest.descending()


def score_band(task: BandTask) -> list[Floats]:
    """The scores of two classes above the bound, of a band of rows with itself and all that follow.

    Returns:
        One array, in a list that the receiver empties.
    """
    files, found = _open_rows(task.folder), [np.empty(0)]
    for scores, first, second in _exact_scores(files, task):
        wanted = (scores > task.bound) & (files.labels[first] != files.labels[second])
        found.append(scores[wanted & (first < second)])
    return [np.concatenate(found)]


def _exact_scores(files: _RowFiles, task: BandTask) -> Iterator[tuple[Floats, Ints, Ints]]:
    """Yield scores of pairs of a band, those above the bound among them, and their rows."""
    waiting, count = list[Ints](), 0
    for begin, places in _candidates(files, task.first, task.bound):
        pairs = places + np.array([[task.first], [begin]])
        first, second = pairs
        if len(first) > _BAND * _TILE * _DENSE:
            parts = ((task.first, _BAND), (begin, _TILE))
            left, right = (files.scaled(slice(start, start + count)) for start, count in parts)
            yield round_scores(left @ right.T)[places[0], places[1]], first, second
            continue
        waiting.append(pairs)
        count += len(first)
        if count >= _CHUNK:
            yield _scored(files, waiting, task.bound)
            waiting, count = [], 0
    if waiting:
        yield _scored(files, waiting, task.bound)


def _scored(files: _RowFiles, pairs: list[Ints], bound: float) -> tuple[Floats, Ints, Ints]:
    """The scores of pairs, without those that float32 shows to be at most the bound."""
    first, second = np.concatenate(pairs, axis=1)
    products = np.einsum("nd,nd->n", files.unit[first], files.unit[second])
    near = products > bound - product_error(torch.float32, files.unit.shape[1])
    first, second = first[near], second[near]
    return files.score(first, second), first, second


def _candidates(files: _RowFiles, start: int, bound: float) -> Iterator[tuple[int, Ints]]:
    """Yield where a tile begins, and rows and columns of scores that may be above a bound."""
    total, width = files.unit.shape
    dtype = _quickest_type(width)
    if bound <= product_error(dtype, width):
        dtype = torch.float32  # bits of bfloat16 are in the order of the numbers above zero only
    least = torch.tensor(bound - product_error(dtype, width), dtype=torch.float64).to(dtype)
    limit = _bits(torch.nextafter(least, torch.tensor(-math.inf, dtype=dtype)))
    mine = files.factors(dtype, start, _BAND)
    left = torch.zeros((math.ceil(len(mine) / _BLOCK) * _BLOCK, width), dtype=dtype)
    left[: len(mine)] = mine
    scores = torch.empty((len(left), _TILE), dtype=dtype)
    for begin in range(start, total, _TILE):
        right = files.factors(dtype, begin, _TILE)
        if len(right) < _TILE:
            scores = torch.empty((len(left), len(right)), dtype=dtype)
        torch.mm(left, right.T, out=scores)
        places = _places_above(_bits(scores), limit)
        yield begin, places[:, places[0] < len(mine)]


def _bits(values: torch.Tensor) -> npt.NDArray[Any]:
    """float32 as it is; the bits of bfloat16, whose order is that of the numbers above zero."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def _places_above(values: npt.NDArray[Any], limit: npt.NDArray[Any]) -> Ints:
    """Rows and columns, `[2, n]`, of what is above a limit, of which there is little.

    The highest value of `_BLOCK` rows is looked at first.
    """
    blocks = values.reshape(-1, _BLOCK, values.shape[1])
    block, column = np.nonzero(blocks.max(axis=1) > limit)
    found, row = np.nonzero(blocks[block, :, column] > limit)
    return np.stack([block[found] * _BLOCK + row, column[found]])


def product_error(dtype: torch.dtype, width: int) -> float:
    """A bound of |computed - exact| of a product of two rows of length 1 in a type.

    Rows are given in float32, to which they were rounded. Both factors are rounded to the type, the
    products are summed in float32, and the sum is rounded to the type: (1 + u)^3 - 1 for its unit
    roundoff u (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
    """
    summed = (width + 4) * 2.0**-24
    unit_roundoff = torch.finfo(dtype).eps / 2
    return summed if dtype == torch.float32 else summed + (1 + unit_roundoff) ** 3 - 1


@lru_cache
def _quickest_type(width: int) -> torch.dtype:
    """The type in which this processor multiplies rows of a width in the least time."""
    rows = torch.randn(_TRIAL, width)
    times: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        factor, taken = rows.to(dtype), []
        for _ in range(4):
            begin = time.perf_counter()
            torch.mm(factor, factor.T)
            taken.append(time.perf_counter() - begin)
        times[dtype] = min(taken)
    return min(times, key=times.__getitem__)


def _count_above(files: _RowFiles, limits: Floats) -> Ints:
    """Number of pairs of one class whose score is above each limit, `[limits]`."""
    counts, labels = np.zeros(len(limits), np.int64), np.array(files.labels)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels.min() - 1))
    for mine in np.split(order, starts[1:]):
        if len(mine) < 2:
            continue
        rows = files.scaled(mine)
        for first in range(0, len(mine), _TILE):
            scores = round_scores(rows[first : first + _TILE] @ rows[first:].T)
            pairs = scores[np.triu(np.ones(scores.shape, bool), 1)]
            counts += (pairs[:, None] > limits).sum(axis=0)
    return counts
