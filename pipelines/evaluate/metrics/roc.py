"""Scores of very many pairs: of the impostors' only the highest are kept, which TAR at FAR needs.

Scores are rounded to 12 decimals, so that equal embeddings get equal scores wherever a matrix
product puts them; ties count against the model.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FARS: Final = (1e-2, 1e-3, 1e-4)
"""The FARs that a run reports."""

_DECIMALS: Final = 12
_SPARE: Final = 1 << 20  # values that may gather before the highest are picked


class PairScores(NamedTuple):
    """What is known of the scores of all pairs.

    Attributes:
        genuine: scores of all pairs of one class.
        impostors: number of pairs of two classes.
        highest: the highest impostor scores, falling.
    """

    genuine: Floats
    impostors: int
    highest: Floats

    def tar(self, far: float) -> float:
        """Share of genuine pairs above the lowest threshold that accepts at most `far` impostors.

        Not a number without genuine pairs.

        Raises:
            ValueError: so many impostors were not kept.
        """
        # The tolerance is for products such as 0.29 * 100, which is below 29.
        allowed = math.floor(far * self.impostors + 1e-9)
        if len(self.highest) <= allowed < self.impostors:
            raise ValueError(f"FAR {far} is beyond what was kept")
        return self._above(allowed)

    def nearest_tar(self, far: float) -> tuple[float, float]:
        """TAR at the point of the ROC whose FAR is nearest to `far`, and that point's FAR.

        No interpolation; each score that occurs is a threshold ("at least this"). Of two FARs
        equally near the larger one counts, and of the points of one FAR the one of the highest
        TAR. That FAR may exceed the target, which flatters the model: `tar` does not let it.

        Raises:
            ValueError: so many impostors were not kept.
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

    def curve(self, highest_far: float, points: int = 200) -> tuple[Floats, Floats]:
        """FAR and TAR, from one impostor accepted to `highest_far` of them.

        Returns:
            arrays of `points` evenly on a logarithmic scale and, if they are within, `FARS`: what
            is read off the curve there is what is reported.
        """
        lowest = 1 / max(self.impostors, 1 / highest_far)
        within = [far for far in FARS if lowest <= far <= highest_far]
        far = np.union1d(np.geomspace(lowest, highest_far, points), within)
        return far, np.array([self.tar(value) for value in far])

    def _above(self, allowed: int) -> float:
        """TAR where that many impostors may be accepted."""
        if allowed >= self.impostors:
            return 1.0
        above = self.genuine > self.highest[allowed]
        return float(np.mean(above)) if len(above) else math.nan


class Highest:
    """Keeps the `count` highest of all values that pass by, and at times as many again.

    Attributes:
        floor: what is not above it need not be shown.
    """

    def __init__(self, count: int) -> None:
        self.floor = -math.inf
        self._count = count
        self._parts: list[Floats] = []
        self._size = 0

    def add(self, values: Floats) -> None:
        """Let values pass by."""
        values = values[values > self.floor]
        self._parts.append(values)
        self._size += len(values)
        if self._size > 2 * self._count + _SPARE:
            self._compact()

    def falling(self) -> Floats:
        """The kept values, highest first."""
        self._compact()
        return -np.sort(-self._parts[0])

    def _compact(self) -> None:
        values = np.concatenate([*self._parts, np.empty(0)])
        surplus = len(values) - self._count
        if surplus > 0:
            values = np.partition(values, surplus)[surplus:] if self._count else np.empty(0)
            self.floor = float(values.min()) if len(values) else math.inf
        self._parts, self._size = [values], len(values)


class Collector:
    """Takes scores as they come; memory for the genuine ones and a share of the others.

    Args:
        impostors: how many pairs of two classes there will be.
        max_far: largest FAR that will be asked for.
    """

    def __init__(self, impostors: int, max_far: float) -> None:
        self._impostors = impostors
        self._genuine: list[Floats] = []
        self._highest = Highest(min(impostors, math.floor(max_far * impostors) + 1))

    def add(self, scores: Floats, same: Bools) -> None:
        """Take in scores (`rounded`), and whether their pairs are of one class; any shape."""
        self._genuine.append(scores[same])
        self._highest.add(scores[~same])

    def scores(self) -> PairScores:
        """What came in."""
        genuine = np.concatenate(self._genuine) if self._genuine else np.empty(0)
        return PairScores(genuine, self._impostors, self._highest.falling())


def rounded(scores: Floats) -> Floats:
    """Scores as they are compared."""
    return np.round(scores, _DECIMALS)


def far_name(far: float) -> str:
    """`tar@far=1e-3` for 0.001."""
    return f"tar@far={far:.0e}".replace("e-0", "e-")
