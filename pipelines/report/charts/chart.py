"""What a chart shows: lines over an axis, bars of a histogram, points of a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend and at the pointer.
        x, y: its points `[n]`, `x` ascending; where `y` is not finite there is a gap.
        colour: number of one of the page's five colours.
        dash: 0 whole, 1 dashed, 2 dotted.
        is_faint: whether it stands behind the others, thin.
        is_marked: whether each point has a dot.
    """

    name: str
    x: Values
    y: Values
    colour: int = 0
    dash: int = 0
    is_faint: bool = False
    is_marked: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over one axis.

    Attributes:
        title: above it.
        x: what the horizontal axis is.
        lines: at least one of them has a point.
        is_share: whether values are shares: the axis then goes from 0 to 100 %.
        is_log: whether the horizontal axis is logarithmic.
        levels: (name, value) of lines that are the same everywhere.
        note: below it.
    """

    title: str
    x: str
    lines: Sequence[Line]
    is_share: bool = False
    is_log: bool = False
    levels: Sequence[tuple[str, float]] = ()
    note: str = ""


@dataclass(frozen=True)
class BarChart:
    """Bars of counts.

    Attributes:
        title: above it.
        x: what the horizontal axis is.
        unit: what is counted, plural.
        names: of the bars.
        counts: int64 `[n]`, as many as names.
        note: below it.
    """

    title: str
    x: str
    unit: str
    names: Sequence[str]
    counts: npt.NDArray[np.int64]
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """Counts of a number over its range, on a logarithmic vertical axis.

    Attributes:
        title: above it.
        x: what the number is.
        unit: what is counted, plural.
        edges: `[n + 1]`, ascending, of the ranges.
        counts: int64 `[n]`.
        threshold: a line over the number; the bars beyond it have another colour. None: no line.
        note: below it.
    """

    title: str
    x: str
    unit: str
    edges: Values
    counts: npt.NDArray[np.int64]
    threshold: float | None = None
    note: str = ""


@dataclass(frozen=True)
class PointMap:
    """Points in the plane, in groups.

    Attributes:
        title: above it.
        groups: (name, points `[n, 2]`) of each group.
        note: below it.
    """

    title: str
    groups: Sequence[tuple[str, Values]]
    note: str = ""


@dataclass(frozen=True)
class DrawnChart:
    """A chart as a page holds it.

    Attributes:
        title: above it.
        svg: of the chart.
        legend: (name, classes of its line's colour and dash); empty: none is needed.
        note: below it.
    """

    title: str
    svg: str
    legend: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


def thin_envelope(x: Values, y: Values, buckets: int) -> tuple[Values, Values]:
    """Points of a line, at most two a bucket: the lowest and the highest, in their order."""
    if len(x) <= 2 * buckets:
        return x, y
    chosen: set[int] = set()
    for part in np.array_split(np.arange(len(x)), buckets):
        finite = part[np.isfinite(y[part])]
        if len(finite):
            chosen |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])}
    numbers = sorted(chosen)
    return x[numbers], y[numbers]


def thin_evenly(count: int, limit: int) -> npt.NDArray[np.int64]:
    """Numbers below `count`, at most `limit` of them, evenly spread, the first and the last too."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))
