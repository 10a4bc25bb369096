"""A contact sheet of a data set: a row per class, drawn at random, with some of its images."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from mhe_dist.errors import RunError, UserError
from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.data.mixture.class_list import names_of
from pipelines.data.sequential import read_in_order
from pipelines.report.sheets.contact_sheet import (
    PLAIN,
    SIDE,
    WRONG,
    Pixels,
    blank_tile,
    frame_image,
)
from pipelines.shards.index import ShardIndex

Ints = npt.NDArray[np.int64]

_GAP: Final = 8  # pixels between tiles
_NAME_LENGTH: Final = 28  # characters of a class's name that are shown
_DPI: Final = 150


def draw_sample_sheet(index: ShardIndex, rows: int = 8, columns: int = 8, seed: int = 0) -> Figure:
    """Draw a sheet of random classes and images; the same seed gives the same sheet.

    Args:
        index: the data set.
        rows: classes.
        columns: images of a class, at most.
        seed: of the random choice.

    Raises:
        UserError: there is no sample.
    """
    if not index.samples:
        raise UserError(f"{index.folder}: there is no sample to show")
    labels = _all_labels(index)
    if labels is None:  # an index of an earlier release: any images
        chosen = _choose(index.samples, rows * columns, seed, 0)
        parts = [chosen[n : n + columns] for n in range(0, len(chosen), columns)]
        return _draw_figure(
            index, np.concatenate([_row(index, part, columns) for part in parts]), []
        )
    present = np.unique(labels)
    classes = present[_choose(len(present), rows, seed, 0)].tolist()
    lines = []
    for label in classes:
        mine = np.flatnonzero(labels == label)
        lines.append(_row(index, mine[_choose(len(mine), columns, seed, label + 1)], columns))
    return _draw_figure(index, np.concatenate(lines), classes)


def _all_labels(index: ShardIndex) -> Ints | None:
    """The label of every sample, or None if the index does not hold all labels."""
    labels = [shard.labels for shard in index.shards]
    known = [part for part in labels if part is not None]
    return np.concatenate(known) if len(known) == len(labels) else None


def _choose(population: int, count: int, seed: int, label: int) -> Ints:
    rng = generator(seed, "sample_sheet", label)
    return sample_without_replacement(population, min(count, population), rng)


def _row(index: ShardIndex, numbers: Ints, columns: int) -> Pixels:
    """Images side by side: uint8 `[height, width, 3]`; an unreadable image is a red frame."""
    tiles = [_read_tile(index, int(number)) for number in numbers]
    tiles += [blank_tile(tiles[0].shape[1])] * (columns - len(tiles))
    row = np.concatenate([part for each in tiles for part in (each, blank_tile(_GAP))][:-1], axis=1)
    return np.pad(row, ((0, _GAP), (0, 0), (0, 0)), constant_values=255)


def _read_tile(index: ShardIndex, number: int) -> Pixels:
    try:
        images, *_ = read_in_order(index, number, number + 1, SIDE)
    except RunError:
        return frame_image(np.full((SIDE, SIDE, 3), 255, np.uint8), WRONG)
    return frame_image(images[0].permute(1, 2, 0).numpy(), PLAIN)


def _draw_figure(index: ShardIndex, picture: Pixels, classes: list[int]) -> Figure:
    height, width, _ = picture.shape
    left, top = 330, 70  # pixels beside and above the picture
    size = ((width + left) / _DPI, (height + top) / _DPI)
    figure = Figure(figsize=size, dpi=_DPI)
    box = (left / (width + left), 0, width / (width + left), height / (height + top))
    axes = figure.add_axes(box)
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    counts = f"{index.samples:,} images of {index.num_classes:,} classes"
    title = f"{index.folder.rstrip('/').rpartition('/')[2]}: {counts}"
    style: dict[str, Any] = {"parse_math": False, "va": "center"}
    figure.text(0.01, 1 - top / 2 / (height + top), title, fontweight="bold", **style)
    names = class_names(index, classes)
    for row, (label, name) in enumerate(zip(classes, names, strict=True)):
        text = f"{label}\n{name}" if name else str(label)
        middle = (row + 0.5) * height / len(classes)
        axes.text(-12, middle, text, ha="right", fontsize=8, **style)
    return figure


def class_names(index: ShardIndex, classes: list[int]) -> list[str]:
    """Names of classes in their source, shortened; empty if the data set does not hold them."""
    names = dict.fromkeys(classes, "")
    if index.meta.get("class_names"):
        names |= names_of(index.folder, classes)
    return [_printable(name) for name in names.values()]


def _printable(name: str) -> str:
    """The name in characters that the font of the plot has."""
    name = name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}~"
    return name.encode("latin-1", "backslashreplace").decode("latin-1")
