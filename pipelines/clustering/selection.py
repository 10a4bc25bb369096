"""Which of the nearest classes an image keeps: duplicates, outliers, far classes, full classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.clustering.assign import NO_CLASS, Labels
from pipelines.clustering.kmeans import find_nearest
from pipelines.clustering.members import sort_members
from pipelines.clustering.rows import Ints, Rows, UnitRows, release_pages
from pipelines.clustering.settings import ClusterSettings, chunk_rows
from pipelines.clustering.state import ClusterState
from pipelines.shards.label_set import LabelLists

KEPT, DUPLICATE, OUTLIER = 0, 1, 2  # of an image
_PART: Final = 1 << 18  # images whose labels are in memory together
_BLOCK: Final = 256  # images of a class that are compared with one another at once
_PAIRS: Final = 1 << 22  # images and classes that are sorted together for the bound
_LEVELS: Final = 1 << 16  # values of an encoded similarity


class SelectedPart(NamedTuple):
    """The classes of consecutive images.

    Attributes:
        lists: their lists.
        similarities: uint16, one for each item of the lists.
    """

    lists: LabelLists
    similarities: npt.NDArray[np.uint16]


class KeptLabels:
    """The classes that images keep, numbered without those that are given up.

    A class that is no image's nearest is given up: it is empty, or its centre is that of another.

    Attributes:
        num_classes: C, classes with an image.
        sizes: int64 `[C]`, images that have each class among theirs.
        by_count: int64 `[K + 1]`, images with 0, 1, 2, ... classes.
        broken, duplicates, outliers, full: images without a class because their embedding has no
            direction, for the reasons that the settings name, or because their classes are full.
        bounded: classes that had more images than the bound.
    """

    def __init__(
        self, labels: Labels, dropped: npt.NDArray[Any], settings: ClusterSettings
    ) -> None:
        """Read the labels and decide.

        Args:
            labels: of all images.
            dropped: uint8 `[N]`, `KEPT` or why not.
            settings: for the bounds.
        """
        self._labels, self._dropped, self._settings = labels, dropped, settings
        self.samples = len(dropped)
        classes = settings.classes
        self._lowest = np.zeros(classes, np.int64)  # similarity of the last image that is kept
        self._last = np.full(classes, self.samples, np.int64)  # of those with it, the last kept
        self._used = np.ones(classes, bool)
        self._used = self._count(classes, slice(0, 1)) > 0
        counts = self._count(classes)
        self.bounded = 0
        if settings.max_size:
            bound = int(settings.max_size * max(1, counts.sum()) / max(1, (counts > 0).sum()))
            full = np.flatnonzero(counts > max(1, bound))
            self.bounded = len(full)
            for group in _groups(full, counts[full]):
                self._bound(group, max(1, bound))
        sizes = self._count(classes) if self.bounded else counts
        self._numbers = np.cumsum(sizes > 0) - 1
        self.sizes = sizes[sizes > 0]
        self.num_classes = len(self.sizes)
        self.by_count = np.zeros(labels.classes.shape[1] + 1, np.int64)
        self.broken = self.duplicates = self.outliers = self.full = 0
        self._tally()

    def parts(self) -> Iterator[SelectedPart]:
        """The classes of all images, in order, part by part."""
        for start in range(0, self.samples, _PART):
            classes, similarities, kept = self._read(start)
            ends = np.cumsum(kept.sum(axis=1, dtype=np.int64))
            lists = LabelLists(ends, self._numbers[classes[kept]])
            yield SelectedPart(lists, similarities[kept])

    def write_nearest(self, nearest: Labels) -> None:
        """Write the nearest class that each image keeps, and its similarity.

        Args:
            nearest: both `[N]`; `NO_CLASS` where an image keeps none.
        """
        for start in range(0, self.samples, _PART):
            classes, similarities, kept = self._read(start)
            here, has = slice(start, start + len(classes)), kept.any(axis=1)
            rows, position = np.arange(len(classes)), kept.argmax(axis=1)
            found = self._numbers[classes[rows, position]]
            nearest.classes[here] = np.where(has, found, NO_CLASS)
            nearest.similarities[here] = np.where(has, similarities[rows, position], 0)

    def _read(self, start: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint16], Any]:
        """Classes and similarities `[n, K]` of a part, and which of them are kept."""
        here = slice(start, start + _PART)
        classes = np.asarray(self._labels.classes[here])
        similarities = np.asarray(self._labels.similarities[here])
        kept = near_enough(classes, similarities, self._settings.further_within)
        kept &= (np.asarray(self._dropped[here]) == KEPT)[:, None]
        kept &= self._used[classes]
        numbers = np.arange(start, start + len(classes))[:, None]
        lowest = self._lowest[classes]
        kept &= (similarities > lowest) | (
            (similarities == lowest) & (numbers <= self._last[classes])
        )
        release_pages(self._labels.classes)
        release_pages(self._labels.similarities)
        return classes, similarities, kept

    def _count(self, classes: int, places: slice = slice(None)) -> Ints:
        """int64 `[classes]`: images of each class, by some of the places in their lists."""
        counts = np.zeros(classes, np.int64)
        for start in range(0, self.samples, _PART):
            found, _, kept = self._read(start)
            chosen = found[:, places][kept[:, places]]
            distinct, sizes = np.unique(chosen, return_counts=True)
            counts[distinct] += sizes
        return counts

    def _bound(self, group: Ints, bound: int) -> None:
        """Let each class of a group keep the images that are most similar, by number at a tie."""
        wanted = np.zeros(len(self._lowest), bool)
        wanted[group] = True
        found = []
        for start in range(0, self.samples, _PART):
            classes, similarities, kept = self._read(start)
            rows, columns = np.nonzero(kept & wanted[classes])
            found.append(
                np.stack(
                    [
                        classes[rows, columns].astype(np.int64),
                        -similarities[rows, columns].astype(np.int64),
                        start + rows,
                    ]
                )
            )
        owner, farness, number = np.concatenate(found, axis=1)
        order = np.lexsort((number, farness, owner))
        begins = np.searchsorted(owner[order], group)
        last = order[begins + bound - 1]
        self._lowest[group], self._last[group] = -farness[last], number[last]

    def _tally(self) -> None:
        for start in range(0, self.samples, _PART):
            classes, _, kept = self._read(start)
            dropped = np.asarray(self._dropped[start : start + _PART])
            broken = classes[:, 0] == NO_CLASS
            self.by_count += np.bincount(kept.sum(axis=1), minlength=len(self.by_count))
            self.broken += int(broken.sum())
            self.duplicates += int((dropped == DUPLICATE).sum())
            self.outliers += int((dropped == OUTLIER).sum())
            self.full += int((~kept.any(axis=1) & ~broken & (dropped == KEPT)).sum())


def near_enough(
    classes: npt.NDArray[Any], similarities: npt.NDArray[np.uint16], within: float
) -> npt.NDArray[np.bool_]:
    """bool `[n, K]`: the nearest class, and further ones by the rule of `further_within`.

    Args:
        classes: int32 `[n, K]`, the nearest first.
        similarities: uint16 `[n, K]`.
        within: a distance, 1 - cosine, may be so many times that of the nearest; 0: any.
    """
    kept: npt.NDArray[np.bool_] = classes != NO_CLASS
    if within:
        # In whole steps of the encoding, so that a tie with the nearest is one.
        distances = (_LEVELS - 1) - similarities.astype(np.int64)
        kept = kept & (distances <= within * distances[:, :1])
    return kept


def drop_images(
    rows: UnitRows, labels: Labels, settings: ClusterSettings, state: ClusterState
) -> npt.NDArray[Any]:
    """uint8 `[N]`: `KEPT`, `DUPLICATE` or `OUTLIER`.

    An image is a duplicate if one of its nearest class that comes before it, and is none itself, is
    at least so similar to it. Outliers are chosen among the others: those least similar to their
    nearest class, at most the share that is asked for.
    """
    dropped = state.array("dropped", (rows.count,), "uint8")
    if settings.duplicates:
        _drop_duplicates(rows, labels, settings, state, dropped)
    if settings.outliers:
        state.once("outliers", lambda: _drop_outliers(labels, settings.outliers, dropped))
    return dropped


def _drop_duplicates(
    rows: UnitRows,
    labels: Labels,
    settings: ClusterSettings,
    state: ClusterState,
    dropped: npt.NDArray[Any],
) -> None:
    members = sort_members(state, "duplicate_members", labels.classes[:, 0], settings.classes)
    groups = list(_groups(np.arange(settings.classes), members.counts, chunk_rows(rows.dim)))

    def _compare(piece: int) -> None:
        for number in groups[piece].tolist():
            images = members.of(number)
            if len(images) > 1:
                found = find_duplicates(rows, images, settings.duplicates)
                dropped[images[found]] = DUPLICATE

    state.run("duplicates", len(groups), _compare)


def find_duplicates(rows: UnitRows, images: Ints, threshold: float) -> npt.NDArray[np.bool_]:
    """bool `[n]`: which images of a class repeat an earlier one that is kept.

    Args:
        rows: of all images.
        images: numbers of those of the class, ascending.
        threshold: cosine from which two images are the same.
    """
    repeated = np.zeros(len(images), bool)
    kept: list[Rows] = []
    for start in range(0, len(images), _BLOCK):
        block = rows.gather(images[start : start + _BLOCK])
        new = np.ones(len(block), bool)
        for before in kept:
            new &= find_nearest(block, before, 1)[0][:, 0] < threshold
        candidates = np.flatnonzero(new)
        pairs = _find_pairs(block[candidates], threshold)
        for later, earlier in pairs:
            new[candidates[later]] &= not new[candidates[earlier]]
        repeated[start : start + _BLOCK] = ~new
        if new.any():
            kept.append(block[new])
    return repeated


def _find_pairs(rows: Rows, threshold: float) -> list[tuple[int, int]]:
    """Pairs (later, earlier) of rows that are the same, by the later one."""
    if not len(rows):
        return []
    cosines, positions = find_nearest(rows, rows, len(rows))
    later, column = np.nonzero(cosines >= threshold)
    earlier = positions[later, column]
    before = earlier < later
    return sorted(zip(later[before].tolist(), earlier[before].tolist(), strict=True))


def _drop_outliers(labels: Labels, share: float, dropped: npt.NDArray[Any]) -> None:
    """Drop the images least similar to their nearest class; those of a tie all or not at all."""
    counts = np.zeros(_LEVELS, np.int64)
    for here, similarities, classed in _nearest_parts(labels):
        considered = classed & (np.asarray(dropped[here]) != DUPLICATE)
        counts += np.bincount(similarities[considered], minlength=_LEVELS)
    limit = int(np.searchsorted(np.cumsum(counts), share * counts.sum(), side="right"))
    for here, similarities, classed in _nearest_parts(labels):
        part = dropped[here]
        part[(part != DUPLICATE) & classed & (similarities < limit)] = OUTLIER


def _nearest_parts(labels: Labels) -> Iterator[tuple[slice, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Which images, their similarity to the nearest class, and whether they have one."""
    for start in range(0, len(labels.classes), _PART):
        here = slice(start, start + _PART)
        yield here, labels.similarities[here, 0], labels.classes[here, 0] != NO_CLASS


def _groups(classes: Ints, counts: Ints, limit: int = _PAIRS) -> Iterator[Ints]:
    """Consecutive classes that have about `limit` images together."""
    if len(classes):
        group = (np.cumsum(counts) - counts) // limit
        yield from np.split(classes, np.flatnonzero(np.diff(group)) + 1)
