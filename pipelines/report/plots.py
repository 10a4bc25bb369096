"""Plots of a run, from its records alone: curves, ROC, nearest neighbours.

`draw_plots` needs the run's folder or URL (`metrics.jsonl`, `evaluation.npz`) and, for the
neighbours, the held-out shards; so a report can be made again long after the run.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mhe_dist.tracking.base import HELDOUT
from mhe_dist.tracking.jsonl import read_records
from pipelines.evaluate.metrics.roc import FARS
from pipelines.report.charts.numbers import format_share
from pipelines.report.page import read_bytes
from pipelines.report.sheets.contact_sheet import draw_neighbours
from pipelines.report.sheets.pictures import has_index
from pipelines.storage.urls import atomic_write

BLUE, ORANGE, GREEN, RED, GREY = "#2F6DB5", "#E08A1E", "#2E9E6B", "#CC3D3D", "#6B7280"
STYLE: Final[Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": "#374151",
    "axes.edgecolor": "#9CA3AF",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, GREY]),
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#4B5563",
    "ytick.color": "#4B5563",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.dpi": 150,
}
HELDOUT_FIGURES: Final = (
    ("rank1", "rank-1"),
    ("accuracy", "1:1 accuracy"),
    ("tar@far=1e-3", "TAR@FAR=1e-3"),
)
SMOOTH: Final = 0.02  # share of the steps in the running mean of the loss
NOTE_PICTURE: Final = "note.png"
_NOTE_DPI: Final = 72  # two panels in 660 pixels: MLflow shows a note's pictures unscaled

Records = Sequence[dict[str, Any]]
Arrays = dict[str, npt.NDArray[Any]]
Panel = Callable[[Axes], None]


def draw_plots(run: str, heldout_shards: str, image_size: int) -> list[str]:
    """Draw every plot that the records of a run allow into `<run>/plots`.

    Args:
        run: its folder or URL.
        heldout_shards: folder or URL of the held-out shards; empty if there are none.
        image_size: of the held-out images in pixels.

    Returns:
        The PNG files. Nearest neighbours are drawn only if the held-out shards exist.
    """
    records = read_records(f"{run}/metrics.jsonl")
    details = load_details(f"{run}/evaluation.npz")
    plots, written = f"{run}/plots", []
    with mpl.rc_context(STYLE):
        figures = _draw_figures(records, details)
        written += [_save(figure, f"{plots}/{name}.png") for name, figure in figures.items()]
        if noted := figures.get("heldout", figures.get("overview")):
            written.append(_save(noted, f"{plots}/{NOTE_PICTURE}", _NOTE_DPI))
        if "nearest" in details and has_index(heldout_shards):
            figure = draw_neighbours(details, heldout_shards, image_size)
            written.append(_save(figure, f"{plots}/neighbours.png"))
    return written


def _draw_figures(records: Records, details: Arrays) -> dict[str, Figure]:
    """Draw the figures for which there are records."""
    training: list[Panel] = [
        lambda ax: plot_loss(ax, records),
        lambda ax: plot_learning_rate(ax, records),
    ]
    if any("accuracy" in record for record in records):
        training.insert(1, lambda ax: plot_accuracy(ax, records))
    speed: list[Panel] = [
        lambda ax: plot_throughput(ax, records),
        lambda ax: plot_data_wait(ax, records),
    ]
    results: list[Panel] = []
    if any(f"{HELDOUT}rank1" in record for record in records):
        results.append(lambda ax: plot_heldout(ax, records))
    if "tar" in details:
        results.append(lambda ax: plot_roc(ax, details))
    figures = {}
    if any("loss" in record for record in records):
        figures["training"] = _draw_row(training)
        figures["overview"] = _draw_row([training[0], *results])
    if any("images_per_s" in record for record in records):
        figures["throughput"] = _draw_row(speed)
    if results:
        figures["heldout"] = _draw_row(results)
    return figures


def plot_loss(axes: Axes, records: Records) -> None:
    """Plot the loss per step, and its running mean."""
    steps, values = series(records, "loss")
    axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=BLUE)
    axes.set(title="Training loss", xlabel="step", ylabel="cross-entropy")
    finite = values[np.isfinite(values)]
    if len(finite):
        axes.set_ylim(bottom=0, top=1.05 * finite.max() if finite.max() > 0 else None)


def plot_accuracy(axes: Axes, records: Records) -> None:
    """Plot the share of training images whose class scores highest in their softmax."""
    axes.plot(*series(records, "accuracy"), color=BLUE)
    axes.set(title="Training accuracy, classes seen", xlabel="step")
    percent_axis(axes)


def plot_learning_rate(axes: Axes, records: Records) -> None:
    """Plot the learning rate of the backbone per step."""
    axes.plot(*series(records, "lr"), color=GREY)
    axes.set(title="Learning rate", xlabel="step")
    axes.set_ylim(bottom=0)


def plot_heldout(axes: Axes, records: Records) -> None:
    """Plot the held-out figures of every evaluation, beside chance."""
    for key, name in HELDOUT_FIGURES:
        steps, values = series(records, f"{HELDOUT}{key}")
        if len(steps):
            label = f"{name}  {format_share(values[-1])}"
            axes.plot(steps, values, marker="o", markersize=4, label=label, clip_on=False)
    chance = series(records, f"{HELDOUT}chance")[1]
    if len(chance):
        label = f"chance (rank-1)  {format_share(chance[-1])}"
        axes.axhline(chance[-1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=label)
    percent_axis(axes)
    axes.set(title="Unseen classes", xlabel="step")
    axes.set_xlim(left=0)
    # Below: no place among lines that may go anywhere is always free.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8.5)


def plot_roc(axes: Axes, details: Arrays) -> None:
    """Plot the true over the false accept rate of all gallery-probe pairs."""
    axes.plot(details["far"], details["tar"], color=BLUE, clip_on=False)
    first, last = details["far"][0], details["far"][-1] * (1 + 1e-9)
    for target in FARS:
        if first <= target <= last:  # of very many pairs the curve is kept for small rates alone
            tar = float(np.interp(target, details["far"], details["tar"]))
            axes.plot(target, tar, marker="o", markersize=4, color=BLUE)
            text = f"{format_share(tar)} at {target:.0e}".replace("e-0", "e-")
            axes.annotate(
                *(text, (target, tar), (-6, 3)),  # above the curve, where nothing is
                textcoords="offset points",
                horizontalalignment="right",
                fontsize=8.5,
            )
    axes.set_xscale("log")
    axes.set(title="ROC, all gallery-probe pairs", xlabel="false accept rate")
    axes.set_ylabel("true accept rate")
    percent_axis(axes)


def plot_throughput(axes: Axes, records: Records) -> None:
    """Plot images per second over all ranks."""
    axes.plot(*series(records, "images_per_s"), color=GREEN)
    axes.set(title="Throughput", xlabel="step", ylabel="images/s")
    axes.set_ylim(bottom=0)


def plot_data_wait(axes: Axes, records: Records) -> None:
    """Plot the share of time that a rank waits for data."""
    axes.plot(*series(records, "data_wait"), color=ORANGE)
    axes.set(title="Waiting for data", xlabel="step")
    percent_axis(axes)


def series(
    records: Iterable[dict[str, Any]], key: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Steps and values of one metric, from the records that have it."""
    found = [(record["step"], record[key]) for record in records if key in record]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def running_mean(values: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Mean of the `width` values around each one; of fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def smooth(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Their running mean over a share `SMOOTH` of them."""
    return running_mean(values, max(1, round(SMOOTH * len(values))))


def percent_axis(axes: Axes) -> None:
    """Let the vertical axis go from 0 to 100 %."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_row(panels: Sequence[Panel]) -> Figure:
    figure = Figure(figsize=(4.6 * len(panels), 3.5))
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        panel(axes)
    return figure


def _save(figure: Figure, url: str, dpi: float | None = None) -> str:
    with atomic_write(url) as stream:
        canvas = FigureCanvasAgg(figure)
        canvas.print_figure(stream, dpi=dpi, format="png", metadata={"Software": None})
    return url


def load_details(url: str) -> Arrays:
    """What an evaluation kept for pictures, from a path or URL; empty if there is no such file."""
    content = read_bytes(url)
    if content is None:
        return {}
    with np.load(io.BytesIO(content)) as stored:
        return dict(stored)
