"""Gallery against probes: rank-k identification and TAR at FAR over all their pairs.

Scores are made in chunks and never kept as a whole. They are rounded to 12 decimals, so that equal
embeddings get equal scores wherever a matrix product puts them; ties count against the model.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_CHUNK: Final = 1 << 22  # scores in memory at a time: 32 MB
_DECIMALS: Final = 12


class Comparison(NamedTuple):
    """What comparing every probe with the whole gallery gave.

    Attributes:
        ranks: int64 `[P]`, 1 + number of other classes that score at least as high as the probe's
            own; 0 for a probe whose class is not enrolled.
        classes: number of enrolled classes.
        genuine: scores of all pairs of one class.
        impostors: number of pairs of two classes.
        highest: the highest impostor scores, falling: as many as `max_far` of all, and one.
        nearest: int64 `[P, k]`, numbers of the k best gallery entries, best first.
        scores: `[P, k]`, theirs.
    """

    ranks: Ints
    classes: int
    genuine: Floats
    impostors: int
    highest: Floats
    nearest: Ints
    scores: Floats

    def rank(self, k: int) -> float:
        """Share of the enrolled probes whose class is among the k best."""
        enrolled = self.ranks[self.ranks > 0]
        return float(np.mean(enrolled <= k)) if len(enrolled) else math.nan

    def chance(self, k: int) -> float:
        """What a random order of the classes would give for `rank(k)`."""
        return min(1.0, k / self.classes)

    def tar(self, far: float) -> float:
        """Share of genuine pairs above the lowest threshold that accepts at most `far` impostors.

        Raises:
            ValueError: `far` exceeds the `max_far` of the comparison.
        """
        # The tolerance is for products such as 0.29 * 100, which is below 29.
        allowed = math.floor(far * self.impostors + 1e-9)
        if allowed >= self.impostors:
            return 1.0
        if allowed >= len(self.highest):
            raise ValueError(f"FAR {far} is beyond what this comparison kept")
        return (
            float(np.mean(self.genuine > self.highest[allowed])) if len(self.genuine) else math.nan
        )


def compare(
    gallery: Floats,
    gallery_labels: Ints,
    probes: Floats,
    probe_labels: Ints,
    nearest: int = 5,
    max_far: float = 0.1,
) -> Comparison:
    """Compare every probe with every gallery entry by the cosine.

    Args:
        gallery: `[G, D]`, rows of length 1.
        gallery_labels: `[G]`; a class may have several entries, the best one counts.
        probes: `[P, D]`, rows of length 1.
        probe_labels: `[P]`.
        nearest: k, gallery entries to name for each probe.
        max_far: largest FAR that will be asked for; bounds what is kept of the impostors.

    Raises:
        UserError: no gallery or no probes.
    """
    if not len(gallery) or not len(probes):
        raise UserError(f"identification: {len(gallery)} gallery entries, {len(probes)} probes")
    order = np.argsort(gallery_labels, kind="stable")
    gallery, names = gallery[order], gallery_labels[order]
    classes, first = np.unique(names, return_index=True)
    matches = np.searchsorted(names, probe_labels, "right") - np.searchsorted(names, probe_labels)
    impostors = len(probes) * len(names) - int(matches.sum())
    kept = _Highest(min(impostors, math.floor(max_far * impostors) + 1))
    k = min(nearest, len(names))
    ranks, best, top, genuine = [], [], [], []
    chunk = max(1, _CHUNK // len(names))
    for start in range(0, len(probes), chunk):
        labels = probe_labels[start : start + chunk]
        scores = np.round(probes[start : start + chunk] @ gallery.T, _DECIMALS)
        own = labels[:, None] == names[None, :]
        genuine.append(scores[own])
        kept.add(scores[~own])
        ranks.append(_ranks(np.maximum.reduceat(scores, first, axis=1), classes, labels))
        top.append(_best(scores, k))
        best.append(np.take_along_axis(scores, top[-1], axis=1))
    return Comparison(
        np.concatenate(ranks),
        len(classes),
        np.concatenate(genuine),
        impostors,
        kept.falling(),
        order[np.concatenate(top)],
        np.concatenate(best),
    )


def _ranks(scores: Floats, classes: Ints, labels: Ints) -> Ints:
    """Ranks of the probes' own classes, from the best score of each class, `[p, classes]`."""
    place = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    own = scores[np.arange(len(labels)), place]
    ranks = (scores >= own[:, None]).sum(axis=1)  # its own class is the 1
    return np.where(classes[place] == labels, ranks, 0)


def _best(scores: Floats, k: int) -> Ints:
    """Columns of the k highest scores of each row, highest first, of equal ones the first."""
    chosen = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    falling = np.argsort(-np.take_along_axis(scores, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, falling, axis=1)


class _Highest:
    """Keeps the `count` highest of all values that pass by."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values = np.empty(0)

    def add(self, values: Floats) -> None:
        """Let values pass by."""
        if len(self._values) == self._count and self._count:
            values = values[values > self._values.min()]
        values = np.concatenate([self._values, values])
        surplus = len(values) - self._count
        self._values = np.partition(values, surplus)[surplus:] if surplus > 0 else values

    def falling(self) -> Floats:
        """The kept values, highest first."""
        return -np.sort(-self._values)
