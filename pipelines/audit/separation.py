"""Faults told from what is right, by what faults are known to look like.

A fault can be made of the data itself: an image under a class that is drawn, a class cut in two,
two classes put together. So the distribution f1 of a statistic among faults is known, and what is
observed is a mixture of it with that of what is right:

    f(t) = (1 - p) f0(t) + p f1(t)

Of f0 only the upper tail matters. Above a quantile it is taken as exp(-a x - b x^2), a and b at
least 0: from the exponential tail that the theory of exceedances has (Pickands 1975) to that of a
normal distribution. The share p and the tail are found by expectation-maximisation on a histogram.
The chance that a finding is right is one minus Efron's local false discovery rate: p f1(t) / f(t)
(Efron 2004, "Large-scale simultaneous hypothesis testing").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BINS: Final = 128  # of the tail
_ROUNDS: Final = 1000  # of expectation-maximisation, at most
_NEWTON_ROUNDS: Final = 2  # in each of them
_HALVED: Final = 12  # times that a step is made shorter, at most
_TAIL: Final = 0.1  # share of what is right that is above the tail's beginning
_EVIDENCE: Final = 3.0  # logarithm of the likelihood ratio from which a long tail is believed
FALSE_FINDINGS: Final = 0.05  # share of the accused that may be right
LEAST_CHANCE: Final = 0.5  # of a fault, below which nothing is accused


class Separation(NamedTuple):
    """How faults are told by a statistic; larger is more certain.

    Attributes:
        edges: float64 `[B + 1]`, of the bins that probabilities are known of.
        chances: float64 `[K, B]`, chance of each kind of fault in a bin; they add up to at most 1.
        threshold: what is above it is accused; infinity: nothing is.
        expected_false: how many of those accused are right, as estimated.
        shares: float64 `[K]`, of each kind among all that is observed, as estimated.
        examined: how many were observed.
    """

    edges: Floats
    chances: Floats
    threshold: float
    expected_false: float
    shares: Floats
    examined: int

    def probability(self, statistic: npt.NDArray[np.floating]) -> Floats:
        """float64 `[K, n]`: the chance of each kind of fault at a statistic; 0 where it is NaN."""
        known = np.nan_to_num(statistic, nan=-np.inf)
        position = np.searchsorted(self.edges, known, side="right") - 1
        found = self.chances[:, np.clip(position, 0, self.chances.shape[1] - 1)]
        found[:, position < 0] = 0.0
        return found


def separate(
    observed: npt.NDArray[np.floating],
    faults: Sequence[npt.NDArray[np.floating]],
    false_rate: float,
    false_findings: float = FALSE_FINDINGS,
    least: float = LEAST_CHANCE,
) -> Separation:
    """Estimate how many are faults, and where they are told from the others.

    Args:
        observed: `[n]` statistics of all that is examined; NaN: it could not be.
        faults: for each kind of fault its statistics among faults that were made, `[m]` each.
        false_rate: share of what is right that may be accused.
        false_findings: share of the accused that may be right.
        least: chance of a fault below which nothing is accused.
    """
    seen = np.sort(observed[~np.isnan(observed)].astype(np.float64))
    made = [np.sort(each[~np.isnan(each)].astype(np.float64)) for each in faults]
    if len(seen) < 2 or not all(len(each) for each in made):
        return _nothing(len(made), len(seen))
    begin = _tail_begin(seen, made)
    top = max(float(seen[-1]), *(float(each[-1]) for each in made))
    if not top > begin:
        return _nothing(len(made), len(seen))
    bins = int(np.clip(min(len(each) for each in made) // 4, 16, _BINS))
    edges = np.linspace(begin, top, bins + 1)
    counts = np.histogram(seen, edges)[0].astype(np.float64)
    shapes = np.stack([_shape(each, edges) for each in made])
    shares, chances = _fit(counts, shapes)
    fault = np.maximum.accumulate(np.minimum(chances.sum(axis=0), 1.0))
    chances *= fault / np.maximum(chances.sum(axis=0), 1e-300)
    allowed = (false_rate * len(seen), false_findings, least)
    first, false = _first_accused(counts, fault, *allowed)
    threshold = float(edges[first]) if first < bins else np.inf
    shares *= counts.sum() / len(seen)
    return Separation(edges, chances, threshold, false, shares, len(seen))


def _nothing(kinds: int, examined: int) -> Separation:
    edges, chances = np.array([-np.inf, np.inf]), np.zeros((kinds, 1))
    return Separation(edges, chances, np.inf, 0.0, np.zeros(kinds), examined)


def _tail_begin(seen: Floats, made: Sequence[Floats]) -> float:
    """Where the tail begins: most of what is right is below, however many faults there are."""
    middle = min(float(np.median(each)) for each in made)
    faults = min(0.8, 2 * (len(seen) - np.searchsorted(seen, middle)) / len(seen))
    return float(np.quantile(seen, (1 - faults) * (1 - _TAIL)))


def _shape(made: Floats, edges: Floats) -> Floats:
    """float64 `[B]`: share of the made faults in each bin, smoothed; what is below is left out."""
    counts = np.histogram(made, edges)[0].astype(np.float64)
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    smooth = np.convolve(np.pad(counts, 2, mode="edge"), kernel, mode="valid") + 0.5 / len(counts)
    shape: Floats = smooth / smooth.sum()
    return shape


def _fit(counts: Floats, shapes: Floats) -> tuple[Floats, Floats]:
    """Shares `[K]` of the kinds of fault in the tail, and their chances `[K, B]` in each bin.

    There are two beginnings: that what is right falls as a normal distribution does, or
    exponentially. The second needs evidence, because cosines have an end.
    """
    bins, total = len(counts), max(counts.sum(), 1.0)
    middle = (np.searchsorted(np.cumsum(counts), total / 2) + 0.5) / bins
    x = (np.arange(bins) + 0.5) / bins / middle
    normal, exponential = (
        _maximise(counts, shapes, start) for start in (np.exp(-x * x), np.exp(-x))
    )
    chosen = exponential if exponential[0] > normal[0] + _EVIDENCE else normal
    return chosen[1], chosen[2]


def _maximise(counts: Floats, shapes: Floats, right: Floats) -> tuple[float, Floats, Floats]:
    """Expectation-maximisation: the likelihood, the shares and the chances that it comes to.

    Args:
        counts: float64 `[B]`.
        shapes: float64 `[K, B]`, of the kinds of fault.
        right: float64 `[B]`, what is right falls about like this.
    """
    total = max(counts.sum(), 1.0)
    shares = np.full(len(shapes), 0.25 / len(shapes))
    tail = np.ones(2)
    for _ in range(10):
        tail, _ = _fit_tail(right, tail)
    right = right / right.sum()
    for _ in range(_ROUNDS):
        parts = shares[:, None] * shapes
        whole = np.maximum((1 - shares.sum()) * right + parts.sum(axis=0), 1e-300)
        chances = parts / whole
        before, shares = shares, (counts * chances).sum(axis=1) / total
        tail, right = _fit_tail(counts * (1 - chances.sum(axis=0)), tail)
        if np.abs(shares - before).max() < 1e-8:
            break
    return float((counts * np.log(whole)).sum()), shares, chances


def _fit_tail(weights: Floats, tail: Floats) -> tuple[Floats, Floats]:
    """The tail of what is right that is most likely: its a and b, and the share of each bin.

    Newton's method on the likelihood of exp(-a x - b x^2) with x from 0 to 1, which is concave.

    Args:
        weights: float64 `[B]`, how many in each bin are right.
        tail: float64 `[2]`, a and b to begin with.
    """
    x = (np.arange(len(weights)) + 0.5) / len(weights)
    powers = np.stack([x, x * x])
    observed = powers @ weights / max(weights.sum(), 1e-12)
    for _ in range(_NEWTON_ROUNDS):
        share = _tail_shares(tail, powers)
        expected = powers @ share
        spread = (powers * share) @ powers.T - np.outer(expected, expected)
        free = ~((tail <= 0) & (expected < observed))  # what would become negative stays 0
        if not free.any():
            break
        step = np.zeros(2)
        matrix = spread[np.ix_(free, free)] + 1e-12 * np.eye(int(free.sum()))
        step[free] = np.linalg.solve(matrix, (expected - observed)[free])
        tail = _climb(tail, step, observed, powers)
    return tail, _tail_shares(tail, powers)


def _climb(tail: Floats, step: Floats, observed: Floats, powers: Floats) -> Floats:
    """A step as long as the likelihood grows, or none."""

    def likelihood(at: Floats) -> float:
        return float(-at @ observed - np.log(np.exp(-at @ powers).sum()))

    here = likelihood(tail)
    for _ in range(_HALVED):
        there = np.maximum(tail + step, 0.0)
        if likelihood(there) > here:
            return there
        step = step / 2
    return tail


def _tail_shares(tail: Floats, powers: Floats) -> Floats:
    shares: Floats = np.exp(-tail @ powers)
    return shares / shares.sum()


def _first_accused(
    counts: Floats, fault: Floats, allowed_false: float, false_findings: float, least: float
) -> tuple[int, float]:
    """The first bin that is accused, and how many of the accused are right.

    As many bins as may be, from the last one down.

    Args:
        counts: float64 `[B]`, of what is examined.
        fault: float64 `[B]`, the chance of a fault.
        allowed_false: how many that are right may be accused.
        false_findings, least: see `separate`.
    """
    false = np.cumsum((counts * (1 - fault))[::-1])[::-1]
    accused = np.cumsum(counts[::-1])[::-1]
    allowed = (false <= np.minimum(allowed_false, false_findings * accused)) & (accused > 0)
    allowed &= fault >= least
    if not allowed.any():
        return len(counts), 0.0
    first = int(np.argmax(allowed))
    return first, float(false[first])


def part_in_two(
    observed: npt.NDArray[np.floating],
    high: npt.NDArray[np.floating],
    low: npt.NDArray[np.floating],
    error: float,
) -> Separation:
    """Tell two kinds apart whose distributions are both known.

    Args:
        observed: `[n]` statistics of a mixture of both.
        high: `[m]` statistics of the kind that has the larger ones.
        low: `[m]` of the other.
        error: share of what is taken for the kind `high` that may be of the other.

    Returns:
        The chance of the kind `high`, which grows with the statistic. What is above `threshold` is
        taken for it; `expected_false` of these are expected to be of the other.
    """
    seen, *made = (each[~np.isnan(each)].astype(np.float64) for each in (observed, high, low))
    if not (len(made[0]) and len(made[1])):
        return _nothing(1, len(seen))
    ends = [np.array([each.min(), each.max()]) for each in (seen, *made) if len(each)]
    bottom, top = float(np.min(ends)), float(np.max(ends))
    edges = np.linspace(bottom, max(top, bottom + 1e-6), _BINS + 1)
    counts = np.histogram(seen, edges)[0].astype(np.float64)
    shapes = [_shape(np.sort(each), edges) for each in made]
    share = 0.5
    for _ in range(_ROUNDS):
        chance = share * shapes[0] / (share * shapes[0] + (1 - share) * shapes[1])
        before, share = share, (counts * chance).sum() / max(counts.sum(), 1.0)
        if abs(share - before) < 1e-7:
            break
    chance = np.maximum.accumulate(chance)
    false = np.cumsum((counts * (1 - chance))[::-1])[::-1]
    taken = np.cumsum(counts[::-1])[::-1]
    allowed = (false <= error * taken) & (chance >= LEAST_CHANCE)
    first = int(np.argmax(allowed)) if allowed.any() else _BINS
    threshold = float(edges[first]) if allowed.any() else np.inf
    expected = float(false[first]) if allowed.any() else 0.0
    return Separation(edges, chance[None], threshold, expected, np.array([share]), len(seen))
