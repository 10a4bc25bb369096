"""How similar two pictures are, by their pixels, and a picture and a worse copy of itself."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from mhe_dist.errors import RunError
from pipelines.audit.classes.centres import Floats
from pipelines.clustering.rows import Ints
from pipelines.data.decode import ImageDecodeError, Pixels, decode_image
from pipelines.data.sample import BadSampleError, read_sample
from pipelines.shards.index import ShardIndex

EQUAL: Final = 1.0
_SMALLER: Final = 0.75  # a worse copy was this much smaller in between
_QUALITY: Final = 75  # and was stored as JPEG of this quality
_LEAST_CONTRAST: Final = 4.0  # of 255, below which a picture counts as having it


def read_picture(index: ShardIndex, number: int, side: int) -> Pixels | None:
    """Uint8 `[side, side, 3]` or `[side, side]` of an image; None: it cannot be read."""
    try:
        return decode_image(read_sample(index, number).data, side)
    except (RunError, BadSampleError, ImageDecodeError):
        return None


def compare_pixels(one: Pixels, other: Pixels) -> float:
    """1 minus the root of the mean squared difference, in units of the pictures' contrast.

    1 only if all pixels are equal. Two pictures without relation have about 1 - sqrt(2).
    """
    if one.ndim != other.ndim:
        one, other = (each if each.ndim == 3 else np.stack([each] * 3, 2) for each in (one, other))
    if np.array_equal(one, other):
        return EQUAL
    first, second = one.astype(np.float64), other.astype(np.float64)
    contrast = np.sqrt((first.var() + second.var()) / 2)
    difference = np.sqrt(((first - second) ** 2).mean())
    return float(1 - difference / max(contrast, _LEAST_CONTRAST))


def compare_pictures(
    one: tuple[ShardIndex, Ints], other: tuple[ShardIndex, Ints], side: int
) -> Floats:
    """float64 `[n]`: how similar pairs of pictures are; NaN where one cannot be read."""
    found = np.full(len(one[1]), np.nan)
    for position, (first, second) in enumerate(
        zip(one[1].tolist(), other[1].tolist(), strict=True)
    ):
        left, right = read_picture(one[0], first, side), read_picture(other[0], second, side)
        if left is not None and right is not None:
            found[position] = compare_pixels(left, right)
    return found


def compare_copies(index: ShardIndex, numbers: Ints, side: int) -> Floats:
    """float64 `[n]`: how similar pictures are to worse copies of themselves; NaN: not known."""
    pictures = (read_picture(index, number, side) for number in numbers.tolist())
    return np.array(
        [np.nan if each is None else compare_pixels(each, worse_copy(each)) for each in pictures]
    )


def worse_copy(pixels: npt.NDArray[np.uint8]) -> Pixels:
    """A picture as it comes back from another site: made smaller, stored as JPEG, enlarged."""
    image = Image.fromarray(pixels)
    small = image.resize([max(1, round(each * _SMALLER)) for each in image.size])
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=_QUALITY)
    return np.asarray(Image.open(stream).resize(image.size))
