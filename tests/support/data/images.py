"""Small images, encoded."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image


def encoded(image: Image.Image | npt.NDArray[Any], kind: str, **options: object) -> bytes:
    """An image, or pixels `[H, W, 3]` or `[H, W]`, as Pillow writes that kind of file."""
    stream = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(number: int, side: int = 8) -> bytes:
    """A small JPEG, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=90)
