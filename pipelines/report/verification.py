"""Writes the report of a data set's verification as JSON and as a plot."""

from __future__ import annotations

import json
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.data.verify import DatasetReport, Ints
from pipelines.report.figures import save_figure
from pipelines.report.plots import BLUE, ORANGE, STYLE
from pipelines.storage.urls import atomic_write

_LOG_ABOVE: Final = 60  # images per class from which on the axes are logarithmic


def verification_summary(report: DatasetReport) -> dict[str, Any]:
    """The parts of a report that JSON can hold, the numbers first."""
    index, present = report.data, report.per_class[report.per_class > 0]
    spread: dict[str, Any] = {"classes_without_images": int((report.per_class == 0).sum())}
    if len(present):
        spread |= {
            "classes_with_one_image": int((present == 1).sum()),
            "fewest": int(present.min()),
            "median": float(np.median(present)),
            "mean": float(present.mean()),
            "most": int(present.max()),
        }
    return {
        "data": index.folder,
        "good": report.is_good,
        "samples": index.samples,
        "usable": int(report.per_class.sum()),
        "classes": index.num_classes,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "problems": report.counts,
        "repeated_in_their_class": report.repeated,
        "images_per_class": spread,
        "named": [problem._asdict() for problem in report.problems],
    }


def write_verification(report: DatasetReport, url: str) -> None:
    """Write `url.json`, and `url.png` if there is a usable image."""
    text = json.dumps(verification_summary(report), indent=1, ensure_ascii=False)
    with atomic_write(f"{url}.json") as stream:
        stream.write(text.encode(errors="backslashreplace"))
    if report.per_class.any():
        draw_class_sizes(report.per_class, f"{url}.png")


def draw_class_sizes(per_class: Ints, url: str) -> None:
    """Write plots of the number of images per class as PNG.

    Args:
        per_class: number of usable images of each class `[C]`, at least one in all.
        url: of the file.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.5))
        left, right = figure.subplots(1, 2)
        plot_histogram(left, per_class)
        plot_concentration(right, per_class)
        save_figure(figure, url)


def plot_histogram(axes: Axes, per_class: Ints) -> None:
    """Plot how many classes have how many images."""
    largest = int(per_class.max())
    is_wide = largest > _LOG_ABOVE
    if is_wide:
        edges = np.unique(np.geomspace(1, largest + 1, 40).round()).tolist()
        axes.set_xscale("log")
        empty = int((per_class == 0).sum())
        if empty:
            text = f"{empty:,} classes without an image"
            axes.annotate(text, (0.02, 0.93), xycoords="axes fraction")
    else:
        edges = (np.arange(largest + 2) - 0.5).tolist()
    axes.hist(per_class, edges, color=BLUE, rwidth=1.0 if is_wide else 0.9)
    axes.set(title="Classes by their images", xlabel="images in a class", ylabel="classes")
    axes.set_ylim(bottom=0)


def plot_concentration(axes: Axes, per_class: Ints) -> None:
    """Plot the share of all images that the largest classes hold."""
    share = np.cumsum(np.sort(per_class)[::-1]) / per_class.sum()
    part = np.arange(1, len(share) + 1) / len(share)
    axes.plot([0, *part], [0, *share], color=BLUE, label="this data set")
    axes.plot([0, 1], [0, 1], color=ORANGE, linewidth=1, linestyle=(0, (4, 3)), label="all equal")
    axes.set(title="Images in the largest classes", xlabel="share of the classes")
    axes.set_ylabel("share of the images")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower right")
