"""The images of each class, as a file that is sorted by class: an inverted list on disk."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipelines.clustering.rows import Ints, release_pages
from pipelines.clustering.state import ClusterState

_CHUNK: Final = 1 << 20  # images that are sorted together


class Members:
    """Which images are in which class.

    Attributes:
        counts: int64 `[C]`, images of each class.
        starts: int64 `[C]`, where each class begins in the file.
    """

    def __init__(self, numbers: npt.NDArray[Any], counts: Ints) -> None:
        """Of a file of image numbers that are sorted by class."""
        self._numbers, self.counts = numbers, counts
        self.starts = np.cumsum(counts) - counts

    def of(self, number: int) -> Ints:
        """The images of a class, ascending."""
        start = int(self.starts[number])
        return self._numbers[start : start + int(self.counts[number])].astype(np.int64)

    def between(self, first: int, stop: int) -> Ints:
        """The images of the classes `[first, stop)`, class after class."""
        start = int(self.starts[first])
        count = int(self.counts[first:stop].sum())
        return self._numbers[start : start + count].astype(np.int64)

    def some_between(self, first: int, stop: int, limit: int) -> Ints:
        """The images of the classes `[first, stop)`, class after class, evenly drawn of large ones.

        Args:
            first, stop: the classes.
            limit: images of a class.
        """
        images, counts = self.between(first, stop), self.counts[first:stop]
        if counts.max(initial=0) <= limit:
            return images
        sizes = np.repeat(counts, counts)
        position = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = np.minimum(sizes, limit)
        return images[(position + 1) * kept // sizes > position * kept // sizes]

    def some(self, classes: Ints, limit: int) -> Ints:
        """int64 `[n, limit]`: images of some classes, evenly drawn; -1 where one has no more.

        Args:
            classes: int64 `[n]`.
            limit: images of a class.
        """
        counts = self.counts[classes][:, None]
        position = np.arange(limit)
        chosen = np.where(counts > limit, position * counts // limit, position)
        there = chosen < counts
        at = np.where(there, self.starts[classes][:, None] + chosen, 0)
        return np.where(there, self._numbers[at].astype(np.int64), -1)


def count_classes(classes: npt.NDArray[Any], num_classes: int) -> Ints:
    """int64 `[C]`: images of each class; -1 is none.

    Args:
        classes: int32 `[N]` of a mapped file, or a column of it.
        num_classes: C.
    """
    counts = np.zeros(num_classes, np.int64)
    for start in range(0, len(classes), _CHUNK):
        part = classes[start : start + _CHUNK]
        distinct, sizes = np.unique(part[part >= 0], return_counts=True)
        counts[distinct] += sizes
    release_pages(classes)
    return counts


def sort_members(
    state: ClusterState, stage: str, classes: npt.NDArray[Any], num_classes: int
) -> Members:
    """Sort images by class into a file; within a class by number.

    Args:
        state: gets the file; the stage is one piece of work.
        stage: name of the stage and of the file.
        classes: int32 `[N]`; -1 is none.
        num_classes: C.
    """
    counts = count_classes(classes, num_classes)
    dtype = "uint32" if len(classes) <= np.iinfo(np.uint32).max else "int64"
    numbers = state.array(stage, (max(1, int(counts.sum())),), dtype)
    state.once(stage, lambda: _scatter(classes, counts, numbers))
    return Members(numbers, counts)


def _scatter(classes: npt.NDArray[Any], counts: Ints, numbers: npt.NDArray[Any]) -> None:
    free = np.cumsum(counts) - counts  # the next place of each class
    for start in range(0, len(classes), _CHUNK):
        part = np.asarray(classes[start : start + _CHUNK])
        order = np.argsort(part, kind="stable")
        order = order[np.searchsorted(part[order], 0) :]  # without those of no class
        distinct, first, sizes = np.unique(part[order], return_index=True, return_counts=True)
        within = np.arange(len(order)) - np.repeat(first, sizes)
        numbers[np.repeat(free[distinct], sizes) + within] = start + order
        free[distinct] += sizes
        release_pages(numbers)
    release_pages(classes)
