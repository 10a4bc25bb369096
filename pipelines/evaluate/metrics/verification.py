"""Verification 1:1 over ten folds (docs/formats.md section 2): accuracy, TAR at FAR."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FOLDS: Final = 10


class Accuracy(NamedTuple):
    """Ten-fold accuracy.

    Attributes:
        mean, std: over the folds; the standard deviation is the population's.
        thresholds: `[10]`, the one that was best on the other nine folds.
    """

    mean: float
    std: float
    thresholds: Floats


class TarAtFar(NamedTuple):
    """True accept rate at a false accept rate, over ten folds.

    Attributes:
        tar, far: mean TAR and mean FAR of the folds, each at the threshold that the other nine
            chose.
        thresholds: `[10]`.
    """

    tar: float
    far: float
    thresholds: Floats


def ten_fold_accuracy(distances: Floats, same: Bools) -> Accuracy:
    """Accuracy of "same iff distance < t", t of 0, 0.01, ... below 4.

    Args:
        distances: squared L2 distances between embeddings of length 1, `[P]`.
        same: whether a pair is of one class, `[P]`.

    Raises:
        UserError: fewer pairs than folds.
    """
    thresholds = np.arange(0, 4, 0.01)
    accepted, size = _accepted(distances, same, thresholds)
    correct = accepted[0] + (size[1, :, None] - accepted[1])
    # The first of the best thresholds: argmax takes the first of equal integers.
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)
    folds = correct[np.arange(FOLDS), best] / size.sum(axis=0)
    return Accuracy(float(folds.mean()), float(folds.std()), thresholds[best])


def tar_at_far(distances: Floats, same: Bools, far: float) -> TarAtFar:
    """TAR at a target FAR, thresholds of 0, 0.001, ... below 4.

    On the nine training folds FAR is a function of the threshold. The threshold that gives the
    target is interpolated linearly between the last one below the target and the first one that
    reaches it. If none reaches it, the threshold is 0, which accepts nothing; so it is where the
    first step of the grid reaches it: those impostors lie on each other, and ties count against
    the model.

    Raises:
        UserError: fewer pairs than folds, or a fold without same or without different pairs.
    """
    grid = np.arange(0, 4, 0.001)
    accepted, size = _accepted(distances, same, grid)
    if not size.all():
        raise UserError("TAR@FAR: a fold has no same or no different pairs; mix the pairs' order")
    rest = accepted[1].sum(axis=0) - accepted[1]
    far_train = rest / (size[1].sum() - size[1])[:, None]
    thresholds = np.array([_threshold_at(curve, grid, far) for curve in far_train])
    tar, far_test = np.empty(FOLDS), np.empty(FOLDS)
    for fold, part in enumerate(fold_slices(len(same))):
        accept = distances[part] < thresholds[fold]
        tar[fold] = accept[same[part]].sum() / size[0, fold]
        far_test[fold] = accept[~same[part]].sum() / size[1, fold]
    return TarAtFar(float(tar.mean()), float(far_test.mean()), thresholds)


def roc_curve(distances: Floats, same: Bools, points: int = 200) -> tuple[Floats, Floats]:
    """FAR and TAR over all pairs, for a plot, at FARs from one different pair to all of them.

    Returns:
        far `[points]`, evenly spaced on a logarithmic scale; tar `[points]`, at the largest
        threshold whose FAR does not exceed it.
    """
    genuine, impostors = np.sort(distances[same]), np.sort(distances[~same])
    if not len(genuine) or not len(impostors):
        raise UserError("ROC: it needs same and different pairs")
    far = np.geomspace(1 / len(impostors), 1, points)
    allowed = np.floor(far * len(impostors) + 1e-9).astype(np.int64)
    limits = np.append(impostors, np.inf)[allowed]
    return far, np.searchsorted(genuine, limits, side="left") / len(genuine)


def fold_slices(pairs: int) -> list[slice]:
    """Ten contiguous folds; the first `pairs % 10` of them are one longer.

    Raises:
        UserError: fewer pairs than folds.
    """
    if pairs < FOLDS:
        raise UserError(f"verification: {pairs} pairs are too few for {FOLDS} folds")
    sizes = [pairs // FOLDS + (fold < pairs % FOLDS) for fold in range(FOLDS)]
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


def _accepted(
    distances: Floats, same: Bools, thresholds: Floats
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number of pairs of each fold below each threshold, `[2, 10, T]`, and of all, `[2, 10]`.

    The first axis is same, different.
    """
    folds = fold_slices(len(same))
    fold = np.repeat(np.arange(FOLDS), [part.stop - part.start for part in folds])
    # The first threshold above a distance accepts its pair, and so do all higher ones.
    first = np.searchsorted(thresholds, distances, side="right")
    width = len(thresholds) + 1
    bins = (np.where(same, 0, FOLDS) + fold) * width + first
    counts = np.bincount(bins, minlength=2 * FOLDS * width).reshape(2, FOLDS, width)
    accepted = np.cumsum(counts, axis=2)
    return accepted[:, :, :-1], accepted[:, :, -1]


def _threshold_at(fars: Floats, grid: Floats, target: float) -> float:
    """The interpolated threshold at which FAR, which never falls, reaches the target; else 0.

    Within the first step it would part equal embeddings from equal ones.
    """
    after = int(np.searchsorted(fars, target, side="left"))
    if after <= 1 or after == len(fars):
        return 0.0
    low, high = fars[after - 1], fars[after]
    share = (target - low) / (high - low)
    return float(grid[after - 1] + share * (grid[after] - grid[after - 1]))
