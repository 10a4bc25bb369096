"""A contact sheet of a data set: a row per class, drawn at random, with some of its images."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from mhe_dist.errors import RunError, UserError
from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.data.sequential import read_in_order
from pipelines.report.contact_sheet import PLAIN, SIDE, WRONG, Pixels, blank, framed
from pipelines.shards.index import ShardIndex
from pipelines.shards.tables import CLASSES_FILE
from pipelines.storage.urls import resolve_url

Ints = npt.NDArray[np.int64]

_GAP: Final = 8  # pixels between tiles
_NAME: Final = 28  # characters of a class's name that are shown
_DPI: Final = 150


def sheet(index: ShardIndex, rows: int = 8, columns: int = 8, seed: int = 0) -> Figure:
    """Draw classes and images at random, always the same ones for the same seed.

    Args:
        index: the data set.
        rows: classes.
        columns: images of a class, at most.
        seed: of the draw.

    Raises:
        UserError: there is no sample.
    """
    if not index.samples:
        raise UserError(f"{index.folder}: there is no sample to show")
    labels = _labels(index)
    if labels is None:  # an index of an earlier release: any images
        chosen = _draw(index.samples, rows * columns, seed, 0)
        parts = [chosen[n : n + columns] for n in range(0, len(chosen), columns)]
        return _figure(index, np.concatenate([_row(index, part, columns) for part in parts]), [])
    present = np.unique(labels)
    classes = present[_draw(len(present), rows, seed, 0)].tolist()
    lines = []
    for label in classes:
        mine = np.flatnonzero(labels == label)
        lines.append(_row(index, mine[_draw(len(mine), columns, seed, label + 1)], columns))
    return _figure(index, np.concatenate(lines), classes)


def _labels(index: ShardIndex) -> Ints | None:
    """The label of every sample, if the index holds them all."""
    labels = [shard.labels for shard in index.shards]
    known = [part for part in labels if part is not None]
    return np.concatenate(known) if len(known) == len(labels) else None


def _draw(population: int, count: int, seed: int, label: int) -> Ints:
    rng = generator(seed, "sample_sheet", label)
    return sample_without_replacement(population, min(count, population), rng)


def _row(index: ShardIndex, numbers: Ints, columns: int) -> Pixels:
    """Images side by side: uint8 `[height, width, 3]`; one that cannot be read is a red frame."""
    tiles = [_image(index, int(number)) for number in numbers]
    tiles += [blank(tiles[0].shape[1])] * (columns - len(tiles))
    row = np.concatenate([part for each in tiles for part in (each, blank(_GAP))][:-1], axis=1)
    return np.pad(row, ((0, _GAP), (0, 0), (0, 0)), constant_values=255)


def _image(index: ShardIndex, number: int) -> Pixels:
    try:
        images, *_ = read_in_order(index, number, number + 1, SIDE)
    except RunError:
        return framed(np.full((SIDE, SIDE, 3), 255, np.uint8), WRONG)
    return framed(images[0].permute(1, 2, 0).numpy(), PLAIN)


def _figure(index: ShardIndex, picture: Pixels, classes: list[int]) -> Figure:
    height, width, _ = picture.shape
    left, top = 330, 70  # pixels beside and above the picture
    size = ((width + left) / _DPI, (height + top) / _DPI)
    figure = Figure(figsize=size, dpi=_DPI)
    box = (left / (width + left), 0, width / (width + left), height / (height + top))
    axes = figure.add_axes(box)
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    counts = f"{index.samples:,} images of {index.num_classes:,} classes"
    place = f"{index.folder.rstrip('/').rpartition('/')[2]}: {counts}"
    style: dict[str, Any] = {"parse_math": False, "va": "center"}
    figure.text(0.01, 1 - top / 2 / (height + top), place, fontweight="bold", **style)
    names = class_names(index, classes)
    for row, (label, name) in enumerate(zip(classes, names, strict=True)):
        text = f"{label}\n{name}" if name else str(label)
        middle = (row + 0.5) * height / len(classes)
        axes.text(-12, middle, text, ha="right", fontsize=8, **style)
    return figure


def class_names(index: ShardIndex, classes: list[int]) -> list[str]:
    """What the source called these classes, shortened; empty where the data set does not say."""
    names = dict.fromkeys(classes, "")
    if names and index.meta.get("class_names"):
        wanted, last = set(names), max(names)
        filesystem, path = resolve_url(f"{index.folder}/{CLASSES_FILE}")
        if filesystem.exists(path):
            with filesystem.open(path, "rb") as stream:
                for number, line in enumerate(stream, -1):
                    if number in wanted:
                        names[number] = line.decode(errors="replace").rstrip("\n").split("\t")[-1]
                    if number >= last:
                        break
    return [_shown(name) for name in names.values()]


def _shown(name: str) -> str:
    """The name in letters that the font of the picture has."""
    name = name if len(name) <= _NAME else f"{name[: _NAME - 1]}~"
    return name.encode("latin-1", "backslashreplace").decode("latin-1")
