"""TAR at FAR over all pairs of a set, in memory that does not grow with their number.

The pairs of two classes are scored in tiles, and only their highest scores are kept, which give
the thresholds. Then the pairs of one class above the thresholds are counted, class by class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.errors import UserError
from pipelines.evaluate.metrics.roc import Floats, Ints, TopScores, round_scores

KEPT: Final = 1 << 24  # scores: 128 MB, for moments twice that
_TILE: Final = 2048  # rows and columns of scores in memory


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


def compare_all_pairs(rows: Floats, labels: Ints, fars: Sequence[float]) -> AllPairs:
    """Compare every sample with every other one by the cosine.

    Args:
        rows: float64 `[N, D]`, of length 1.
        labels: `[N]`.
        fars: at which TAR is computed.

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
    highest = TopScores(max(held.values(), default=0) + 1)
    for scores, different in _tiles(rows, labels):
        highest.add(scores[different & (scores > highest.lower_bound)])
    impostor_scores = highest.descending()
    limits = np.array([impostor_scores[count] for count in held.values()])
    shares = _count_above(rows, labels, limits) / genuine
    tar = dict(zip(held, shares.tolist(), strict=True))
    return AllPairs(genuine, impostors, tar, [far for far in fars if far not in held])


def _tiles(rows: Floats, labels: Ints) -> Iterator[tuple[Floats, np.ndarray]]:
    """Yield scores, and which of them are of pairs of two classes; each pair once."""
    for first in range(0, len(rows), _TILE):
        left, mine = rows[first : first + _TILE], labels[first : first + _TILE]
        for second in range(first, len(rows), _TILE):
            right, theirs = rows[second : second + _TILE], labels[second : second + _TILE]
            different = mine[:, None] != theirs[None, :]
            yield (
                round_scores(left @ right.T),
                np.triu(different, 1) if first == second else different,
            )


def _count_above(rows: Floats, labels: Ints, limits: Floats) -> Ints:
    """Number of pairs of one class whose score is above each limit, `[limits]`."""
    counts = np.zeros(len(limits), np.int64)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels.min() - 1))
    for mine in np.split(order, starts[1:]):
        for first in range(0, len(mine), _TILE):
            part = rows[mine[first : first + _TILE]]
            scores = round_scores(part @ rows[mine[first:]].T)
            pairs = scores[np.triu(np.ones(scores.shape, bool), 1)]
            counts += (pairs[:, None] > limits).sum(axis=0)
    return counts
