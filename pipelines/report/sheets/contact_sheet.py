"""A contact sheet of nearest neighbours: probes, and the nearest gallery entries of each.

The frame of an entry is green if it is of the probe's class, red if it scores above that one, and
grey otherwise.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.data.sequential import read_in_order
from pipelines.report.charts.numbers import format_share
from pipelines.shards.index import ShardIndex

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

RIGHT, WRONG, PLAIN = (46, 158, 107), (204, 61, 61), (209, 213, 219)
_ROWS: Final = 8
SIDE: Final = 96  # pixels of a tile in the picture
_FRAME, _GAP, _MARGIN = 5, 9, 26  # pixels: around a tile, between tiles, behind the probe


def draw_neighbours(details: dict[str, Any], shards: str, image_size: int) -> Figure:
    """Draw probes with their nearest gallery entries.

    On the left are probes drawn at random, on the right probes whose nearest entry is wrong.

    Args:
        details: of the evaluation (`heldout.Evaluation.details`).
        shards: the held-out set.
        image_size: side of its images in pixels.
    """
    index = ShardIndex.load(shards)
    right = details["right"]
    everyone, missed = np.arange(len(right)), np.flatnonzero(~right[:, 0])
    groups = [("Drawn at random", _draw_numbers(everyone, "random"))]
    if len(missed):
        groups.append(("Mistakes", _draw_numbers(missed, "mistakes")))
    figure = Figure(figsize=(5.4 * len(groups), 0.85 * _ROWS + 0.9))
    for axes, (title, chosen) in zip(
        np.atleast_1d(figure.subplots(1, len(groups))), groups, strict=True
    ):
        rows = [_probe_row(index, details, int(number), image_size) for number in chosen]
        _show_rows(axes, np.concatenate(rows), title)
    rank1 = f"rank-1 {format_share(right[:, 0].mean())} of {len(right)} probes"
    title = f"Nearest neighbours of unseen classes: {rank1}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _draw_numbers(numbers: Ints, purpose: str) -> Ints:
    """Draw up to eight numbers, always the same ones."""
    count = min(_ROWS, len(numbers))
    rng = generator(0, f"contact_sheet/{purpose}")
    return numbers[sample_without_replacement(len(numbers), count, rng)]


def _probe_row(index: ShardIndex, details: dict[str, Any], probe: int, image_size: int) -> Pixels:
    """One probe and its neighbours, side by side: uint8 `[height, width, 3]`."""
    probe_image = _read_image(index, details["probes"][probe], image_size)
    tiles = [frame_image(probe_image, PLAIN), blank_tile(_MARGIN)]
    colour = WRONG
    for number, right in zip(details["nearest"][probe], details["right"][probe], strict=True):
        colour = RIGHT if right else PLAIN if colour != WRONG else WRONG
        tiles += [frame_image(_read_image(index, number, image_size), colour), blank_tile(_GAP)]
    row = np.concatenate(tiles[:-1], axis=1)
    return np.pad(row, ((0, _GAP), (0, 0), (0, 0)), constant_values=255)


def _read_image(index: ShardIndex, number: int, image_size: int) -> Pixels:
    images, *_ = read_in_order(index, int(number), int(number) + 1, image_size)
    return images[0].permute(1, 2, 0).numpy()


def frame_image(image: Pixels, colour: tuple[int, int, int]) -> Pixels:
    """The image in a frame, resized to the size of a tile by its nearest pixels."""
    source = (np.arange(SIDE) * image.shape[0]) // SIDE
    tile = np.empty((SIDE + 2 * _FRAME, SIDE + 2 * _FRAME, 3), np.uint8)
    tile[:] = colour
    tile[_FRAME:-_FRAME, _FRAME:-_FRAME] = image[source][:, source]
    return tile


def blank_tile(width: int) -> Pixels:
    """White space of that width, as high as a tile."""
    return np.full((SIDE + 2 * _FRAME, width, 3), 255, np.uint8)


def _show_rows(axes: Axes, picture: Pixels, title: str) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.set_axis_off()
    axes.set_title(title)
    tile = SIDE + 2 * _FRAME
    style: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 9, "color": "#4B5563"}
    axes.text(tile / 2, picture.shape[0] + 6, "probe", **style)
    middle = tile + _MARGIN + (picture.shape[1] - tile - _MARGIN) / 2
    axes.text(middle, picture.shape[0] + 6, "gallery, nearest first", **style)
