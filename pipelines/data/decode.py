"""Encoded image bytes to pixels of one size, by the rules of docs/formats.md section 7."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mhe_dist.config.data import MAX_PIXELS

Pixels = npt.NDArray[np.uint8]

BACKGROUND: Final = 255
"""Grey value of what lies behind a transparent image: white."""
_JPEG: Final = b"\xff\xd8\xff"
_PNG: Final = b"\x89PNG"
_LONGEST: Final = 4  # times the shorter side: what is beyond is cut off before the image is scaled
_ORIENTATION: Final = 0x0112  # tag of Exif
_TRANSPOSED: Final = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


class ImageDecodeError(Exception):
    """The bytes are no image, or a damaged one; the message is the decoder's."""


def decode_image(
    data: bytes, side: int, into: Pixels | None = None, max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Decode an image to uint8 `[side, side, 3]`, RGB; a grey one to `[side, side]`.

    JPEG goes through simplejpeg, other formats and CMYK through Pillow. A stored orientation is
    applied. An image of another size is scaled so that its shorter side fits, and cut to the
    middle square.

    Args:
        data: the encoded image.
        side: of the result, in pixels.
        into: uint8 `[side, side, 3]`, contiguous; the result may be written there, or not.
        max_pixels: an image of more is refused before it is decoded.

    Raises:
        ImageDecodeError: the image cannot be read completely, or it is too large.
    """
    try:
        if data.startswith(_JPEG):
            pixels = _decode_jpeg(data, side, into, max_pixels)
        else:
            pixels = _by_pillow(data, max_pixels)
    except Exception as error:  # Pillow's readers may raise anything at all on damaged bytes
        raise _decode_error(error, max_pixels) from error
    return fit_image(pixels, side)


def fit_image(pixels: Pixels, side: int) -> Pixels:
    """Scale decoded pixels, `[H, W, 3]` or `[H, W]`, and keep the middle square: `[side, side]`."""
    return pixels if pixels.shape[:2] == (side, side) else _resize_and_crop(pixels, side)


def _decode_error(error: Exception, max_pixels: int) -> ImageDecodeError:
    if isinstance(error, Image.DecompressionBombError):  # Pillow has a bound of its own
        return ImageDecodeError(f"more pixels than data.max_pixels={max_pixels} allows")
    if isinstance(error, UnidentifiedImageError):  # whose message holds an address in memory
        return ImageDecodeError("no image of a known format")
    return ImageDecodeError(str(error) or repr(error))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} are more pixels than data.max_pixels={max_pixels} allows"
        )


def _decode_jpeg(data: bytes, side: int, into: Pixels | None, max_pixels: int) -> Pixels:
    """Decode at the smallest of the format's own scales that is not smaller than `side`."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, max_pixels)
        if space == "Gray":
            pixels = simplejpeg.decode_jpeg(data, "GRAY", min_height=side, min_width=side)[:, :, 0]
        else:
            buffer = into if height == width == side else None
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", min_height=side, min_width=side, buffer=buffer
            )
    except ValueError:
        # A colour space like CMYK, or a small damage; a cut-off image raises once more.
        return _by_pillow(data, max_pixels)
    # Wherever the block stands: behind a long comment or colour profile, too.
    if b"Exif\0\0" not in data:
        return pixels
    with Image.open(io.BytesIO(data)) as image:
        return _turn_upright(pixels, image)


def _turn_upright(pixels: Pixels, image: Image.Image) -> Pixels:
    """Apply the orientation that an image's Exif block states; a damaged block states none."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as damaged bytes do
        return pixels
    transposed = _TRANSPOSED.get(orientation)
    return pixels if transposed is None else np.ascontiguousarray(transposed(pixels))


def _by_pillow(data: bytes, max_pixels: int) -> Pixels:
    """Decode in full size; of an animation the first frame."""
    with Image.open(io.BytesIO(data)) as image:
        _check_size(image.width, image.height, max_pixels)
        if data.startswith(_PNG) and b"IEND" not in data:
            raise ValueError("the PNG was cut off: it has no end")
        image.load()
        return _turn_upright(_to_eight_bits(image), image)


def _to_eight_bits(image: Image.Image) -> Pixels:
    """RGB or grey of 8 bits, what is transparent on `BACKGROUND`."""
    # Netpbm's 16 bits are in a mode of 32; for Pillow they reach up to 65,535 as well.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image)
        pixels = (values >> 8).clip(0, 255).astype(np.uint8)
        if isinstance(key := image.info.get("transparency"), int):
            pixels[values == key] = BACKGROUND
        return pixels
    if image.mode in ("I", "F"):
        return _scale_range(np.asarray(image, np.float64), image.mode == "F")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        return np.asarray(Image.alpha_composite(behind, colours).convert("RGB"))
    return np.asarray(image if image.mode == "L" else image.convert("RGB"))


def _scale_range(values: npt.NDArray[np.float64], is_float: bool) -> Pixels:
    """Values of 32 bits to 0..255: those of the smallest usual range that holds all of them.

    The ranges are [0, 1] (of floats only), [0, 255] and [0, 65535]; if none fits, it is that from
    the smallest value to the largest.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it has values that are not finite")
    usual = [1.0, 255.0, 65535.0] if is_float else [255.0, 65535.0]
    top = next((top for top in usual if low >= 0 and high <= top), None)
    if top is None:
        values, top = values - low, max(high - low, np.finfo(np.float64).tiny)
    return np.round(values * (255 / top) if top != 255 else values).clip(0, 255).astype(np.uint8)


def _resize_and_crop(pixels: Pixels, side: int) -> Pixels:
    """Scale the shorter side to `side` and keep the middle."""
    pixels = _cut_ends(pixels)
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _cut_ends(pixels: Pixels) -> Pixels:
    """The middle of a very long image, so that scaling it costs no more than scaling others."""
    height, width = pixels.shape[:2]
    longest = _LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return np.ascontiguousarray(pixels[top : top + longest, left : left + longest])


def decode_full_size(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an image in its own size, uint8 `[H, W, 3]`, RGB, by the rules of `decode_image`.

    Raises:
        ImageDecodeError: the image cannot be read completely, or it is too large.
    """
    try:
        pixels = _by_pillow(data, max_pixels)
    except Exception as error:  # as above
        raise _decode_error(error, max_pixels) from error
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
