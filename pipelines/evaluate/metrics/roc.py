"""The ROC of very many pairs. Of the impostors' scores only the highest are kept.

Scores are rounded to 12 decimals, so that equal embeddings get equal scores wherever a matrix
product puts them; ties count against the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FARS: Final = (1e-2, 1e-3, 1e-4)
"""The FARs that a run reports."""

KEPT: Final = 1 << 24  # impostors' scores: 128 MB, for moments twice that
SPREAD: Final = 6.0  # standard deviations of the number of sampled scores above a threshold
SAMPLED: Final = 1 << 19  # pairs; of fewer than 64 times as many none are sampled

POINTS: Final = 200  # of a curve, for a plot

_DECIMALS: Final = 12
_SPARE: Final = 1 << 20  # values that may accumulate before the highest are selected


class Roc(NamedTuple):
    """True accept rate over false accept rate, from the scores of all pairs.

    Attributes:
        genuine: scores of all pairs of one class.
        impostors: number of pairs of two classes.
        highest: the highest impostor scores, in descending order.
    """

    genuine: Floats
    impostors: int
    highest: Floats

    def holds(self, far: float) -> bool:
        """Whether enough impostor scores were kept for this FAR."""
        return not len(self.highest) <= self._allowed(far) < self.impostors

    def tar(self, far: float) -> float:
        """Share of genuine pairs above the lowest threshold that accepts at most `far` impostors.

        NaN without genuine pairs.

        Raises:
            ValueError: too few impostor scores were kept for this FAR.
        """
        if not self.holds(far):
            raise ValueError(f"FAR {far} is beyond what was kept")
        return self._above(self._allowed(far))

    def nearest_tar(self, far: float) -> tuple[float, float]:
        """TAR at the point of the ROC whose FAR is nearest to `far`, and that point's FAR.

        There is no interpolation; each score that occurs is a threshold ("at least this"). Of two
        FARs that are equally near, the larger one counts; of several points with the same FAR, the
        one with the highest TAR. That FAR may exceed the target, which flatters the model; in `tar`
        it never does.

        Raises:
            ValueError: too few impostor scores were kept for this FAR.
        """
        kept = self.highest
        counts = np.concatenate([[0], np.flatnonzero(kept[:-1] > kept[1:]) + 1])
        if len(kept) == self.impostors:
            counts = np.append(counts, self.impostors)
        target = far * self.impostors
        distance = np.abs(counts - target)
        best = int(counts[np.flatnonzero(distance <= distance.min() + 1e-9)[-1]])
        if len(kept) < self.impostors and len(kept) - target < abs(best - target):
            raise ValueError(f"FAR {far} is beyond what was kept")
        return self._above(best), best / self.impostors if self.impostors else 0.0

    def curve(self, highest_far: float) -> tuple[Floats, Floats]:
        """FAR and TAR, from one accepted impostor to a share `highest_far` of them, or those kept.

        Returns:
            Arrays over `POINTS` FARs, evenly spaced on a logarithmic scale, and those of `FARS`
            that lie between them, so that the curve passes through the reported figures.
        """
        if not self.holds(highest_far):
            highest_far = (len(self.highest) - 1) / self.impostors
        lowest = 1 / max(self.impostors, 1 / highest_far)
        within = [far for far in FARS if lowest <= far <= highest_far]
        far = np.union1d(np.geomspace(lowest, highest_far, POINTS), within)
        return far, np.array([self.tar(value) for value in far])

    def _allowed(self, far: float) -> int:
        """Impostors that may be accepted."""
        # The tolerance is for products such as 0.29 * 100, which is below 29.
        return math.floor(far * self.impostors + 1e-9)

    def _above(self, allowed: int) -> float:
        """TAR if that many impostors may be accepted."""
        if allowed >= self.impostors:
            return 1.0
        above = self.genuine > self.highest[allowed]
        return float(np.mean(above)) if len(above) else math.nan


class TopScores:
    """Keeps the `count` highest of all values that are added, and temporarily more of them.

    Attributes:
        lower_bound: values that are not above it need not be added.
    """

    def __init__(self, count: int) -> None:
        self.lower_bound = -math.inf
        self._count = count
        self._parts: list[Floats] = []
        self._size = 0

    def add(self, values: Floats) -> None:
        """Take in values."""
        values = values[values > self.lower_bound]
        self._parts.append(values)
        self._size += len(values)
        if self._size > 2 * self._count + _SPARE:
            self._compact()

    def descending(self) -> Floats:
        """The kept values, highest first."""
        self._compact()
        return -np.sort(-self._parts[0])

    def _compact(self) -> None:
        values = np.concatenate([*self._parts, np.empty(0)])
        surplus = len(values) - self._count
        if surplus > 0:
            values = np.partition(values, surplus)[surplus:] if self._count else np.empty(0)
            self.lower_bound = float(values.min()) if len(values) else math.inf
        self._parts, self._size = [values], len(values)


def sampled_bound(
    draw: Callable[[np.random.Generator, int], Floats],
    impostors: int,
    count: int,
    spread: float = SPREAD,
) -> float:
    """A score that at least `count` impostors exceed, but for a very small probability.

    Of n scores of a random sample, `p * n` are expected above the score that a share p of all
    exceeds. The score at a rank of `spread` standard deviations more is lower, all but surely.

    Args:
        draw: the scores of about so many random pairs, those of them that are of two classes.
        impostors: all pairs of two classes; of few of them none are sampled: minus infinity.
        count: scores that are wanted.
        spread: see above.
    """
    if impostors < 64 * SAMPLED:
        return -math.inf
    scores = draw(np.random.default_rng(0), SAMPLED)
    expected = len(scores) * count / impostors
    rank = math.ceil(expected + spread * math.sqrt(expected) + spread**2)
    if rank >= len(scores):
        return -math.inf
    return float(np.partition(scores, len(scores) - rank)[len(scores) - rank])


class RocCollector:
    """Collects scores in any order; keeps the genuine ones and the highest impostor scores.

    Args:
        impostors: number of pairs of two classes that will be added.
        max_far: largest FAR that will be requested.
    """

    def __init__(self, impostors: int, max_far: float) -> None:
        self._impostors = impostors
        self._genuine: list[Floats] = []
        self._highest = TopScores(min(impostors, math.floor(max_far * impostors) + 1))

    def add(self, scores: Floats, same: Bools) -> None:
        """Take in scores (`round_scores`), and whether their pairs are of one class; any shape."""
        self._genuine.append(scores[same])
        self._highest.add(scores[~same])

    def roc(self) -> Roc:
        """The ROC of all scores that were added."""
        genuine = np.concatenate(self._genuine) if self._genuine else np.empty(0)
        return Roc(genuine, self._impostors, self._highest.descending())


def round_scores(scores: Floats) -> Floats:
    """Round scores for comparison."""
    return np.round(scores, _DECIMALS)


def tar_name(far: float) -> str:
    """`tar@far=1e-3` for 0.001."""
    return f"tar@far={far:.0e}".replace("e-0", "e-")
