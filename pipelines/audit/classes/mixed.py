"""Classes whose images are of two: each is cut in two by 2-means, and the parts are compared."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator
from pipelines.audit.classes.centres import (
    Floats,
    Segments,
    group_classes,
    keep_similar,
    segments_of,
    unit_rows,
)
from pipelines.audit.settings import AuditSettings
from pipelines.clustering.members import Members
from pipelines.clustering.rows import Ints, Rows, UnitRows
from pipelines.clustering.settings import chunk_rows
from pipelines.clustering.state import ClusterState

_POWER_ROUNDS: Final = 8  # of the power iteration that finds the direction to cut along
_MEANS_ROUNDS: Final = 4  # of 2-means from there
_LEAST: Final = 2  # images of a part
_DRAWN: Final = 2000  # pairs of classes that are put together to see what that looks like
_PART: Final = 1 << 20  # images whose labels are read together
_LARGEST: Final = 64  # images of each of them, at most


class Cut(NamedTuple):
    """Each class cut in two.

    Attributes:
        second: bool `[m]`, rows of the smaller part.
        apart: float64 `[k]`, how much more similar two images of the looser part are than two of
            different parts, by their mean cosine; NaN: a part would have less than two images.
    """

    second: npt.NDArray[np.bool_]
    apart: Floats


class MixedStatistics(NamedTuple):
    """Files of what cutting the classes gave.

    Attributes:
        apart: float64 `[C]`, see `Cut`; NaN: too few images.
        part: uint8 `[N]`, 1: an image of the smaller part of its class.
        joined: float64 `[P]`, the same of two classes put together.
    """

    apart: npt.NDArray[Any]
    part: npt.NDArray[Any]
    joined: Floats


def cut_classes(part: Rows, segments: Segments, kept: npt.NDArray[np.bool_]) -> Cut:
    """Cut each class along the direction in which its images differ most, then by 2-means.

    Args:
        part: float32 `[m, D]`, of length 1.
        segments: whose rows they are.
        kept: bool `[m]`, rows that count; the others belong to no part.
    """
    owner, weight = segments.owner, kept.astype(np.float32)
    counts = segments.sum(weight.astype(np.int64))
    mean = segments.sum(part * weight[:, None]) / np.maximum(counts, 1)[:, None]
    centred = (part - mean[owner]) * weight[:, None]
    second = _cut_projected(_project(centred, segments, weight), segments, kept)
    sums = segments.sum(part * weight[:, None])
    for _ in range(_MEANS_ROUNDS):
        one = segments.sum(part * second[:, None])
        means = unit_rows(sums - one), unit_rows(one)
        gain = np.einsum("md,md->m", part, (means[1] - means[0])[owner])
        second = kept & (gain > 0)
    inside = segments.sum(second.astype(np.int64))
    swap = 2 * inside > counts
    second = np.where(swap[owner], kept & ~second, second)
    return Cut(second, _apart_of_parts(part, segments, kept, second))


def _apart_of_parts(
    part: Rows, segments: Segments, kept: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]
) -> Floats:
    """See `Cut`; strays count in no part."""
    side = 2 * segments.owner + second
    order = np.flatnonzero(kept)[np.argsort(side[kept], kind="stable")]
    filled, starts = np.unique(side[order], return_index=True)
    rows = part[order]
    parts = Segments(filled, starts, order)
    near = keep_similar(rows, parts) if len(order) else np.empty(0, bool)
    sums = np.zeros((2 * len(segments.classes), part.shape[1]))
    sizes = np.zeros(len(sums), np.int64)
    if len(order):
        sums[filled] = parts.sum(rows * near[:, None])
        sizes[filled] = parts.sum(near.astype(np.int64))
    return _apart(sums[::2], sums[1::2], sizes[::2], sizes[1::2])


def _project(centred: Rows, segments: Segments, weight: npt.NDArray[Any]) -> Rows:
    """float32 `[m]`: each row along its class's first principal direction (power iteration).

    It begins at the image that is farthest from the mean.
    """
    owner = segments.owner
    far = np.einsum("md,md->m", centred, centred)
    order = np.lexsort((far, owner))
    direction = unit_rows(centred[order[segments.starts + segments.counts - 1]])
    projected = np.einsum("md,md->m", centred, direction[owner])
    for _ in range(_POWER_ROUNDS):
        direction = unit_rows(segments.sum(centred * projected[:, None]))
        projected = np.einsum("md,md->m", centred, direction[owner])
    found: Rows = projected
    return found


def _cut_projected(projected: Rows, segments: Segments, kept: npt.NDArray[np.bool_]) -> Any:
    """bool `[m]`: rows above the value that separates two groups best (the sum of their squares).

    Of n sorted values with sum 0 the best cut after i of them is where s_i^2 (1/i + 1/(n - i)) is
    largest, s_i being the sum of the first i.
    """
    owner, values = segments.owner, projected.astype(np.float64)
    order = np.lexsort((values, ~kept, owner))
    counts = segments.sum(kept.astype(np.int64))
    position = np.arange(len(order)) - segments.starts[owner]
    running = np.cumsum(np.where(kept, values, 0.0)[order])
    before = np.concatenate([[0.0], running])[segments.starts][owner]
    partial, below = running - before, position + 1
    above = counts[owner] - below
    possible = (below >= _LEAST) & (above >= _LEAST)
    score = np.where(possible, partial**2 * (1 / below + 1 / np.where(possible, above, 1)), -np.inf)
    best = np.maximum.reduceat(score, segments.starts)
    is_best = (score == best[owner]) & possible
    at = np.where(is_best, position, len(order))
    cut = np.minimum.reduceat(at, segments.starts)
    rank = np.empty(len(order), np.int64)
    rank[order] = position
    return kept & (rank > cut[owner])


def _apart(first: Floats, second: Floats, counts: Ints, other: Ints) -> Floats:
    """See `Cut`; of the sums `[k, D]` of both parts and their counts."""
    usable = (counts >= _LEAST) & (other >= _LEAST)
    one, two = np.where(usable, counts, 2), np.where(usable, other, 2)
    within = [
        (np.einsum("kd,kd->k", sums, sums) - n) / (n * (n - 1.0))
        for sums, n in ((first, one), (second, two))
    ]
    between = np.einsum("kd,kd->k", first, second) / (one * two)
    return np.where(usable, np.minimum(*within) - between, np.nan)


def cut_all(
    rows: UnitRows,
    members: Members,
    left_out: npt.NDArray[Any] | None,
    settings: AuditSettings,
    state: ClusterState,
    name: str = "mixed",
) -> MixedStatistics:
    """Cut every class, and pairs of classes that are put together.

    Args:
        rows: of all images.
        members: images of each class.
        left_out: uint8 `[N]`, images that are strays, and count in no class; None: not known.
        settings: for the seed.
        state: gets the files.
        name: of the stages.
    """
    classes = len(members.counts)
    apart = state.array(f"{name}_apart", (classes,), "float64")
    part = state.array(f"{name}_part", (rows.count,), "uint8")
    groups = group_classes(members.counts, chunk_rows(rows.dim))

    def _cut(piece: int) -> None:
        first, stop = groups[piece]
        apart[first:stop] = np.nan
        segments = segments_of(members, first, stop)
        if len(segments.classes):
            found = _cut_images(rows, segments, left_out)
            apart[segments.classes] = found.apart
            part[segments.images] = found.second

    state.run(name, len(groups), _cut)
    pairs = draw_pairs(members.counts, settings)
    joined = state.array(f"{name}_joined", (max(1, len(pairs)),), "float64")
    per_piece = max(1, chunk_rows(rows.dim) // (2 * _LARGEST))

    def _join(piece: int) -> None:
        here = pairs[piece * per_piece : (piece + 1) * per_piece]
        segments = _put_together(members, here)
        joined[piece * per_piece : piece * per_piece + len(here)] = _cut_images(
            rows, segments, left_out
        ).apart

    state.run(f"{name}_joined", -(-len(pairs) // per_piece), _join)
    return MixedStatistics(apart, part, np.asarray(joined)[: len(pairs)])


def _cut_images(rows: UnitRows, segments: Segments, left_out: npt.NDArray[Any] | None) -> Cut:
    vectors = rows.gather(segments.images)
    kept = np.asarray(vectors.any(axis=1))
    if left_out is not None:
        kept &= np.asarray(left_out[segments.images]) == 0
    return cut_classes(vectors, segments, kept)


def take_parts(
    labels: npt.NDArray[Any], cut: MixedStatistics, threshold: float, state: ClusterState
) -> tuple[npt.NDArray[Any], Ints]:
    """Give the smaller part of each class that is cut a class of its own.

    Args:
        labels: int32 `[N]`.
        cut: of all classes.
        threshold: of `Cut.apart`, from which a class is cut.
        state: gets the file.

    Returns:
        int32 `[N]`, labels with the parts as classes from C on; and int64 `[C + parts]`, the class
        that each class is, or is a part of.
    """
    apart = np.asarray(cut.apart)
    classes = np.flatnonzero(apart >= threshold)
    parents = np.concatenate([np.arange(len(apart)), classes])
    part_of = np.full(len(apart), -1, np.int32)
    part_of[classes] = len(apart) + np.arange(len(classes))
    found = state.array("part_labels", (len(labels),), "int32")

    def _take(piece: int) -> None:
        here = slice(piece * _PART, (piece + 1) * _PART)
        own = np.asarray(labels[here])
        parts = np.where(own >= 0, part_of[own], -1)
        found[here] = np.where((np.asarray(cut.part[here]) > 0) & (parts >= 0), parts, own)

    state.run("part_labels", -(-len(labels) // _PART), _take)
    return found, parents


def draw_pairs(counts: Ints, settings: AuditSettings) -> Ints:
    """int64 `[P, 2]`: different classes of two images or more."""
    several = np.flatnonzero(counts >= _LEAST)
    if len(several) < 2:
        return np.empty((0, 2), np.int64)
    rng = generator(settings.seed, "audit/joined")
    first = rng.integers(0, len(several), _DRAWN)
    second = (first + 1 + rng.integers(0, len(several) - 1, _DRAWN)) % len(several)
    return np.stack([several[first], several[second]], 1)


def _put_together(members: Members, pairs: Ints) -> Segments:
    images = [
        np.concatenate([members.of(each)[:_LARGEST] for each in pair]) for pair in pairs.tolist()
    ]
    sizes = np.array([len(each) for each in images])
    return Segments(np.arange(len(pairs)), np.cumsum(sizes) - sizes, np.concatenate(images))
