"""One band of probes against the whole gallery, tile by tile: a task for whoever sees both.

The scores of a band are never kept as a whole. Those of a probe and its own class come first, so
that every tile knows what the others have to reach. A band and its tiles have the same bounds
whoever compares them; so have the scores, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from pipelines.evaluate.metrics.roc import Floats, Ints, round_scores
from pipelines.storage.urls import atomic_write

BAND: Final = 1024  # probes of a task
_TILE: Final = 4096  # gallery entries that they are compared with at a time: 32 MB of scores
_NAMES: Final = ("gallery", "names", "probes", "labels")


@dataclass(frozen=True)
class ComparedRows:
    """Both sides, each sorted by class; in memory, or mapped from files.

    Attributes:
        gallery: float64 `[G, D]`, rows of length 1.
        names: int64 `[G]`, their classes.
        probes: float64 `[P, D]`, rows of length 1.
        labels: int64 `[P]`, their classes.
    """

    gallery: Floats
    names: Ints
    probes: Floats
    labels: Ints

    @staticmethod
    def open(folder: str) -> ComparedRows:
        """Map the files of a folder, `gallery.npy` and so on."""
        return ComparedRows(
            *(np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in _NAMES)
        )


class ProbesTask(NamedTuple):
    """The probes that begin with one.

    Attributes:
        rows: what is compared, or the folder of it.
        first: the first of the probes.
        nearest: k, entries to find for each.
        bound: impostors' scores that are not above it are not needed.
        part: file for the result; empty: it is handed over.
    """

    rows: ComparedRows | str
    first: int
    nearest: int
    bound: float
    part: str = ""


class ProbesResult(NamedTuple):
    """What was found of n probes.

    Attributes:
        ranks: int64 `[n]`, see `Identification`.
        nearest: int64 `[n, k]`, the nearest entries, numbered as they are sorted.
        scores: `[n, k]`, theirs.
        genuine: scores of all pairs of one class.
        impostors: scores of pairs of two classes, those above the bound.
    """

    ranks: Ints
    nearest: Ints
    scores: Floats
    genuine: Floats
    impostors: Floats

    @staticmethod
    def read(part: str) -> ProbesResult | None:
        """The result of a part's file; None: there is none."""
        if not Path(part).exists():
            return None
        with np.load(part) as arrays:
            return ProbesResult(*(arrays[name] for name in ProbesResult._fields))

    def write(self, part: str) -> None:
        """Write the file of a part, which is there as a whole or not at all."""
        with atomic_write(part) as stream:
            np.savez(stream, **self._asdict())


_open_rows = lru_cache(maxsize=1)(ComparedRows.open)


class _OwnClass(NamedTuple):
    """Probes `[first, last)` of the band are of the class that has the entries `[begin, end)`."""

    first: int
    last: int
    begin: int
    end: int
    scores: Floats


def compare_band(task: ProbesTask) -> list[ProbesResult]:
    """Compare a band of probes with every gallery entry.

    Returns:
        One result, in a list that the receiver empties; none, if the task names a file for it.
    """
    rows = _open_rows(task.rows) if isinstance(task.rows, str) else task.rows
    result = _compare(rows, slice(task.first, task.first + BAND), task.nearest, task.bound)
    if task.part:
        result.write(task.part)
        return []
    return [result]


def _compare(rows: ComparedRows, band: slice, nearest: int, bound: float) -> ProbesResult:
    probes = np.array(rows.probes[band])
    known = list(_own_classes(rows, band, probes))
    own = np.full(len(probes), np.inf)  # that of a class without an entry, which nobody reaches
    for each in known:
        own[each.first : each.last] = each.scores.max(axis=1)
    reaching, found = _ClassCounter(own), [np.empty(0)]
    numbers, scores = np.empty((len(probes), 0), np.int64), np.empty((len(probes), 0))
    for begin in range(0, len(rows.names), _TILE):
        names = rows.names[begin : begin + _TILE]
        tile = round_scores(probes @ rows.gallery[begin : begin + _TILE].T)
        for each, where in _within(known, begin, len(names)):
            entries = slice(begin + where.start - each.begin, begin + where.stop - each.begin)
            tile[each.first : each.last, where] = each.scores[:, entries]
        best = _highest_columns(tile, min(nearest, len(names)))
        numbers = np.concatenate([numbers, best + begin], 1)
        scores = np.concatenate([scores, np.take_along_axis(tile, best, 1)], 1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :nearest]
        numbers = np.take_along_axis(numbers, order, 1)
        scores = np.take_along_axis(scores, order, 1)
        for each, where in _within(known, begin, len(names)):
            tile[each.first : each.last, where] = -np.inf
        found.append(tile[tile > bound])
        reaching.add(tile, names)
    ranks = np.where(np.isfinite(own), 1 + reaching.total(), 0)
    genuine = np.concatenate([np.empty(0), *(each.scores.ravel() for each in known)])
    return ProbesResult(ranks, numbers, scores, genuine, np.concatenate(found))


def _own_classes(rows: ComparedRows, band: slice, probes: Floats) -> Iterator[_OwnClass]:
    """The probes of each class of the band that has entries, compared with those."""
    labels = np.array(rows.labels[band])
    names, first = np.unique(labels, return_index=True)
    lasts = np.append(first[1:], len(labels))
    begins, ends = (np.searchsorted(rows.names, names, side) for side in ("left", "right"))
    for a, b, begin, end in zip(first, lasts, begins, ends, strict=True):
        if begin < end:
            scores = round_scores(probes[a:b] @ rows.gallery[begin:end].T)
            yield _OwnClass(int(a), int(b), int(begin), int(end), scores)


def _within(known: list[_OwnClass], begin: int, size: int) -> Iterator[tuple[_OwnClass, slice]]:
    """The classes that have entries in a tile, and which of its columns these are."""
    for each in known:
        first, last = max(each.begin - begin, 0), min(each.end - begin, size)
        if first < last:
            yield each, slice(first, last)


def _highest_columns(scores: Floats, k: int) -> Ints:
    """Columns of the k highest scores of each row, highest first; of equal scores the first one."""
    rows, columns = np.arange(len(scores)), np.empty((len(scores), k), np.int64)
    values = np.empty(columns.shape)
    for n in range(k):
        columns[:, n] = scores.argmax(axis=1)
        values[:, n] = scores[rows, columns[:, n]]
        scores[rows, columns[:, n]] = -np.inf
    scores[rows[:, None], columns] = values
    return columns


class _ClassCounter:
    """Counts the classes whose best entry reaches what each probe's own class has.

    Args:
        own: `[n]`, best score of each probe's own class.
    """

    def __init__(self, own: Floats) -> None:
        self._own, self._counts = own[:, None], np.zeros(len(own), np.int64)
        self._last, self._best = None, np.empty((len(own), 0))

    def add(self, tile: Floats, names: Ints) -> None:
        """Take in the next tile, `[n, entries]`, and the classes of its entries.

        The last class may go on in the next tile, so it is counted there, or by `total`.
        """
        first = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
        best = tile if len(first) == len(names) else np.maximum.reduceat(tile, first, axis=1)
        if names[0] == self._last:
            best = np.concatenate([np.maximum(best[:, :1], self._best), best[:, 1:]], 1)
        else:
            self._count(self._best)
        self._count(best[:, :-1])
        self._last, self._best = names[-1], best[:, -1:].copy()

    def total(self) -> Ints:
        """`[n]`; there is no further tile."""
        return self._counts + (self._best >= self._own).sum(axis=1)

    def _count(self, best: Floats) -> None:
        self._counts += (best >= self._own).sum(axis=1)
