"""Saves figures as PNG."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.storage.urls import atomic_write


def save_figure(figure: Figure, url: str) -> None:
    """Write a figure as PNG to a path or URL; the same figure gives the same bytes."""
    with atomic_write(url) as stream:
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
