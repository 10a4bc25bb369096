"""Random changes of a training image.

Every image gets a fixed number of uniform draws from a generator keyed by (seed, epoch, sample),
and each change uses its own ones. So the pixels depend on nothing else: not on the rank, the
loader process or a resume, and switching one change on leaves the draws of the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from mhe_dist.config.data import AugmentConfig
from mhe_dist.seeds import derive
from pipelines.data.decode import Pixels

UniformDraws = Sequence[float]

DRAWS_PER_IMAGE: Final = 20
"""Uniform draws per image."""

_FLIP, _ROTATE, _SCALE, _LEFT, _TOP = range(5)
_BRIGHTNESS, _CONTRAST, _SATURATION = range(5, 8)
_BLUR, _RADIUS, _LOW, _FACTOR = range(8, 12)
_ERASE, _AREA, _ASPECT, _ERASE_LEFT, _ERASE_TOP = range(12, 17)
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)


class AugmentationNoise:
    """The draws of any epoch and sample, three times faster than a new generator for each."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator = np.random.Generator(np.random.Philox(key=0))
        self._start = self._generator.bit_generator.state

    def draws(self, epoch: int, sample: int) -> UniformDraws:
        """`DRAWS_PER_IMAGE` numbers in [0, 1).

        They are those of `seeds.generator(seed, "augment", epoch, sample).random`.
        """
        self._start["state"]["key"][0] = derive(self._seed, "augment", epoch, sample)
        # Not kept beside the generator: in a copy that NumPy 1 unpickles they are two.
        self._generator.bit_generator.state = self._start
        return self._generator.random(DRAWS_PER_IMAGE).tolist()


def augment(image: Pixels, config: AugmentConfig, draws: UniformDraws) -> Pixels:
    """Change an image at random.

    Args:
        image: uint8 `[H, W, 3]`, or `[H, W]` if it is grey.
        config: how much of what.
        draws: `DRAWS_PER_IMAGE` numbers in [0, 1).

    Returns:
        uint8, the shape of `image`, which is not written to.
    """
    image = _flip_crop_rotate(image, config, draws)
    if draws[_LOW] < config.low_resolution:
        image = _lower_resolution(image, 0.25 + 0.75 * draws[_FACTOR])
    if draws[_BLUR] < config.blur:
        image = _blur(image, 0.1 + 1.9 * draws[_RADIUS])
    if config.brightness or config.contrast or config.saturation:
        image = _colour(image, config, draws)
    if draws[_ERASE] < config.erase:
        image = _erase(image, config.fill, draws)
    return image


def _flip_crop_rotate(image: Pixels, config: AugmentConfig, draws: UniformDraws) -> Pixels:
    """Flip, crop and rotate, as one affine map, so that pixels are interpolated once."""
    flip = draws[_FLIP] < config.flip
    if not config.crop and not config.rotate:
        return image[:, ::-1] if flip else image
    height, width = image.shape[:2]
    scale = 1 - config.crop * draws[_SCALE]
    angle = math.radians(config.rotate) * (2 * draws[_ROTATE] - 1)
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    mirror = -1.0 if flip else 1.0
    # The middle of the part that is kept, in pixels of the input.
    x = width * (scale / 2 + (1 - scale) * draws[_LEFT])
    y = height * (scale / 2 + (1 - scale) * draws[_TOP])
    # Pillow maps a pixel of the output to (a x + b y + c, d x + e y + f) of the input.
    a, b, d, e = mirror * cosine, -sine, mirror * sine, cosine
    c, f = x - (a * width + b * height) / 2, y - (d * width + e * height) / 2
    moved = Image.fromarray(image).transform(
        (width, height),
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=config.fill if image.ndim == 2 else (config.fill,) * 3,
    )
    return np.asarray(moved)


def _lower_resolution(image: Pixels, factor: float) -> Pixels:
    """Scale down by `factor` and up again."""
    full = Image.fromarray(np.ascontiguousarray(image))
    small = (max(1, round(full.width * factor)), max(1, round(full.height * factor)))
    lost = full.resize(small, Image.Resampling.BILINEAR)
    return np.asarray(lost.resize(full.size, Image.Resampling.BILINEAR))


def _blur(image: Pixels, radius: float) -> Pixels:
    """Blur by a Gaussian of `radius` pixels in an image of 112."""
    sigma = radius * image.shape[0] / 112
    blurred = Image.fromarray(np.ascontiguousarray(image)).filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(blurred)


def _colour(image: Pixels, config: AugmentConfig, draws: UniformDraws) -> Pixels:
    """Brightness about black, contrast about the mean, saturation about each pixel's grey."""
    brightness = 1 + config.brightness * (2 * draws[_BRIGHTNESS] - 1)
    contrast = 1 + config.contrast * (2 * draws[_CONTRAST] - 1)
    mean = brightness * int(np.add.reduce(image, axis=None, dtype=np.int64)) / image.size
    # One map of values, as a table: there are more pixels than values.
    table = np.arange(256) * (brightness * contrast) + mean * (1 - contrast)
    if image.ndim == 2 or not config.saturation:
        return _to_bytes(table)[image]
    values = table.astype(np.float32)[image]
    saturation = np.float32(1 + config.saturation * (2 * draws[_SATURATION] - 1))
    grey = (values * _LUMA).sum(axis=2, keepdims=True)
    return _to_bytes(values * saturation + grey * (1 - saturation))


def _to_bytes(values: npt.NDArray[np.floating]) -> Pixels:
    """Round to the nearest uint8."""
    return np.minimum(np.maximum(values + 0.5, 0), 255).astype(np.uint8)


def _erase(image: Pixels, fill: int, draws: UniformDraws) -> Pixels:
    """Paint over a rectangle of 2 to 20 % of the area, up to three times as long as wide."""
    height, width = image.shape[:2]
    area = height * width * (0.02 + 0.18 * draws[_AREA])
    aspect = 3.0 ** (2 * draws[_ASPECT] - 1)
    rows = min(height, max(1, round(math.sqrt(area * aspect))))
    columns = min(width, max(1, round(math.sqrt(area / aspect))))
    top = int((height - rows + 1) * draws[_ERASE_TOP])
    left = int((width - columns + 1) * draws[_ERASE_LEFT])
    erased = image.copy()
    erased[top : top + rows, left : left + columns] = fill
    return erased
