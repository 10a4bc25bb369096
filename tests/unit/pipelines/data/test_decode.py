"""Decoding: every kind of image becomes the same kind of array."""

from __future__ import annotations

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipelines.data.decode import ImageDecodeError, decode_image
from tests.support.data.images import encoded

COLOUR = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "ppm", "tiff"])
def test_lossless_formats_are_exact(kind: str) -> None:
    data = encoded(Image.fromarray(COLOUR), kind, **({"lossless": True} if kind == "webp" else {}))
    assert np.array_equal(decode_image(data, 16), COLOUR)


def test_jpeg_is_what_libjpeg_says() -> None:
    data = simplejpeg.encode_jpeg(COLOUR, quality=95)
    assert np.array_equal(decode_image(data, 16), simplejpeg.decode_jpeg(data))


def test_grey_images_stay_grey() -> None:
    grey = np.ascontiguousarray(COLOUR[:, :, :1])
    assert np.array_equal(
        decode_image(encoded(Image.fromarray(grey[:, :, 0]), "png"), 16), grey[:, :, 0]
    )
    assert decode_image(simplejpeg.encode_jpeg(grey, 95, "GRAY"), 16).shape == (16, 16)


def test_sixteen_bits_keep_the_upper_eight() -> None:
    deep = (COLOUR[:, :, 0].astype(np.uint16) << 8) + 17
    assert np.array_equal(decode_image(encoded(Image.fromarray(deep), "png"), 16), COLOUR[:, :, 0])


@pytest.mark.parametrize("mode", ["P", "RGBA", "1", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    pixels = decode_image(encoded(Image.fromarray(COLOUR).convert(mode), "png"), 16)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (16, 16, 3)


def test_cmyk_jpeg() -> None:
    data = encoded(Image.fromarray(COLOUR).convert("CMYK"), "jpeg")
    assert decode_image(data, 16).shape == (16, 16, 3)


def test_a_stored_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    block = np.zeros((16, 16), np.uint8)
    block[:8, :8] = 255
    pixels = decode_image(encoded(Image.fromarray(block), "jpeg", exif=exif, quality=95), 16)
    assert pixels[:8, 8:].mean() > 250
    assert pixels[:, :8].mean() < 5


@pytest.mark.parametrize("shape", [(32, 48), (300, 201), (7, 5), (16, 17)])
def test_other_sizes_are_scaled_and_cut_to_the_middle(shape: tuple[int, int]) -> None:
    height, width = shape
    ramp = np.linspace(0, 255, width)[None, :, None].repeat(height, 0).repeat(3, 2).astype(np.uint8)
    for kind in ("png", "jpeg"):
        pixels = decode_image(encoded(Image.fromarray(ramp), kind), 16)
        assert pixels.shape == (16, 16, 3)
        # Half a pixel off where an odd one is cut.
        assert abs(float(pixels.mean()) - 127.5) < 255 / 16 * 0.6


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff"])
def test_every_truncation_is_undecodable(kind: str) -> None:
    data = encoded(Image.fromarray(COLOUR), kind)
    for share in (0.0, 0.01, 0.3, 0.7):
        with pytest.raises(ImageDecodeError):
            decode_image(data[: int(len(data) * share)], 16)
