"""Which format encoded image bytes have, by their first bytes."""

from __future__ import annotations

from typing import Final

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
"""How image files end, and the members of a sample that hold its image, the usual ones first."""

_BEGINNINGS: Final = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"BM": "bmp",
    b"GIF8": "gif",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"P5": "pgm",
    b"P6": "ppm",
}


def image_extension(data: bytes) -> str | None:
    """The usual file extension of an encoded image, without a dot; None if it is no such image."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for beginning, extension in _BEGINNINGS.items():
        if data.startswith(beginning):
            return extension
    return None
