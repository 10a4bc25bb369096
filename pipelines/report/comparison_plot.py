"""Plots held-out figures of several variants: a point for each seed, a bar for their mean."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.report.comparison import RECOGNITION, Measure, VariantResult
from pipelines.report.figures import cut_note
from pipelines.report.plots import BLUE, ORANGE, STYLE

_COLOURS = (BLUE, ORANGE)


def draw_comparison(
    results: Sequence[VariantResult],
    columns: Sequence[tuple[str, str]],
    measures: Sequence[Measure] = RECOGNITION,
) -> Figure:
    """Draw a panel for each measure of each group of probes.

    Args:
        results: a line each, from the top; those without a complete run are left out.
        columns: (name of the typeface in the metrics or "", title).
        measures: what is drawn of each.
    """
    shown = [each for each in results if each.outcomes]
    panels = [
        (name, each.metric, f"{title}\n{each.title}", colour)
        for (name, title), colour in zip(columns, _COLOURS, strict=False)
        for each in measures
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.4 + 2.5 * len(panels), 1.3 + 0.36 * len(shown)))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for each, (name, metric, title, colour) in zip(axes, panels, strict=True):
            _draw_panel(each, shown, name, metric, colour)
            each.set_title(title, fontsize=9.5)
        labels = [f"{each.title}  ({each.mean('classes_seen'):,.0f})" for each in shown]
        axes[0].set_yticks(range(len(shown)), labels)
        axes[0].invert_yaxis()
        figure.supxlabel("percent; behind each head the classes that a sample sees", fontsize=9)
    return figure


def _draw_panel(
    axes: Axes, shown: Sequence[VariantResult], typeface: str, metric: str, colour: str
) -> None:
    """Draw one metric of the probes in a typeface."""
    for row, each in enumerate(shown):
        values = [100 * value for value in each.values(metric, typeface)]
        mean = 100 * each.spread(metric, typeface).mean
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        axes.plot([mean], [row], "|", color=colour, markersize=15, markeredgewidth=2.2)
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.set_xlabel(cut_note(axes.get_xlim()[0], 100.0).strip(), fontsize=8)
    axes.grid(axis="y", visible=False)
