"""Charts of a run, from its records alone, and of several runs over each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mhe_dist.tracking.base import HELDOUT
from pipelines.report.charts.chart import Line, LineChart, Values
from pipelines.report.plots import HELDOUT_FIGURES, Arrays, Records, series, smooth

_COLOURS, _DASHES = 5, 3
_LAST_COLOUR: Final = 4  # grey

Curves = Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""Name -> FAR and TAR, both `[n]`."""


def training_charts(records: Records) -> Iterator[LineChart]:
    """Loss, accuracy among the classes seen, doubted labels, learning rate; if recorded."""
    steps, loss = series(records, "loss")
    if len(steps):
        lines = [
            Line("one step", steps, loss, is_faint=True),
            Line("running mean", steps, smooth(loss)),
        ]
        yield LineChart("Training loss", "step", lines)
    yield from _single(records, "accuracy", "Training accuracy, classes seen", 0, is_share=True)
    yield from _doubted(records)
    yield from _single(records, "lr", "Learning rate", _LAST_COLOUR)


def speed_charts(records: Records) -> Iterator[LineChart]:
    """Images per second, and the share of time that a rank waits for data."""
    yield from _single(records, "images_per_s", "Images per second", 2)
    yield from _single(records, "data_wait", "Waiting for data", 1, is_share=True)


def heldout_charts(records: Records, details: Arrays) -> Iterator[LineChart]:
    """Held-out figures of every evaluation, and the ROC of the last."""
    lines = []
    for colour, (key, name) in enumerate(HELDOUT_FIGURES):
        steps, values = series(records, f"{HELDOUT}{key}")
        if len(steps):
            lines.append(Line(name, steps, values, colour, is_marked=True))
    chance = series(records, f"{HELDOUT}chance")[1]
    if lines:
        levels = [("chance of rank-1", float(chance[-1]))] if len(chance) else []
        yield LineChart("Unseen classes", "step", lines, is_share=True, levels=levels)
    if "tar" in details:
        curve = {"TAR": (details["far"], details["tar"])}
        yield roc_chart("ROC, all gallery-probe pairs", curve)


def roc_chart(title: str, curves: Curves) -> LineChart:
    """True over false accept rate, a line for each name."""
    lines = [
        Line(name, far, tar, number % _COLOURS, number // _COLOURS % _DASHES)
        for number, (name, (far, tar)) in enumerate(curves.items())
    ]
    return LineChart(title, "false accept rate", lines, is_share=True, is_log=True)


Positions = Callable[[int, Values], Values]
"""Number of a run and its steps to places on the horizontal axis."""


def compared_chart(
    runs: Sequence[tuple[str, Records]], key: str, title: str, unit: str, positions: Positions
) -> LineChart:
    """One metric of several runs.

    Args:
        runs: (label, records) of each.
        key: of the metric.
        title: of the chart.
        unit: of the horizontal axis.
        positions: where steps are on it.
    """
    is_heldout = key.startswith(HELDOUT)
    lines = []
    for number, (label, records) in enumerate(runs):
        steps, values = series(records, key)
        if not len(steps):
            continue
        if not is_heldout:
            values = smooth(values)
        dash = number // _COLOURS % _DASHES
        x = positions(number, steps)
        lines.append(Line(label, x, values, number % _COLOURS, dash, is_marked=is_heldout))
    return LineChart(title, unit, lines, is_share=is_heldout or key in ("accuracy", "doubted"))


def _doubted(records: Records) -> Iterator[LineChart]:
    """The share of images whose class is doubted (`train.audit_every`)."""
    steps, values = series(records, "doubted")
    if len(steps):
        line = Line("images", steps, values, 1, is_marked=True)
        note = (
            "Another class compared in the step is nearer, without margin: not learned, or wrong."
        )
        yield LineChart("Doubted labels", "step", [line], is_share=True, note=note)


def _single(
    records: Records, key: str, title: str, colour: int, is_share: bool = False
) -> Iterator[LineChart]:
    steps, values = series(records, key)
    if len(steps) and np.isfinite(values).any():
        yield LineChart(title, "step", [Line(title.lower(), steps, values, colour)], is_share)
