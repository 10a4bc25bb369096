"""Pictures of characters that are in no class of a glyph data set: strangers for its classes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.errors import UserError
from pipelines.data.mixture.class_list import names_of
from pipelines.shards.index import ShardIndex
from pipelines.sources.glyphs.build import matplotlib_fonts, open_typefaces
from pipelines.sources.glyphs.draw import encode_picture
from pipelines.sources.glyphs.fonts import FontFile, find_fonts
from pipelines.sources.glyphs.plan import Glyph, shows_characters
from pipelines.sources.glyphs.typeface import GlyphPen, Typeface
from pipelines.sources.planted.faults import hash_names

_SPARE: Final = 1.25  # drawn for each one that is wanted: some are blank or look like others


class ForeignImage(NamedTuple):
    """An image that shows no class of a data set: its name, and its JPEG."""

    name: str
    data: bytes


def draw_unseen_glyphs(
    sets: Iterable[ShardIndex], fonts: str, side: int, count: int, seed: int
) -> list[ForeignImage]:
    """Draw characters that are in no class of some glyph data sets, each in one typeface.

    Args:
        sets: training and held-out set; their classes are named by their code points.
        fonts: folder of font files; empty: those that matplotlib ships.
        side: of the pictures in pixels.
        count: how many.
        seed: of the choice, which is keyed by character and typeface.

    Raises:
        UserError: there are fewer, or a class is not named by code points.
    """
    known = {code for index in sets for code in _codes(index)}
    found = find_fonts(fonts or matplotlib_fonts())
    files = {file.name: file for file in found if shows_characters(file.name)}
    faces = list(open_typefaces(list(files.values())).values())
    chosen = _choose_glyphs(faces, known, round(_SPARE * count) + 8, seed)
    images = list(_draw(chosen, _Pens(files, faces, side)))[:count]
    if len(images) < count:
        raise UserError(
            f"{fonts or 'the fonts of matplotlib'}: {len(images):,} characters that are in no "
            f"class, and {count:,} foreign images are wanted; plant fewer, or give more fonts"
        )
    return images


def _codes(index: ShardIndex) -> Iterator[int]:
    for name in names_of(index.folder, range(index.num_classes)).values():
        for text in name.split():
            if not text.startswith("U+"):
                raise UserError(
                    f"{index.folder}: class {name!r} is not named by its characters, so nobody "
                    "knows which ones are foreign; only glyph data sets get foreign images"
                )
            yield int(text[2:], 16)


def _choose_glyphs(
    faces: Sequence[Typeface], known: set[int], count: int, seed: int
) -> list[Glyph]:
    """So many unknown characters, each in one typeface; by the draws of their names."""
    fonts: dict[int, list[str]] = defaultdict(list)
    for face in faces:
        for code in face.codes:
            if code not in known:
                fonts[code].append(face.name)
    codes = list(fonts)
    draws = hash_names(seed, "foreign", [f"{code:x}" for code in codes])
    chosen = [codes[number] for number in np.argsort(draws, kind="stable")[:count].tolist()]
    return [_drawn_typeface([Glyph(code, font) for font in fonts[code]], seed) for code in chosen]


def _drawn_typeface(glyphs: list[Glyph], seed: int) -> Glyph:
    return glyphs[int(hash_names(seed, "typeface", [glyph.key for glyph in glyphs]).argmin())]


class _Pens:
    """Pens of typefaces by name, opened when they are used first."""

    def __init__(self, files: dict[str, FontFile], faces: Sequence[Typeface], side: int) -> None:
        self._files, self._side = files, side
        self._capital = {face.name: face.capital for face in faces}
        self._opened: dict[str, GlyphPen] = {}

    def pen(self, font: str) -> GlyphPen:
        """The pen of a typeface."""
        if font not in self._opened:
            name, _, number = font.partition("#")
            path = Path(self._files[name].path)
            self._opened[font] = GlyphPen(path, self._side, int(number or 0), self._capital[font])
        return self._opened[font]


def _draw(glyphs: list[Glyph], pens: _Pens) -> Iterator[ForeignImage]:
    """Their pictures, without those that are blank or that several of them share."""
    made: list[tuple[Glyph, bytes]] = []
    for glyph in glyphs:
        try:
            picture = pens.pen(glyph.font).draw(glyph.code)
        except OSError:
            continue  # FreeType cannot draw it
        if picture is not None:
            made.append((glyph, encode_picture(picture)))
    shared = Counter(data for _, data in made)
    for glyph, data in made:
        if shared[data] == 1:
            yield ForeignImage(glyph.key, data)
