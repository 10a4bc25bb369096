"""Confidence intervals of verification figures: the bootstrap over pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator
from pipelines.evaluate.metrics.verification import Bools, Floats, fold_slices

DRAWS: Final = 200
LEVEL: Final = 0.95


class Interval(NamedTuple):
    """The range that holds a share `LEVEL` of the bootstrap's figures, from percentiles."""

    low: float
    high: float


def bootstrap_interval(
    figure: Callable[[Floats, Bools], float],
    distances: Floats,
    same: Bools,
) -> Interval:
    """The bootstrap interval of a ten-fold figure.

    Each draw takes as many same and as many different pairs of each fold as the fold has, with
    replacement, and runs the whole protocol again, including the choice of thresholds. Pairs stay
    in their folds, so no pair is in both the training and the test part.

    Args:
        figure: computes the figure from distances `[P]` and same `[P]`.
        distances, same: of all pairs.
    """
    strata = _strata(same)
    figures = np.empty(DRAWS)
    for draw in range(len(figures)):
        rng = generator(0, "bootstrap", draw)
        chosen = np.concatenate([part[rng.integers(0, len(part), len(part))] for part in strata])
        figures[draw] = figure(distances[chosen], same[chosen])
    tail = (1 - LEVEL) / 2
    return Interval(*(float(value) for value in np.quantile(figures, [tail, 1 - tail])))


def _strata(same: Bools) -> list[npt.NDArray[np.int64]]:
    """The pairs of each fold and kind, folds in order."""
    numbers = np.arange(len(same))
    parts = [numbers[part] for part in fold_slices(len(same))]
    strata = [part[same[part] == kind] for part in parts for kind in (True, False)]
    return [stratum for stratum in strata if len(stratum)]
