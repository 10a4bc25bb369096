"""A picture of nearest neighbours: probes, and what the gallery offers for each.

The right class is framed green, and red what scores above it; the rest is as it should be.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.data.sequential import read_in_order
from pipelines.shards.index import ShardIndex

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

RIGHT, WRONG, PLAIN = (46, 158, 107), (204, 61, 61), (209, 213, 219)
_ROWS: Final = 8
SIDE: Final = 96  # pixels of a tile in the picture
_FRAME, _GAP, _MARGIN = 5, 9, 26  # pixels: around a tile, between tiles, behind the probe


def neighbours(details: dict[str, Any], shards: str, image_size: int) -> Figure:
    """Probes with their best gallery entries.

    On the left probes drawn at random, on the right probes whose best entry is wrong.

    Args:
        details: of the evaluation (`heldout.Evaluation`).
        shards: the held-out set.
        image_size: side of its images in pixels.
    """
    index = ShardIndex.load(shards)
    right = details["right"]
    anyone, missed = np.arange(len(right)), np.flatnonzero(~right[:, 0])
    groups = [("Drawn at random", _draw(anyone, "random"))]
    if len(missed):
        groups.append(("Mistakes", _draw(missed, "mistakes")))
    figure = Figure(figsize=(5.4 * len(groups), 0.85 * _ROWS + 0.9))
    for axes, (title, chosen) in zip(
        np.atleast_1d(figure.subplots(1, len(groups))), groups, strict=True
    ):
        rows = [_row(index, details, int(number), image_size) for number in chosen]
        _show(axes, np.concatenate(rows), title)
    rank1 = f"rank-1 {right[:, 0].mean():.1%} of {len(right)} probes"
    title = f"Nearest neighbours of unseen classes: {rank1}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _draw(numbers: Ints, purpose: str) -> Ints:
    """Up to eight of them, always the same ones."""
    count = min(_ROWS, len(numbers))
    rng = generator(0, f"contact_sheet/{purpose}")
    return numbers[sample_without_replacement(len(numbers), count, rng)]


def _row(index: ShardIndex, details: dict[str, Any], probe: int, image_size: int) -> Pixels:
    """One probe and its neighbours, side by side: uint8 `[height, width, 3]`."""
    tiles = [framed(_image(index, details["probes"][probe], image_size), PLAIN), blank(_MARGIN)]
    colour = WRONG
    for number, right in zip(details["nearest"][probe], details["right"][probe], strict=True):
        colour = RIGHT if right else PLAIN if colour != WRONG else WRONG
        tiles += [framed(_image(index, number, image_size), colour), blank(_GAP)]
    row = np.concatenate(tiles[:-1], axis=1)
    return np.pad(row, ((0, _GAP), (0, 0), (0, 0)), constant_values=255)


def _image(index: ShardIndex, number: int, image_size: int) -> Pixels:
    images, *_ = read_in_order(index, int(number), int(number) + 1, image_size)
    return images[0].permute(1, 2, 0).numpy()


def framed(image: Pixels, colour: tuple[int, int, int]) -> Pixels:
    """The image, enlarged or reduced to the tile's size by its nearest pixels, in a frame."""
    place = (np.arange(SIDE) * image.shape[0]) // SIDE
    tile = np.empty((SIDE + 2 * _FRAME, SIDE + 2 * _FRAME, 3), np.uint8)
    tile[:] = colour
    tile[_FRAME:-_FRAME, _FRAME:-_FRAME] = image[place][:, place]
    return tile


def blank(width: int) -> Pixels:
    """White space of that width, as high as a tile."""
    return np.full((SIDE + 2 * _FRAME, width, 3), 255, np.uint8)


def _show(axes: Axes, picture: Pixels, title: str) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.set_axis_off()
    axes.set_title(title)
    tile = SIDE + 2 * _FRAME
    style: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 9, "color": "#4B5563"}
    axes.text(tile / 2, picture.shape[0] + 6, "probe", **style)
    middle = tile + _MARGIN + (picture.shape[1] - tile - _MARGIN) / 2
    axes.text(middle, picture.shape[0] + 6, "gallery, most alike first", **style)
