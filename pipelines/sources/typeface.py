"""One font file: which characters it really has, and how one of them looks."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8]

_OVERSAMPLING: Final = 4  # drawn this much larger, then averaged: antialiasing without hinting
_CAPITAL: Final = 0.625  # height of a capital letter, as a share of the image's side
_USUAL_CAPITAL: Final = 0.72  # the same as a share of the em, for fonts without an H
_MARGIN: Final = 1  # pixels on each side that stay empty
# Controls, format characters, surrogates and private use: no characters that fonts agree on.
_NO_CHARACTER: Final = ("Cc", "Cf", "Cs", "Co")


class Unusable(Exception):
    """A font file that cannot be read; the message says why."""


class Typeface:
    """A font file, opened for drawing pictures of `side` x `side` pixels.

    All typefaces are scaled to capitals of one height, because relative size tells characters
    apart (o, O). A glyph is centred horizontally and stands on one common line, because height
    tells characters apart too (comma, apostrophe); only what would leave the picture is moved, and
    only what is larger than the picture is shrunk.
    """

    def __init__(self, path: Path, side: int) -> None:
        """Open a font.

        Raises:
            Unusable: it is not a font that fontTools and FreeType understand.
        """
        self.name = path.name
        self.side = side
        try:
            with TTFont(path, fontNumber=0, lazy=True) as tables:
                cmap = tables.getBestCmap() or {}
                self.family = str(tables["name"].getBestFamilyName() or path.stem)
            # The basic layout: raqm fails on combining marks that stand alone.
            unscaled = ImageFont.truetype(str(path), 1000, layout_engine=ImageFont.Layout.BASIC)
        except (OSError, TTLibError, KeyError, AssertionError) as error:
            raise Unusable(f"{path}: not a usable font ({error})") from error
        capital = _USUAL_CAPITAL
        if ord("H") in cmap:
            _, top, _, bottom = unscaled.getbbox("H", anchor="ls")
            capital = (bottom - top) / 1000 or _USUAL_CAPITAL
        self._font = unscaled.font_variant(size=_CAPITAL * side * _OVERSAMPLING / capital)
        self.codes = sorted(code for code, glyph in cmap.items() if is_character(code, glyph))

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
            ink, above = _fit(ink, room / extent), above * room / extent
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


def is_character(code: int, glyph: str) -> bool:
    """Whether an entry of a font's cmap is a character with a glyph of its own."""
    return glyph != ".notdef" and unicodedata.category(chr(code)) not in _NO_CHARACTER


def _fit(ink: Image.Image, factor: float) -> Image.Image:
    size = (max(1, int(ink.width * factor)), max(1, int(ink.height * factor)))
    return ink.resize(size, Image.Resampling.BOX)
