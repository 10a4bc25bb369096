"""A typeface in a font file: which characters it really has, and how one of them looks."""

from __future__ import annotations

import logging
import struct
import unicodedata
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

# It warns of tables that are not quite right: without the font's name, and no picture changes.
logging.getLogger("fontTools").setLevel(logging.ERROR)

Picture = npt.NDArray[np.uint8]

_OVERSAMPLING: Final = 4  # drawn this much larger, then averaged: antialiasing without hinting
_CAPITAL: Final = 0.625  # height of a capital letter, as a share of the image's side
_USUAL_CAPITAL: Final = 0.72  # the same as a share of the em, for fonts without an H
_MAX_FACES: Final = 64  # of a collection; one that is damaged may announce any number
_MARGIN: Final = 1  # pixels on each side that stay empty
# Controls, format characters, surrogates and private use: no characters that fonts agree on.
_NO_CHARACTER: Final = ("Cc", "Cf", "Cs", "Co")
_OUTLINES: Final = ("glyf", "CFF ", "CFF2")  # the tables that hold them
_UNUSABLE: Final = (
    *(OSError, TTLibError, KeyError, AssertionError, ValueError, AttributeError),
    *(IndexError, TypeError, struct.error, UnicodeDecodeError),
)


class UnusableFontError(Exception):
    """A font file that cannot be read; the message says why."""


class GlyphPen:
    """Draws the characters of a typeface as pictures of `side` x `side` pixels.

    All typefaces are scaled to capitals of one height, because relative size tells characters
    apart (o, O). A glyph is centred horizontally and stands on one common line, because height
    tells characters apart too (comma, apostrophe); only what would leave the picture is moved, and
    only what is larger than the picture is shrunk.
    """

    def __init__(self, path: Path, side: int, face: int = 0, capital: float = 0.0) -> None:
        """Open the font.

        Args:
            path: of the file.
            side: of the pictures, in pixels.
            face: which one, in a collection.
            capital: height of its capitals as a share of the em; 0: measure its H.

        Raises:
            OSError: FreeType cannot open it.
        """
        # The basic layout: raqm fails on combining marks that stand alone.
        basic = ImageFont.Layout.BASIC
        unscaled = ImageFont.truetype(str(path), 1000, index=face, layout_engine=basic)
        if not capital:
            _, top, _, bottom = unscaled.getbbox("H", anchor="ls")
            capital = float(bottom - top) / 1000 or _USUAL_CAPITAL
        self.side, self.capital = side, capital
        self._font = unscaled.font_variant(size=_CAPITAL * side * _OVERSAMPLING / capital)

    def draw(self, code: int) -> Picture | None:
        """The picture of a character: uint8 `[side, side]`, ink 255 on 0; None if it is blank.

        Raises:
            OSError: the font's program for this glyph is broken.
        """
        inked = self._ink(chr(code))
        if inked is None:
            return None
        ink, above = inked
        side, margin = self.side * _OVERSAMPLING, _MARGIN * _OVERSAMPLING
        room = side - 2 * margin
        line = (side + _CAPITAL * side) / 2
        extent = max(ink.size)
        if extent > room:
            ink, above = _shrink(ink, room / extent), above * room / extent
        top = min(max(round(line - above), margin), side - margin - ink.height)
        canvas = Image.new("L", (side, side))
        canvas.paste(ink, ((side - ink.width) // 2, top))
        return np.asarray(canvas.reduce(_OVERSAMPLING))

    def _ink(self, text: str) -> tuple[Image.Image, float] | None:
        """The enlarged glyph, cut to its ink, and the height of its top above the line, or None."""
        # This box holds the advance as well, so the ink need not be in its middle.
        left, top, right, bottom = (round(edge) for edge in self._font.getbbox(text, anchor="ls"))
        if right <= left or bottom <= top:
            return None
        canvas = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(canvas).text((-left, -top), text, fill=255, font=self._font, anchor="ls")
        box = canvas.getbbox()
        return None if box is None else (canvas.crop(box), -float(top + box[1]))


class Typeface:
    """A typeface of a font file, and what it has.

    Attributes:
        name: of the font file, and for further faces of a collection `#` and the number.
        family: as the file's first face calls it.
        capital: height of its capitals as a share of the em.
        codes: its characters, sorted.
        outlines: for each of them, what is equal for equal pictures in faces of one file.
    """

    def __init__(self, path: Path, face: int = 0, name: str = "") -> None:
        """Read what a font has.

        Args:
            path: of the file.
            face: which one, in a collection.
            name: of the file, if it is to be called something else.

        Raises:
            Unusable: it is not a font that fontTools and FreeType understand.
        """
        self.name = (name or path.name) + (f"#{face}" if face else "")
        try:
            with TTFont(path, fontNumber=face, lazy=True) as tables:
                cmap = tables.getBestCmap() or {}
                self.family = str(tables["name"].getBestFamilyName() or path.stem)
                shared = [tables.reader.tables[tag].offset for tag in _OUTLINES if tag in tables]
                number = tables.getReverseGlyphMap()
            vars(tables).clear()  # it and its parts know one another, tens of megabytes of a face
            measured = 0.0 if ord("H") in cmap else _USUAL_CAPITAL
            self.capital = GlyphPen(path, 16, face, measured).capital
        except _UNUSABLE as error:
            raise UnusableFontError(f"{path}: not a usable font ({error!r})") from error
        self.codes = sorted(code for code, glyph in cmap.items() if is_character(code, glyph))
        self.outlines = [(number[cmap[code]], self.capital, *shared) for code in self.codes]


def open_faces(path: Path, name: str = "") -> list[Typeface]:
    """The typefaces of a font file; one, unless it is a collection.

    The faces of a collection share most of their outlines. A character is left to the first face
    that shows it so, and a face that shows nothing of its own is left out.

    Raises:
        Unusable: see `Typeface`.
    """
    faces: list[Typeface] = []
    seen: set[tuple[int, tuple[float, ...]]] = set()
    for number in range(_count_faces(path)):
        face = Typeface(path, number, name)
        own = [pair for pair in zip(face.codes, face.outlines, strict=True) if pair not in seen]
        seen.update(own)
        face.codes, face.outlines = [code for code, _ in own], []
        if own:
            face.family = faces[0].family if faces else face.family
            faces.append(face)
    return faces


def _count_faces(path: Path) -> int:
    try:
        with path.open("rb") as stream:
            head = stream.read(12)
    except OSError as error:
        raise UnusableFontError(f"{path}: cannot be read ({error})") from error
    if head[:4] != b"ttcf" or len(head) < 12:
        return 1
    return min(int.from_bytes(head[8:12], "big"), _MAX_FACES)


def is_character(code: int, glyph: str) -> bool:
    """Whether an entry of a font's cmap is a character with a glyph of its own."""
    return glyph != ".notdef" and unicodedata.category(chr(code)) not in _NO_CHARACTER


def _shrink(ink: Image.Image, factor: float) -> Image.Image:
    size = (max(1, int(ink.width * factor)), max(1, int(ink.height * factor)))
    return ink.resize(size, Image.Resampling.BOX)
