"""TAR at FAR over all pairs of a set, in memory that does not grow with their number.

The pairs of two classes are gone through in tiles, and only their highest scores are kept; those
give the thresholds. The pairs of one class are then counted above the thresholds, class by class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.errors import UserError
from pipelines.evaluate.metrics.roc import Floats, Highest, Ints, rounded

KEPT: Final = 1 << 24  # scores: 128 MB, and twice that at times
_TILE: Final = 2048  # rows and columns of scores in memory


class AllPairs(NamedTuple):
    """What was found.

    Attributes:
        genuine, impostors: numbers of pairs of one class, and of two.
        tar: FAR -> TAR at the lowest threshold whose FAR does not exceed it.
        beyond: FARs that were asked for and would take more memory.
    """

    genuine: int
    impostors: int
    tar: dict[float, float]
    beyond: list[float]


def compare_all(rows: Floats, labels: Ints, fars: Sequence[float]) -> AllPairs:
    """Compare every sample with every other one by the cosine.

    Args:
        rows: float64 `[N, D]`, of length 1.
        labels: `[N]`.
        fars: wanted.

    Raises:
        UserError: all samples are of one class, or each of its own.
    """
    sizes = np.unique(labels, return_counts=True)[1].astype(np.int64)
    genuine = int((sizes * (sizes - 1) // 2).sum())
    impostors = len(labels) * (len(labels) - 1) // 2 - genuine
    if not genuine or not impostors:
        raise UserError(f"all pairs: {genuine} pairs of one class and {impostors} of two classes")
    allowed = {far: math.floor(far * impostors + 1e-9) for far in fars}
    held = {far: count for far, count in allowed.items() if count < min(KEPT, impostors)}
    highest = Highest(max(held.values(), default=0) + 1)
    for scores, apart in _tiles(rows, labels):
        highest.add(scores[apart & (scores > highest.floor)])
    falling = highest.falling()
    limits = np.array([falling[count] for count in held.values()])
    shares = _above(rows, labels, limits) / genuine
    tar = dict(zip(held, shares.tolist(), strict=True))
    return AllPairs(genuine, impostors, tar, [far for far in fars if far not in held])


def _tiles(rows: Floats, labels: Ints) -> Iterator[tuple[Floats, np.ndarray]]:
    """Scores, and which of them are pairs of two classes; each pair once."""
    for first in range(0, len(rows), _TILE):
        left, mine = rows[first : first + _TILE], labels[first : first + _TILE]
        for second in range(first, len(rows), _TILE):
            right, theirs = rows[second : second + _TILE], labels[second : second + _TILE]
            apart = mine[:, None] != theirs[None, :]
            yield rounded(left @ right.T), np.triu(apart, 1) if first == second else apart


def _above(rows: Floats, labels: Ints, limits: Floats) -> Ints:
    """Pairs of one class whose score is above each limit, `[limits]`."""
    counts = np.zeros(len(limits), np.int64)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels.min() - 1))
    for mine in np.split(order, starts[1:]):
        for first in range(0, len(mine), _TILE):
            part = rows[mine[first : first + _TILE]]
            scores = rounded(part @ rows[mine[first:]].T)
            pairs = scores[np.triu(np.ones(scores.shape, bool), 1)]
            counts += (pairs[:, None] > limits).sum(axis=0)
    return counts
