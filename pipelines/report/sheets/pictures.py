"""Small pictures with lines of text, as the sheets show them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageFont

from mhe_dist.errors import RunError, UserError
from pipelines.data.decode import ImageDecodeError, Pixels, decode_image
from pipelines.data.sample import BadSampleError, read_sample
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.storage.urls import resolve_url

SIDE: Final = 112  # of a picture, in pixels
GREY, INK = (209, 213, 219), (55, 65, 81)
_LETTERS: Final = 18  # of a line


def has_index(source: str) -> bool:
    """Whether a data set is there whose images can be shown: a page does without one that is not.

    Args:
        source: folder or URL; empty: none is known.
    """
    with suppress(UserError, RunError):
        return bool(source) and index_exists(source)
    return False


class Pictures:
    """Reads images of a folder or of shards by number, small and square.

    Args:
        source: folder or URL.
        keys: paths below the folder; of shards they are not needed.
        side: width and height of a picture in pixels.
    """

    def __init__(self, source: str, keys: Sequence[str], side: int = SIDE) -> None:
        self._source, self._keys, self._side = source, keys, side
        self._index = ShardIndex.load(self._source) if has_index(self._source) else None

    def read(self, number: int) -> Pixels:
        """Uint8 `[side, side, 3]`; grey where the image cannot be had."""
        return self.read_named(number)[1]

    def read_named(self, number: int) -> tuple[str, Pixels]:
        """Name of an image and its pixels, see `read`; no name where it cannot be had."""
        try:
            name, data = self._encoded(number)
            pixels = decode_image(data, self._side)
        except (OSError, ValueError, ImageDecodeError, BadSampleError):
            return "", np.full((self._side, self._side, 3), 229, np.uint8)
        return name, pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)

    def _encoded(self, number: int) -> tuple[str, bytes]:
        if self._index is None:
            filesystem, root = resolve_url(self._source)
            key = self._keys[number]
            return key, bytes(filesystem.cat_file(f"{root}/{key}"))
        sample = read_sample(self._index, number)
        return sample.key, sample.data


def as_data_url(pixels: Pixels, quality: int = 85) -> str:
    """An image as a page holds it."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def as_bytes(text: str) -> bytes:
    """UTF-8 of a table or page; bytes of file names that are not UTF-8 are spelled out."""
    return text.encode(errors="backslashreplace")


def letters() -> ImageFont.FreeTypeFont:
    """The font of the lines."""
    fonts = Path(mpl.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 10)


def shorten(text: str, count: int = _LETTERS) -> str:
    """The end of a text, which tells paths apart, in characters that can be drawn."""
    text = as_bytes(text).decode()
    return text if len(text) <= count else f"…{text[1 - count :]}"
