"""The nearest classes of every image, looked for in the cells that are nearest to it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.clustering.kmeans import find_nearest
from pipelines.clustering.rows import Ints, Rows, UnitRows, release_pages
from pipelines.clustering.settings import PROBES, ClusterSettings, chunk_rows
from pipelines.clustering.state import ClusterState
from pipelines.shards.similarities import encode_similarities

NO_CLASS: Final = -1


class Labels(NamedTuple):
    """The nearest classes of every image, the nearest first.

    Attributes:
        classes: int32 `[N, K]`; `NO_CLASS` where an image has no further one, or no direction.
        similarities: uint16 `[N, K]`, as `encode_similarities` makes them.
    """

    classes: npt.NDArray[Any]
    similarities: npt.NDArray[Any]


class ClassSearch:
    """Centres of classes, sorted by the cells that they are in."""

    def __init__(self, centres: npt.NDArray[Any], cells: Rows, owners: npt.NDArray[Any]) -> None:
        """Of centres that may be memory-mapped.

        Args:
            centres: float32 `[C, D]`.
            cells: float32 `[M, D]`, centres of the cells.
            owners: int32 `[C]`, the cell of each class.
        """
        self._centres = centres
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=len(cells))
        filled = np.flatnonzero(counts)
        ends = np.cumsum(counts)
        self._cells = cells[filled]
        self._classes = [order[ends[cell] - counts[cell] : ends[cell]] for cell in filled]

    def find(self, rows: Rows, count: int) -> tuple[Rows, Ints]:
        """Cosines float32 and classes int64 `[n, count]` of rows of length 1, the nearest first.

        A row's classes are looked for in the 8 cells nearest to it. Where these have fewer classes
        than are asked for, the class is `NO_CLASS`. So are all of a row of zeros.
        """
        if len(self._cells) == 1:
            cosines, classes = self._find_in(0, rows, count)
        else:
            cosines, classes = self._probe(rows, count)
        classes[~rows.any(axis=1)] = NO_CLASS
        cosines[classes == NO_CLASS] = -1.0
        return cosines, classes

    def _probe(self, rows: Rows, count: int) -> tuple[Rows, Ints]:
        probes = min(PROBES, len(self._cells))
        _, nearest = find_nearest(rows, self._cells, probes)
        cosines = np.full((len(rows), probes, count), -np.inf, np.float32)
        classes = np.full((len(rows), probes, count), NO_CLASS, np.int32)
        order = np.argsort(nearest, axis=None, kind="stable")
        ends = np.searchsorted(nearest.ravel()[order], np.arange(len(self._cells)), side="right")
        for cell, end in enumerate(ends.tolist()):
            here = order[ends[cell - 1] if cell else 0 : end]
            if len(here):
                row, probe = np.divmod(here, probes)
                cosines[row, probe], classes[row, probe] = self._find_in(cell, rows[row], count)
        flat, candidates = cosines.reshape(len(rows), -1), classes.reshape(len(rows), -1)
        best = np.argsort(-flat, axis=1, kind="stable")[:, :count]
        chosen = np.take_along_axis(candidates, best, 1).astype(np.int64)
        return np.take_along_axis(flat, best, 1), chosen

    def _find_in(self, cell: int, rows: Rows, count: int) -> tuple[Rows, Ints]:
        """The nearest classes of a cell; `NO_CLASS` where it has fewer."""
        members = self._classes[cell]
        found = min(count, len(members))
        centres = self._centres if len(members) == len(self._centres) else self._centres[members]
        products, positions = find_nearest(rows, np.ascontiguousarray(centres), found)
        release_pages(self._centres)
        if len(members) != len(self._centres):
            positions = members[positions]
        missing = ((0, 0), (0, count - found))
        cosines = np.pad(products, missing, constant_values=-np.inf)
        return cosines, np.pad(positions, missing, constant_values=NO_CLASS)


def open_search(
    state: ClusterState, settings: ClusterSettings, dim: int, layout: str
) -> ClassSearch:
    """The search among the centres of a state; `layout` names its cells and owners."""
    found = state.load_small(layout)
    centres = state.array("centres", (settings.classes, dim), "float32")
    return ClassSearch(centres, found["cells"], found["owners"])


def open_labels(state: ClusterState, settings: ClusterSettings, samples: int) -> Labels:
    """The files of the nearest classes of all images."""
    shape = (samples, settings.labels_per_image)
    return Labels(
        state.array("nearest", shape, "int32"), state.array("nearest_similarities", shape, "uint16")
    )


def label_images(
    rows: UnitRows, search: ClassSearch, settings: ClusterSettings, state: ClusterState, stage: str
) -> Labels:
    """Find the nearest classes of every image, part by part."""
    labels, size = open_labels(state, settings, rows.count), chunk_rows(rows.dim)
    count = min(settings.labels_per_image, settings.classes)

    def _label(piece: int) -> None:
        start = piece * size
        part = rows.read(start, min(start + size, rows.count))
        cosines, classes = search.find(part, count)
        here = slice(start, start + len(part))
        labels.classes[here, :count], labels.classes[here, count:] = classes, NO_CLASS
        labels.similarities[here, :count] = encode_similarities(cosines)

    state.run(stage, -(-rows.count // size), _label)
    return labels
