"""The frame of a chart: scales, ticks, grid, and the boxes that a pointer or a key opens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from pipelines.report.charts.chart import Values
from pipelines.report.charts.numbers import format_power, format_tick

WIDTH, HEIGHT = 360, 240
_TOP, _RIGHT, _BOTTOM = 10, 14, 40
_LETTER: Final = 6.4  # width of a letter of 11 px, at most
_GAP: Final = 4  # pixels between two names below an axis
_LINE: Final = 15  # pixels
_MAX_TIP_LINES: Final = 12
_MAX_TIP_LETTERS: Final = 34


class Scale(NamedTuple):
    """From values to pixels.

    Attributes:
        low, high: values at the ends.
        start, stop: pixels at the ends.
        is_log: whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, values: Any) -> Values:
        """Pixels of values."""
        low, high = self.low, self.high
        if self.is_log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        share = (np.asarray(values, np.float64) - low) / (high - low or 1.0)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int, is_whole: bool = False) -> list[float]:
        """Round values between the ends, about so many; of a logarithmic scale the powers of 10."""
        if self.is_log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**power for power in powers]
        locator = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=is_whole)
        found = locator.tick_values(self.low, self.high)
        return [float(tick) for tick in found if self.low <= tick <= self.high]


class ChartFrame(NamedTuple):
    """Where the lines of a chart go: its scales, and the markup of grid and labels."""

    x: Scale
    y: Scale
    markup: str

    def hit_area(self, left: float, width: float) -> str:
        """Markup of a column over the whole height that takes the pointer."""
        return (
            f'<rect class="hit" x="{left:.1f}" y="{self.y.stop}" width="{width:.1f}" '
            f'height="{self.y.start - self.y.stop}"/>'
        )

    def bar(self, left: float, width: float, count: int, colour: int) -> str:
        """Markup of a bar that is as high as a count."""
        top = float(self.y(count))
        return (
            f'<rect class="bar c{colour}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{self.y.start - top:.1f}"/>'
        )


def make_frame(
    x: tuple[float, float],
    y: tuple[float, float],
    label: str,
    is_share: bool = False,
    is_log: bool = False,
    names: Sequence[str] = (),
    is_histogram: bool = False,
) -> ChartFrame:
    """Lay out the grid of a chart.

    Args:
        x, y: lowest and highest value.
        label: of the horizontal axis.
        is_share: whether the vertical axis is in percent.
        is_log: whether the horizontal axis is logarithmic.
        names: instead of numbers at 0, 1, ... of the horizontal axis.
        is_histogram: whether the vertical axis is of counts, logarithmic, and the horizontal one of
            any numbers, not of whole ones.
    """
    rows = Scale(*y, HEIGHT - _BOTTOM, _TOP, is_histogram)
    ticks = rows.ticks(5)
    texts = [f"{tick:.0%}" if is_share else format_tick(tick) for tick in ticks]
    left = 12 + _LETTER * max(map(len, texts), default=0)
    columns = Scale(*x, left, WIDTH - _RIGHT, is_log)
    parts = [
        f'<path class="grid" d="M{left:.1f} {at:.1f}H{WIDTH - _RIGHT}"/>'
        f'<text x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        for at, text in zip(rows(ticks), texts, strict=True)
    ]
    parts += list(_column_ticks(columns, names, not is_histogram))
    middle = (left + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(label)}</text>'
    )
    parts.append(f'<path class="axis" d="M{left:.1f} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    return ChartFrame(columns, rows, "".join(parts))


def _column_ticks(scale: Scale, names: Sequence[str], is_whole: bool) -> Iterator[str]:
    ticks = list(map(float, range(len(names)))) if names else scale.ticks(5, is_whole)
    texts = list(names) or [(format_power if scale.is_log else format_tick)(t) for t in ticks]
    every = 1
    if len(names) > 1:  # those that have room beside one another
        between = float(scale(1) - scale(0))
        every = math.ceil((_LETTER * max(map(len, names)) + _GAP) / between)
    for at, text in zip(scale(ticks)[::every], texts[::every], strict=True):
        yield (
            f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
            f"{escape(text)}</text>"
        )


def draw_stop(
    hit: str,
    at: float,
    lines: Sequence[str],
    shown: str = "",
    always: str = "",
    kind: str = "",
) -> str:
    """A place of a chart that shows its values when a pointer or a key comes to it.

    Args:
        hit: markup of the area that takes the pointer.
        at: pixel of the place from the left.
        lines: of the box, the first as its head.
        shown: markup that shows with the box.
        always: markup that shows always.
        kind: more classes of its group.
    """
    label = escape(f"{lines[0]}: {', '.join(lines[1:])}")
    return (
        f'<g class="stop{kind}" tabindex="-1" role="img" aria-label="{label}">{hit}{always}'
        f'<g class="tip">{shown}{_draw_box(at, lines)}</g></g>'
    )


def _draw_box(at: float, lines: Sequence[str]) -> str:
    """The box beside a place, on the side where there is more room."""
    if len(lines) > _MAX_TIP_LINES:
        left_out = len(lines) - _MAX_TIP_LINES + 1
        lines = [*lines[: _MAX_TIP_LINES - 1], f"and {left_out} more"]
    lines = [_shorten(text) for text in lines]
    width = 16 + _LETTER * max(map(len, lines))
    left = at + 8 if at < WIDTH / 2 else at - 8 - width
    left = min(max(left, 2), WIDTH - width - 2)
    rows = "".join(
        f'<tspan x="{left + 8:.1f}" y="{_TOP + 15 + _LINE * row}">{escape(text)}</tspan>'
        for row, text in enumerate(lines)
    )
    height = 8 + _LINE * len(lines)
    return (
        f'<rect x="{left:.1f}" y="{_TOP}" width="{width:.1f}" height="{height}" rx="4"/>'
        f"<text>{rows}</text>"
    )


def _shorten(text: str) -> str:
    """A line of a box; of a long one begin and end, where the value is."""
    end = _MAX_TIP_LETTERS // 2
    return text if len(text) <= _MAX_TIP_LETTERS else f"{text[: end - 1]}…{text[-end:]}"


def draw_svg(description: str, content: str, kind: str = "") -> str:
    """The whole chart; the arrow keys go through its places (the page's script)."""
    return Markup(
        f'<svg class="chart{kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" tabindex="0" '
        f'aria-label="{escape(description)}">{content}</svg>'
    )
