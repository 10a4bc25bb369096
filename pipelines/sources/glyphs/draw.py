"""The work of processes that draw glyphs: survey a typeface, or draw the samples of a tar.

It imports no torch, so that a process starts at once.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import simplejpeg

from mhe_dist.errors import RunError
from pipelines.shards.packing import pack_labels, unpack_labels
from pipelines.shards.writer import Sample
from pipelines.sources.glyphs.typeface import GlyphPen, Picture

_QUALITY: Final = 95
_DIGEST: Final = 16
# A picture that so many characters of one typeface share stands for none of them.
_PLACEHOLDER: Final = 32


class FontFace(NamedTuple):
    """Where a typeface is and how to draw it, see `GlyphPen`."""

    path: str
    side: int
    number: int
    capital: float


class SurveyTask(NamedTuple):
    """The characters of a typeface that are to be drawn."""

    face: FontFace
    codes: list[int]


class GlyphSample(NamedTuple):
    """A sample: its class, its key, the character, the typeface, and the sample's role."""

    label: int
    key: str
    code: int
    font: str
    role: str


class DrawTask(NamedTuple):
    """The samples of a tar, and where their typefaces are, by name."""

    rows: list[GlyphSample]
    faces: dict[str, FontFace]


@lru_cache(maxsize=256)
def _open_pen(face: FontFace) -> GlyphPen:
    return GlyphPen(Path(face.path), face.side, face.number, face.capital)


def survey_typeface(task: SurveyTask) -> dict[str, Any]:
    """Draw the characters of a typeface, and find which of them have a picture.

    Returns:
        What JSON can hold, see `unpack_fingerprints`; and `broken`, how many FreeType cannot draw.
    """
    face = _open_pen(task.face)
    found: dict[int, bytes] = {}
    broken = 0
    for code in task.codes:
        try:
            picture = face.draw(code)
        except OSError:
            broken += 1
            continue
        if picture is not None:
            found[code] = blake2b(picture.tobytes(), digest_size=_DIGEST).digest()
    shared = Counter(found.values())
    found = {code: print_ for code, print_ in found.items() if shared[print_] < _PLACEHOLDER}
    prints = base64.b64encode(b"".join(found.values())).decode()
    return {"count": len(found), "codes": pack_labels(found), "prints": prints, "broken": broken}


def unpack_fingerprints(result: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
    """Code point and fingerprint of every picture that `survey_typeface` found."""
    prints = base64.b64decode(result["prints"])
    codes = unpack_labels(result["codes"], result["count"]).tolist()
    for number, code in enumerate(codes):
        yield code, prints[number * _DIGEST : (number + 1) * _DIGEST]


def encode_picture(picture: Picture) -> bytes:
    """The JPEG of a picture, uint8 `[side, side]`."""
    return bytes(simplejpeg.encode_jpeg(picture[:, :, None], quality=_QUALITY, colorspace="GRAY"))


def draw_samples(task: DrawTask) -> Iterator[Sample]:
    """White ink on black, as grey JPEG: black is also what augmentation fills with."""
    for row in task.rows:
        picture = _open_pen(task.faces[row.font]).draw(row.code)
        if picture is None:
            raise RunError(f"{row.key}: drew ink the first time and nothing the second time")
        about = {"codepoint": row.code, "font": row.font, "role": row.role}
        label, text = str(row.label).encode(), json.dumps(about).encode()
        yield Sample(row.key, {"jpg": encode_picture(picture), "cls": label, "json": text})
