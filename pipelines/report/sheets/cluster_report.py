"""What a clustering looks like: figures, a histogram of sizes, sheets of some of its classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from pipelines.report.figures import save_figure
from pipelines.report.sheets.pictures import INK, SIDE, Pictures, letters
from pipelines.shards.index import ShardIndex
from pipelines.storage.urls import atomic_write

_MARGIN: Final = 6  # pixels around a picture
_WIDTH: Final = 150  # of the lines beside a row, in pixels
_BINS: Final = 40


class Shown(Protocol):
    """A class to look at, as `pipelines.clustering` chooses it."""

    @property
    def number(self) -> int:
        """Its class id."""

    @property
    def images(self) -> npt.NDArray[np.int64]:
        """Some of its images, the most similar one to its centre first."""

    @property
    def size(self) -> int:
        """Images that it is the nearest class of."""

    @property
    def similarity(self) -> float:
        """Their mean cosine to its centre."""


def write_cluster_report(
    folder: str,
    index: ShardIndex,
    figures: Mapping[str, Any],
    counts: npt.NDArray[np.int64],
    shown: Mapping[str, Sequence[Shown]],
) -> list[str]:
    """Write `figures.json`, `sizes.png` and a contact sheet for each group of classes.

    Args:
        folder: path or URL; what is there is replaced.
        index: the data set.
        figures: JSON-able.
        counts: int64 `[C]`, images that each class is the nearest of.
        shown: classes to look at, by what they were chosen for, which names the file.

    Returns:
        The files.
    """
    with atomic_write(f"{folder}/figures.json") as stream:
        stream.write(json.dumps(figures, indent=1).encode() + b"\n")
    save_figure(_draw_sizes(counts), f"{folder}/sizes.png")
    pictures = Pictures(index.folder, ())
    for name, classes in shown.items():
        with atomic_write(f"{folder}/{name}.png") as stream:
            _sheet(pictures, classes).save(stream, "PNG")
    names = ["figures.json", "sizes.png", *(f"{name}.png" for name in shown)]
    return [f"{folder}/{name}" for name in names]


def _draw_sizes(counts: npt.NDArray[np.int64]) -> Figure:
    """Histogram of the classes by their images."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    largest = int(counts.max(initial=1))
    bins = np.linspace(0.5, largest + 0.5, min(_BINS, largest) + 1).tolist()
    axes.hist(counts, bins=bins)
    axes.axvline(float(counts.mean()) if len(counts) else 0.0, color="black", linewidth=1)
    axes.set_xlabel("images that the class is the nearest of (line: the average)")
    axes.set_ylabel("classes")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _sheet(pictures: Pictures, classes: Sequence[Shown]) -> Image.Image:
    """A row for each class: what it is, and its images from the most similar to the least."""
    columns = max((len(each.images) for each in classes), default=1)
    step = SIDE + _MARGIN
    size = (_WIDTH + columns * step + _MARGIN, len(classes) * step + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), letters()
    for row, each in enumerate(classes):
        top = row * step + _MARGIN
        lines = (f"class {each.number}", f"{each.size:,} images", f"cosine {each.similarity:.3f}")
        for line, text in enumerate(lines):
            pen.text((_MARGIN, top + 15 * line), text, font=font, fill=INK)
        for column, number in enumerate(each.images.tolist()):
            sheet.paste(Image.fromarray(pictures.read(number)), (_WIDTH + column * step, top))
    return sheet
