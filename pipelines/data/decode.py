"""Encoded image bytes to pixels of one size."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

Pixels = npt.NDArray[np.uint8]

_JPEG = b"\xff\xd8\xff"


class ImageDecodeError(Exception):
    """The bytes are no image, or a damaged one; the message is the decoder's."""


def decode_image(data: bytes, side: int, into: Pixels | None = None) -> Pixels:
    """Decode an image to uint8 `[side, side, 3]`, RGB; a grey one to `[side, side]`.

    JPEG goes through simplejpeg, everything that needs more care through Pillow: other formats,
    grey of 16 bits, palettes, and a stored orientation, which is applied. An image of another size
    is scaled so that its shorter side fits, and cut to the middle square.

    Args:
        data: the encoded image.
        side: of the result, in pixels.
        into: uint8 `[side, side, 3]`, contiguous; the result may be written there, or not.

    Raises:
        Undecodable: the image cannot be read completely.
    """
    try:
        # The orientation, if any, is in an Exif block at the beginning.
        if data.startswith(_JPEG) and b"Exif\0\0" not in data[:256]:
            try:
                pixels = _by_simplejpeg(data, side, into)
            except ValueError:
                pixels = _by_pillow(data)  # a colour space like CMYK; damage raises once more
        else:
            pixels = _by_pillow(data)
    except Exception as error:  # Pillow's readers may raise anything at all on damaged bytes
        raise ImageDecodeError(str(error) or repr(error)) from error
    return pixels if pixels.shape[:2] == (side, side) else _resize_and_crop(pixels, side)


def _by_simplejpeg(data: bytes, side: int, into: Pixels | None) -> Pixels:
    """Decode at the smallest of the format's own scales that is not smaller than `side`."""
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if space == "Gray":
        return simplejpeg.decode_jpeg(data, "GRAY", min_height=side, min_width=side)[:, :, 0]
    buffer = into if height == width == side else None
    return simplejpeg.decode_jpeg(data, "RGB", min_height=side, min_width=side, buffer=buffer)


def _by_pillow(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits; converting would clip to white
            return (np.asarray(upright, np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.asarray(upright if upright.mode == "L" else upright.convert("RGB"))


def _resize_and_crop(pixels: Pixels, side: int) -> Pixels:
    """Scale the shorter side to `side` and keep the middle."""
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def decode_full_size(data: bytes) -> Pixels:
    """Decode an image in its own size, uint8 `[H, W, 3]`, RGB, a stored orientation applied.

    Raises:
        Undecodable: the image cannot be read completely.
    """
    try:
        pixels = _by_pillow(data)
    except Exception as error:  # as above
        raise ImageDecodeError(str(error) or repr(error)) from error
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
