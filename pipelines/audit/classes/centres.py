"""Centres of classes that strays have no part in, and how similar the images of a class are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import GOLDEN, derive, mix64
from pipelines.audit.settings import PER_CLASS, AuditSettings
from pipelines.clustering.members import Members
from pipelines.clustering.rows import Ints, Rows, UnitRows
from pipelines.clustering.settings import chunk_rows
from pipelines.clustering.state import ClusterState

Floats = npt.NDArray[np.float64]

_ROUNDS: Final = 2  # how often strays are left out, and the centre is found anew
_SIMILAR: Final = 0.5  # share of its class's upper quartile that an image must be near the centre
_PART: Final = 1 << 14  # classes that are in memory together
_PRIOR_PAIRS: Final = 3.0  # pairs of images that the mean of all classes counts in a class


class Segments(NamedTuple):
    """Rows of some classes, class after class.

    Attributes:
        classes: int64 `[k]`, ascending; each has a row at least.
        starts: int64 `[k]`, where each begins.
        images: int64 `[m]`, numbers of the images.
    """

    classes: Ints
    starts: Ints
    images: Ints

    @property
    def counts(self) -> Ints:
        """int64 `[k]`: rows of each class."""
        return np.diff(self.starts, append=len(self.images))

    @property
    def owner(self) -> Ints:
        """int64 `[m]`: position of each row's class in `classes`."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Sums `[k, ...]` over the rows of each class of values `[m, ...]`."""
        return np.add.reduceat(values, self.starts, axis=0)

    def quantile(self, values: Floats, share: float) -> Floats:
        """float64 `[k]`: the value of each class that this share of its values are below.

        NaN counts as the lowest.
        """
        order = np.lexsort((np.nan_to_num(values, nan=-np.inf), self.owner))
        return values[order[self.starts + (self.counts * share).astype(np.int64)]]


class ClassCentres(NamedTuple):
    """Files of the centres of all classes.

    Attributes:
        sums: float32 `[C, D]`, of the rows of the images that a class's centre is made of.
        counts: int32 `[C]`, how many they are.
        used: uint8 `[N]`, whether an image is one of them.
        halves: float64 `[C, 3]`, of two halves of them: length of each one's sum squared, and the
            product of both.
    """

    sums: npt.NDArray[Any]
    counts: npt.NDArray[Any]
    used: npt.NDArray[Any]
    halves: npt.NDArray[Any]


def open_centres(
    state: ClusterState, classes: int, samples: int, dim: int, prefix: str = ""
) -> ClassCentres:
    """The files of a state, whose names begin with a prefix."""
    return ClassCentres(
        state.array(f"{prefix}sums", (classes, dim), "float32"),
        state.array(f"{prefix}counts", (classes,), "int32"),
        state.array(f"{prefix}used", (samples,), "uint8"),
        state.array(f"{prefix}halves", (classes, 3), "float64"),
    )


def group_classes(counts: Ints, limit: int) -> list[tuple[int, int]]:
    """Consecutive classes `[first, stop)` that have about `limit` images together, all classes.

    Args:
        counts: int64 `[C]`, images of each; more than `PER_CLASS` count as so many.
        limit: images.
    """
    return group_by_size(np.minimum(counts, PER_CLASS), limit)


def group_by_size(sizes: Ints, limit: int) -> list[tuple[int, int]]:
    """Consecutive classes `[first, stop)` whose sizes have a sum of about `limit`, all classes.

    A group ends with the class that exceeds the limit.

    Args:
        sizes: int64 `[C]`.
        limit: of a sum.
    """
    group = (np.cumsum(sizes) - sizes) // limit
    bounds = np.flatnonzero(np.diff(group, prepend=-1, append=group[-1:] + 1)).tolist()
    return list(pairwise(bounds))


def segments_of(members: Members, first: int, stop: int) -> Segments:
    """The images of consecutive classes; of a class with very many so many, evenly drawn."""
    counts = np.minimum(members.counts[first:stop], PER_CLASS)
    filled = np.flatnonzero(counts)
    starts = (np.cumsum(counts) - counts)[filled]
    return Segments(first + filled, starts, members.some_between(first, stop, PER_CLASS))


def find_centres(
    rows: UnitRows,
    members: Members,
    settings: AuditSettings,
    state: ClusterState,
    prefix: str = "",
) -> ClassCentres:
    """Find the centres of all classes, group by group; see `open_centres`."""
    found = open_centres(state, len(members.counts), rows.count, rows.dim, prefix)
    groups = group_classes(members.counts, chunk_rows(rows.dim))

    def _find(piece: int) -> None:
        segments = segments_of(members, *groups[piece])
        if not len(segments.classes):
            return
        part = rows.gather(segments.images)
        kept = keep_similar(part, segments)
        kept_rows = part * kept[:, None]
        half = alternate(segments, kept, settings.seed)
        sums, first = segments.sum(kept_rows), segments.sum(kept_rows * half[:, None])
        found.sums[segments.classes] = sums
        found.counts[segments.classes] = segments.sum(kept.astype(np.int32))
        found.used[segments.images] = kept
        one, other = first.astype(np.float64), (sums - first).astype(np.float64)
        found.halves[segments.classes] = np.stack(
            [(one * one).sum(1), (other * other).sum(1), (one * other).sum(1)], 1
        )

    state.run(f"{prefix}centres", len(groups), _find)
    return found


def keep_similar(part: Rows, segments: Segments) -> npt.NDArray[np.bool_]:
    """bool `[m]`: rows that are near enough to the centre of the others of their class.

    Near enough is measured by the upper quartile of the class: the median is a stray's where half
    of the images are strays, as happens in classes of a few images. Of one or two images all are
    kept. An image without direction is not.
    """
    usable: npt.NDArray[np.bool_] = np.asarray(part.any(axis=1))
    kept = usable
    few = segments.sum(usable.astype(np.int64))[segments.owner] <= 2
    for _ in range(_ROUNDS):
        sums = segments.sum(part * kept[:, None])
        near = leave_one_out(part, sums[segments.owner], kept, segments.sum(kept)[segments.owner])
        near[~usable] = np.nan
        upper = segments.quantile(near, 3 / 4)[segments.owner]
        kept = usable & (few | (near >= _SIMILAR * upper))
    return kept


def leave_one_out(
    part: Rows, sums: Rows, used: npt.NDArray[Any], counts: npt.NDArray[Any]
) -> Floats:
    """float64 `[m]`: cosine of each row to the centre of a class without the row itself.

    Args:
        part: float32 `[m, D]`, of length 1.
        sums: float32 `[m, D]`, of the rows that the centre is made of.
        used: `[m]`, whether the row is one of them.
        counts: `[m]`, how many they are.

    Returns:
        NaN where no other row is left.
    """
    own = used.astype(np.float64)
    dots = np.einsum("md,md->m", part, sums).astype(np.float64)
    squares = np.einsum("md,md->m", sums, sums).astype(np.float64)
    length = np.sqrt(np.maximum(squares - own * (2 * dots - 1), 0.0))
    usable = (counts - own > 0) & (length > 1e-6)
    return np.where(usable, (dots - own) / np.where(usable, length, 1.0), np.nan)


def alternate(segments: Segments, kept: npt.NDArray[np.bool_], seed: int) -> npt.NDArray[np.bool_]:
    """bool `[m]`: every second of the kept rows of a class, in an order drawn by image number."""
    key = mix(segments.images, derive(seed, "audit/halves"))
    owner = segments.owner
    order = np.lexsort((key, ~kept, owner))
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    chosen: npt.NDArray[np.bool_] = kept & ((position - segments.starts[owner]) % 2 == 0)
    return chosen


def mix(numbers: Ints, key: int) -> npt.NDArray[np.uint64]:
    """uint64 `[n]`: a keyed hash of each number."""
    return mix64(numbers.astype(np.uint64) + 2 * key + GOLDEN)


def unit_rows(rows: Rows) -> Rows:
    """float32 `[n, D]`: rows with length 1; those of hardly any length become zeros."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-6)


def within_cosine(squares: Floats, counts: npt.NDArray[Any], prior: float | None = None) -> Floats:
    """float64 `[k]`: mean cosine of two different images of a class.

    From the length s of the sum of n rows of length 1 it is (s^2 - n) / (n (n - 1)).

    Args:
        squares: float64 `[k]`, s^2.
        counts: `[k]`, n.
        prior: the mean of all classes, which counts as three pairs; None: NaN of a single image.
    """
    pairs = counts.astype(np.float64) * (counts - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if prior is None:
            return np.where(pairs > 0, (squares - counts) / pairs, np.nan)
    weight = 2 * _PRIOR_PAIRS
    found: Floats = (squares - counts + weight * prior) / (pairs + weight)
    return np.where(counts > 1, found, prior)


def typical_within(centres: ClassCentres) -> float:
    """The mean over classes of the mean cosine of two of their images; 0 if all have one."""
    total = number = 0.0
    for start in range(0, len(centres.counts), _PART):
        sums = np.asarray(centres.sums[start : start + _PART])
        squares = np.einsum("cd,cd->c", sums, sums).astype(np.float64)
        found = within_cosine(squares, np.asarray(centres.counts[start : start + _PART]))
        total, number = total + float(np.nansum(found)), number + int((~np.isnan(found)).sum())
    return total / number if number else 0.0


def relatedness(
    products: Floats,
    squares: tuple[Floats, Floats],
    counts: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    typical: float,
) -> Floats:
    """float64 `[k]`: how much of what images of a class share they share with those of another.

    The mean cosine of an image of one and an image of the other, divided by the geometric mean of
    the mean cosines within both: 1 for two halves of a class.

    Args:
        products: float64 `[k]`, of the sums of both classes.
        squares: float64 `[k]` each, lengths of their sums, squared.
        counts: `[k]` each, images of both.
        typical: see `typical_within`.
    """
    first, second = (
        np.maximum(within_cosine(square, count, typical), 0.05)
        for square, count in zip(squares, counts, strict=True)
    )
    between = products / np.maximum(counts[0].astype(np.float64) * counts[1], 1.0)
    found: Floats = between / np.sqrt(first * second)
    found[(counts[0] < 1) | (counts[1] < 1)] = np.nan
    return found


def halves_relatedness(centres: ClassCentres, typical: float) -> Floats:
    """float64 `[C]`: the relatedness of two halves of each class; NaN below four images."""
    counts, halves = np.asarray(centres.counts), np.asarray(centres.halves)
    one, other = (counts + 1) // 2, counts // 2
    found = relatedness(halves[:, 2], (halves[:, 0], halves[:, 1]), (one, other), typical)
    found[counts < 4] = np.nan
    return found
