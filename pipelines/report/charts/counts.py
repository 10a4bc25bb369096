"""Draws bars of counts, histograms of a number, and groups of points on a map."""

from __future__ import annotations

import numpy as np

from mhe_dist.errors import counted
from pipelines.report.charts.chart import BarChart, DrawnChart, Histogram, PointMap
from pipelines.report.charts.frame import (
    HEIGHT,
    WIDTH,
    ChartFrame,
    Scale,
    draw_stop,
    draw_svg,
    make_frame,
)

_SHAPES = 3
_COLOURS = 5
_EDGE = 12  # pixels around a map


def draw_bars(chart: BarChart) -> DrawnChart:
    """Draw bars of counts."""
    last = len(chart.names) - 1
    highest = 1.05 * max(1, int(chart.counts.max()))
    frame = make_frame((-0.5, last + 0.5), (0.0, highest), chart.x, names=chart.names)
    width = float(frame.x(1) - frame.x(0))
    parts = [frame.markup]
    for number, (name, count) in enumerate(zip(chart.names, chart.counts.tolist(), strict=True)):
        left = float(frame.x(number - 0.5))
        hit, bar = frame.hit_area(left, width), frame.bar(left + 0.1 * width, 0.8 * width, count, 0)
        lines = [f"{chart.x} {name}", f"{count:,} {chart.unit}"]
        parts.append(draw_stop(hit, left + width / 2, lines, always=bar))
    said = ", ".join(
        f"{name}: {count:,}" for name, count in zip(chart.names, chart.counts.tolist(), strict=True)
    )
    description = f"{chart.title}, {chart.unit} by {chart.x}: {said}"
    return DrawnChart(chart.title, draw_svg(description, "".join(parts)), [], chart.note)


def draw_histogram(chart: Histogram) -> DrawnChart:
    """Draw counts of a number, and the threshold that is set on it."""
    edges, limit = np.asarray(chart.edges, np.float64), chart.threshold
    ends = [float(edges[0]), float(edges[-1]), *([] if limit is None else [limit])]
    highest = 3.5 * max(2, int(chart.counts.max(initial=0)))  # with room for the threshold's name
    frame = make_frame((min(ends), max(ends)), (0.6, highest), chart.x, is_histogram=True)
    parts = [frame.markup]
    for left, right, count in zip(edges[:-1], edges[1:], chart.counts.tolist(), strict=True):
        if not count:
            continue
        start, stop = float(frame.x(left)), float(frame.x(right))
        colour = int(limit is not None and left >= limit)
        bar = frame.bar(start, max(0.8, stop - start - 0.6), count, colour)
        lines = [f"{left:.4g} to {right:.4g}", f"{count:,} {chart.unit}"]
        hit = frame.hit_area(start, stop - start)
        parts.append(draw_stop(hit, (start + stop) / 2, lines, always=bar))
    if limit is not None:
        parts.append(_draw_threshold(frame, limit))
    total = int(chart.counts.sum())
    said = f"{chart.title}: {total:,} {chart.unit} by {chart.x}"
    said += "" if limit is None else f", threshold {limit:.4g}"
    return DrawnChart(chart.title, draw_svg(said, "".join(parts)), [], chart.note)


def _draw_threshold(frame: ChartFrame, limit: float) -> str:
    """A dashed line over the number, and what it is, on the side where there is more room."""
    at = float(frame.x(limit))
    side, shift = ("end", -5) if at > WIDTH / 2 else ("start", 5)
    return (
        f'<path class="threshold" d="M{at:.1f} {frame.y.start}V{frame.y.stop}"/>'
        f'<text class="over" x="{at + shift:.1f}" y="{frame.y.stop + 10}" text-anchor="{side}">'
        f"threshold {limit:.3g}</text>"
    )


def draw_points(chart: PointMap) -> DrawnChart:
    """Draw groups of points; a group that is pointed at says its name, and the others fade."""
    every = np.concatenate([points for _, points in chart.groups])
    low, high = every.min(axis=0), every.max(axis=0)
    columns = Scale(low[0], high[0], _EDGE, WIDTH - _EDGE)
    rows = Scale(low[1], high[1], HEIGHT - _EDGE, _EDGE)
    parts = [
        f'<rect class="axis ground" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="6"/>'
    ]
    for number, (name, points) in enumerate(chart.groups):
        shape = number // _COLOURS % _SHAPES
        at = zip(columns(points[:, 0]).tolist(), rows(points[:, 1]).tolist(), strict=True)
        marks = "".join(_mark(x, y, shape) for x, y in at)
        lines = [name, counted(len(points), "image")]
        middle = float(columns(points[:, 0]).mean())
        parts.append(draw_stop(marks, middle, lines, kind=f" group c{number % _COLOURS}"))
    names = ", ".join(name for name, _ in chart.groups)
    description = f"{chart.title}: {len(every):,} images of {len(chart.groups)} classes: {names}"
    return DrawnChart(chart.title, draw_svg(description, "".join(parts), " map"), [], chart.note)


def _mark(x: float, y: float, shape: int) -> str:
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    if shape == 1:
        return f'<rect class="mark" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    return f'<path d="M{x:.1f} {y - 4:.1f}l4 7h-8z"/>'
