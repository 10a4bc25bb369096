"""Centres of all classes: coarse cells, and in each cell its share of the classes.

A single k-means of a million centres would compare each image with a million rows in each of its
iterations. Cells divide that by their number.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import derive, generator, sample_without_replacement
from pipelines.clustering.kmeans import find_nearest, spherical_kmeans
from pipelines.clustering.members import sort_members
from pipelines.clustering.rows import Ints, Rows, UnitRows
from pipelines.clustering.settings import (
    CELL_BOUND,
    SAMPLE_BYTES,
    ClusterSettings,
    chunk_rows,
    sample_size,
)
from pipelines.clustering.state import ClusterState

_CELL_ROUNDS: Final = 2  # how often large cells are split


def train_centres(rows: UnitRows, settings: ClusterSettings, state: ClusterState) -> None:
    """Find a centre for every class: `centres` of the state, float32 `[C, D]`.

    `layout` of the state holds `cells` float32 `[M, D]` and `owners` int32 `[C]`, each class's
    cell. The classes of a cell are its share, by the images in it.
    """
    if state.is_done("centres"):
        return
    cells: Rows = np.zeros((1, rows.dim), np.float32)
    counts, members = np.array([rows.count]), None
    if settings.cells > 1:
        cells = _train_cells(rows, settings, state)
        assigned = _assign_cells(rows, cells, state, "cells")
        members = sort_members(state, "cell_members", assigned, len(cells))
        counts = members.counts
    shares = deal_classes(settings.classes, counts)
    owners = np.repeat(np.arange(len(cells)), shares).astype(np.int32)
    state.save_small("layout", cells=cells, owners=owners)
    centres = state.array("centres", (settings.classes, rows.dim), "float32")
    ends = np.cumsum(shares)

    def _train(cell: int) -> None:
        if shares[cell]:
            numbers = None if members is None else members.of(cell)
            found = train_part(rows, numbers, int(shares[cell]), settings, "classes", cell)
            centres[ends[cell] - shares[cell] : ends[cell]] = found

    state.run("classes", len(cells), _train)
    state.mark("centres")
    state.remove("cells", "cell_members")


def deal_classes(classes: int, images: Ints) -> Ints:
    """Deal classes to cells in proportion to their images, int64 `[M]`.

    Every cell with images gets one at least and none more than it has images; what is left after
    rounding down goes to the largest remainders, the first cell first.

    Args:
        classes: C, at least as many as cells with images, at most as many as images.
        images: int64 `[M]`.
    """
    exact = classes * images / images.sum()
    shares = np.clip(np.floor(exact).astype(np.int64), (images > 0).astype(np.int64), images)
    while (missing := classes - int(shares.sum())) != 0:
        step = 1 if missing > 0 else -1
        can = shares < images if step > 0 else shares > (images > 0)
        urgency = np.where(can, step * (exact - shares), -np.inf)
        chosen = np.argsort(-urgency, kind="stable")[: min(abs(missing), int(can.sum()))]
        shares[chosen] += step
    return shares


def train_part(
    rows: UnitRows,
    numbers: Ints | None,
    centres: int,
    settings: ClusterSettings,
    purpose: str,
    *ids: int,
) -> Rows:
    """Centres of some images, found on a keyed sample of them; see `spherical_kmeans`.

    Args:
        rows: of all images.
        numbers: of the images, ascending; None: of all.
        centres: k, at most as many as images.
        settings: for the seed.
        purpose, ids: key of the draw.

    Returns:
        float32 `[k, D]`.
    """
    available = rows.count if numbers is None else len(numbers)
    count = sample_size(centres, rows.dim, available)
    drawn = sample_without_replacement(
        available, count, generator(settings.seed, f"cluster/{purpose}", *ids)
    )
    seed = derive(settings.seed, f"cluster/{purpose}/start", *ids) & 0x7FFFFFFF
    return spherical_kmeans(
        rows.gather(drawn if numbers is None else numbers[drawn]), centres, seed
    )


def find_mean(rows: UnitRows, seed: int, state: ClusterState) -> Rows:
    """The mean direction float32 `[D]` of a sample of the images: a stage of the work."""

    def _find() -> None:
        count = min(rows.count, SAMPLE_BYTES // (4 * rows.dim))
        drawn = sample_without_replacement(rows.count, count, generator(seed, "cluster/mean"))
        mean = rows.gather(drawn).mean(axis=0, dtype=np.float64).astype(np.float32)
        state.save_small("mean", mean=mean)

    state.once("mean", _find)
    return state.load_small("mean")["mean"]


def _train_cells(rows: UnitRows, settings: ClusterSettings, state: ClusterState) -> Rows:
    """Coarse centres `[M, D]`; cells with many times the average are split, so M may grow."""

    def _first() -> None:
        found = train_part(rows, None, settings.cells, settings, "cells")
        state.save_small("cells-0", centres=found)

    state.once("cells-0", _first)
    cells = state.load_small("cells-0")["centres"]
    for number in range(_CELL_ROUNDS):
        if not state.is_done(f"cells-{number + 1}"):
            _split_cells(rows, cells, settings, state, number)
        before, cells = len(cells), state.load_small(f"cells-{number + 1}")["centres"]
        if len(cells) == before:
            break
    return cells


def _split_cells(
    rows: UnitRows, cells: Rows, settings: ClusterSettings, state: ClusterState, number: int
) -> None:
    """Split cells that are too large, and leave out those without an image."""
    assigned = _assign_cells(rows, cells, state, f"assigned-{number}")
    members = sort_members(state, f"assigned-{number}-members", assigned, len(cells))
    counts, average = members.counts, rows.count / len(cells)

    def _split() -> None:
        large = counts > CELL_BOUND * average
        added = [
            train_part(
                *(rows, members.of(cell), int(np.ceil(counts[cell] / average)), settings),
                *("split cells", number, cell),
            )
            for cell in np.flatnonzero(large).tolist()
        ]
        kept = cells[(counts > 0) & ~large]
        state.save_small(f"cells-{number + 1}", centres=np.concatenate([kept, *added]))

    state.once(f"cells-{number + 1}", _split)
    state.remove(f"assigned-{number}", f"assigned-{number}-members")


def _assign_cells(rows: UnitRows, cells: Rows, state: ClusterState, stage: str) -> npt.NDArray[Any]:
    """int32 `[N]`: the nearest cell of each image."""
    assigned = state.array(stage, (rows.count,), "int32")
    size = chunk_rows(rows.dim)

    def _assign(piece: int) -> None:
        part = rows.read(piece * size, min((piece + 1) * size, rows.count))
        assigned[piece * size : piece * size + len(part)] = find_nearest(part, cells, 1)[1][:, 0]

    state.run(stage, -(-rows.count // size), _assign)
    return assigned
