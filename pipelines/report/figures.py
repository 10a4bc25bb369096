"""Saves figures as PNG."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.storage.urls import atomic_write


def cut_note(lowest: float, unit: float = 1.0) -> str:
    """What the label of an axis of percentages says if the axis does not begin at 0.

    Args:
        lowest: value where the axis begins.
        unit: value that stands for 100 %.
    """
    return f" (axis from {lowest / unit:.0%})" if lowest > 0 else ""


def save_figure(figure: Figure, url: str) -> None:
    """Write a figure as PNG to a path or URL; the same figure gives the same bytes."""
    with atomic_write(url) as stream:
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
