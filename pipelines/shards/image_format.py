"""Which format encoded image bytes have, and which members of a sample are images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

IMAGE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
"""How image files end, and the members of a sample that hold its image, the usual ones first."""

_SHOWN: Final = 5  # extensions that a message names

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


def is_apple_metadata(name: str) -> bool:
    """Whether a member is what macOS's tar adds beside a file (`._NAME`), no file of a sample."""
    return name.rpartition("/")[2].startswith("._")


def list_extensions(names: Iterable[str]) -> str:
    """Extensions of a sample for a message, which is short however many there are."""
    found = list(names)
    shown = ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
    return f"{shown}{more}" or "nothing"
