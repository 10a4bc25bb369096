"""Draws lines over an axis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from pipelines.report.charts.chart import (
    DrawnChart,
    Line,
    LineChart,
    Values,
    thin_envelope,
    thin_evenly,
)
from pipelines.report.charts.frame import ChartFrame, draw_stop, draw_svg, make_frame
from pipelines.report.charts.numbers import format_power, format_share

_STOPS: Final = 48  # places of a chart that show their values
_POINTS: Final = 300  # of a line
_BUCKETS: Final = 150  # of a faint line, two points each
_NEAR: Final = 4.0  # pixels between a place and a point whose value it shows


def draw_lines(chart: LineChart) -> DrawnChart:
    """Draw lines; a chart of millions of points is as small as one of hundreds."""
    frame = _frame(chart)
    parts = [frame.markup, *_levels(chart, frame)]
    faint_first = sorted(chart.lines, key=lambda line: not line.is_faint)
    parts += [_draw_line(line, frame) for line in faint_first]
    parts += _stops(chart, frame)
    legend = [(_last_value(line, chart), _kind(line)) for line in chart.lines]
    legend = legend if len(chart.lines) + len(chart.levels) > 1 else []
    legend += [(f"{name} {_number(value, chart)}", "c4 d1") for name, value in chart.levels]
    return DrawnChart(chart.title, draw_svg(_describe(chart), "".join(parts)), legend, chart.note)


def _frame(chart: LineChart) -> ChartFrame:
    x = np.concatenate([line.x for line in chart.lines]).astype(np.float64)
    y = np.concatenate([line.y for line in chart.lines]).astype(np.float64)
    y = y[np.isfinite(y)]
    low = float(x.min()) if chart.is_log else 0.0
    high = 1.0 if chart.is_share else 1.05 * float(y.max()) if len(y) and y.max() > 0 else 1.0
    least = 0.0 if chart.is_share or not len(y) else min(0.0, 1.05 * float(y.min()))
    return make_frame((low, float(x.max())), (least, high), chart.x, chart.is_share, chart.is_log)


def _levels(chart: LineChart, frame: ChartFrame) -> Iterator[str]:
    for _, value in chart.levels:
        yield (
            f'<path class="line level c4 d1" d="M{frame.x.start:.1f} {frame.y(value):.1f}'
            f'H{frame.x.stop:.1f}"/>'
        )


def _draw_line(line: Line, frame: ChartFrame) -> str:
    x, y = line.x, line.y
    if line.is_faint:
        x, y = thin_envelope(x, y, _BUCKETS)
    else:
        numbers = thin_evenly(len(x), _POINTS)
        x, y = x[numbers], y[numbers]
    columns, rows = frame.x(x), frame.y(y)
    path, pen = [], "M"
    for column, row in zip(columns.tolist(), rows.tolist(), strict=True):
        path.append(f"{pen}{column:.1f} {row:.1f}" if np.isfinite(row) else "")
        pen = "L" if np.isfinite(row) else "M"
    dots = _dots(columns, rows, line.colour) if line.is_marked or len(x) == 1 else ""
    return f'<path class="line {_kind(line)}" d="{"".join(path)}"/>{dots}'


def _kind(line: Line) -> str:
    """Classes of a line's colour and dash, which the page defines."""
    return f"c{line.colour} d{line.dash}{' faint' if line.is_faint else ''}"


def _dots(columns: Values, rows: Values, colour: int) -> str:
    return "".join(
        f'<circle class="dot c{colour}" cx="{column:.1f}" cy="{row:.1f}" r="3"/>'
        for column, row in zip(columns.tolist(), rows.tolist(), strict=True)
        if np.isfinite(row)
    )


def _stops(chart: LineChart, frame: ChartFrame) -> Iterator[str]:
    """Places side by side, each as wide as half the way to its neighbours."""
    every = np.unique(np.concatenate([line.x for line in chart.lines if len(line.x)]))
    places = every[thin_evenly(len(every), _STOPS)]
    pixels = frame.x(places)
    middles = (pixels[1:] + pixels[:-1]) / 2
    edges = [frame.x.start, *middles.tolist(), frame.x.stop]
    for number, (value_x, at) in enumerate(zip(places.tolist(), pixels.tolist(), strict=True)):
        head = f"{chart.x} {format_power(value_x) if chart.is_log else f'{value_x:,.0f}'}"
        lines, dots = [head], ""
        for line in chart.lines:
            if (found := _nearest(line, value_x, at, frame)) is not None:
                column, value = found
                lines.append(f"{line.name} {_number(value, chart)}")
                dots += _dots(np.array([column]), np.array([frame.y(value)]), line.colour)
        left, right = edges[number], edges[number + 1]
        ruler = f'<path class="ruler" d="M{at:.1f} {frame.y.stop}V{frame.y.start}"/>'
        yield draw_stop(frame.hit_area(left, right - left), at, lines, ruler + dots)


def _nearest(
    line: Line, value_x: float, at: float, frame: ChartFrame
) -> tuple[float, float] | None:
    """Pixel from the left and value of the line's point at a place; None if it has none there."""
    if not len(line.x):
        return None
    number = int(np.abs(line.x - value_x).argmin())
    column, value = float(frame.x(line.x[number])), float(line.y[number])
    return (column, value) if abs(column - at) <= _NEAR and np.isfinite(value) else None


def _number(value: float, chart: LineChart) -> str:
    if chart.is_share:
        return format_share(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _last_value(line: Line, chart: LineChart) -> str:
    """A line's name and its last value, if that says something."""
    finite = line.y[np.isfinite(line.y)]
    if line.is_faint or chart.is_log or not len(finite):
        return line.name
    return f"{line.name} {_number(float(finite[-1]), chart)}"


def _describe(chart: LineChart) -> str:
    """The chart in words."""
    parts = []
    for line in chart.lines:
        finite = line.y[np.isfinite(line.y)]
        if len(finite) and not line.is_faint:
            ends = [_number(float(finite[number]), chart) for number in (0, -1)]
            bounds = [_number(float(value), chart) for value in (finite.min(), finite.max())]
            parts.append(
                f"{line.name} from {ends[0]} to {ends[1]}, lowest {bounds[0]}, highest {bounds[1]}"
            )
    parts += [f"{name} {_number(value, chart)}" for name, value in chart.levels]
    return f"{chart.title} over {chart.x}: {'; '.join(parts)}"
