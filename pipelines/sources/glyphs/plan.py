"""Which glyphs make a class, and which classes and typefaces are held out. Pure."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import PurePath
from typing import Final, NamedTuple, Protocol

from mhe_dist.config.data import GlyphsConfig
from mhe_dist.errors import UserError
from mhe_dist.seeds import generator
from pipelines.data.order import stable_permutation

# Fonts whose cmap does not say what they show: code blocks in place of characters, TeX's own
# encoding, oversized parts of brackets, private use.
_NOT_CHARACTERS: Final = ("LastResort*", "cm*10.ttf", "STIXSiz*", "STIXNonUni*")

log = logging.getLogger(__name__)


class Glyph(NamedTuple):
    """One picture: a character in a typeface, which is named by its file (see `Typeface.name`)."""

    code: int
    font: str

    @property
    def key(self) -> str:
        """Key of the sample: code point and typeface, without a dot."""
        name, _, face = self.font.partition("#")
        stem = PurePath(name).stem.replace(".", "_")
        return f"u{self.code:05x}-{stem}" + (f"-face{face}" if face else "")


class GlyphPlan(NamedTuple):
    """What is to be written: classes as lists of glyphs whose pictures are distinct.

    A held-out class begins with its enrolment image, in a typeface that training knows. `known` has
    the classes of `train` in the held-out typefaces, some without a glyph; empty: not asked for.
    """

    train: list[list[Glyph]]
    heldout: list[list[Glyph]]
    known: list[list[Glyph]]

    @property
    def samples(self) -> int:
        """Pictures in all sets."""
        return sum(len(glyphs) for glyphs in [*self.train, *self.heldout, *self.known])


class FontCoverage(Protocol):
    """The properties of a typeface that the split uses."""

    name: str
    family: str
    codes: list[int]


def split_fonts(
    fonts: Sequence[FontCoverage], settings: GlyphsConfig
) -> tuple[list[str], list[str]]:
    """File names of the typefaces for training, the one of widest coverage first, and held out.

    Held out are the files that match `settings.heldout_fonts`. If none does (somebody's own
    folder), it is the smallest family that shares enough characters with the others.

    Raises:
        UserError: nothing can be held out, or nothing is left to train on.
    """
    fonts = [font for font in fonts if shows_characters(font.name)]
    unseen = [font for font in fonts if _matches(font.name, settings.heldout_fonts)]
    if not unseen:
        unseen = _smallest_family(fonts, settings)
        log.info("held out: %s", ", ".join(font.name for font in unseen))
    known = [font for font in fonts if font not in unseen]
    if not known:
        raise UserError(
            f"data.glyphs.heldout_fonts={settings.heldout_fonts}: keeps every font for the "
            f"evaluation; name fewer of them"
        )
    # Among equals the shorter name, which is the plain style.
    known.sort(key=lambda font: (-len(font.codes), len(font.name), font.name))
    return [font.name for font in known], [font.name for font in unseen]


def shows_characters(font: str) -> bool:
    """Whether a typeface, by its name, shows the characters that its table of them names."""
    return not _matches(font, _NOT_CHARACTERS)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a typeface is in a file of that name; those of a collection stay together."""
    return any(fnmatch(_file_of(name), pattern) for pattern in patterns)


def _file_of(font: str) -> str:
    return font.partition("#")[0]


def _smallest_family(fonts: Sequence[FontCoverage], settings: GlyphsConfig) -> list[FontCoverage]:
    """The fonts of the family of least coverage from which enough classes can be held out."""
    families: dict[str, list[FontCoverage]] = defaultdict(list)
    for font in fonts:
        families[font.family].append(font)
    covered = {name: {c for f in family for c in f.codes} for name, family in families.items()}
    for name in sorted(families, key=lambda name: (len(covered[name]), name)):
        others = set().union(*(covered[other] for other in families if other != name))
        if len(covered[name] & others) >= settings.heldout_classes:
            return families[name]
    raise UserError(
        f"data.glyphs.heldout_fonts={settings.heldout_fonts}: no font here matches, and no family "
        f"shares {settings.heldout_classes} characters with the others; lower "
        f"data.glyphs.heldout_classes or add fonts"
    )


def plan_classes(
    pictures: Mapping[Glyph, bytes],
    known: Sequence[str],
    unseen: Sequence[str],
    settings: GlyphsConfig,
) -> GlyphPlan:
    """Form the classes and deal them to training and evaluation.

    Args:
        pictures: glyph -> something equal for equal pictures.
        known: typefaces for training; an enrolment image is in the first one that has the class.
        unseen: held-out typefaces.
        settings: see `GlyphsConfig`.

    Raises:
        UserError: there are fewer classes than the settings ask for.
    """
    groups = merge_lookalikes(pictures)
    rank, held = {font: n for n, font in enumerate(known)}, set(unseen)
    eligible = [n for n, group in enumerate(groups) if _is_in_both(group, rank, held)]
    if len(eligible) < settings.heldout_classes:
        raise UserError(
            f"data.glyphs.heldout_classes={settings.heldout_classes}: only {len(eligible)} classes "
            f"are both in {', '.join(unseen)} and in another font"
        )
    chosen = set(_draw_some(eligible, settings.heldout_classes, "glyphs/heldout"))
    heldout = [_enrol(groups[number], pictures, rank, held) for number in sorted(chosen)]
    train, known_classes = [], []
    for number, group in enumerate(groups):
        glyphs = [glyph for glyph in group if glyph.font in rank]
        files = {_file_of(glyph.font) for glyph in glyphs}
        if number not in chosen and len(files) >= settings.min_fonts:
            train.append(_distinct(glyphs, pictures))
            known_classes.append(_distinct([g for g in group if g.font in held], pictures))
    if not train:
        raise UserError(
            f"data.glyphs.min_fonts={settings.min_fonts}: no character is in so many of the "
            f"{len({_file_of(font) for font in known})} fonts for training; lower it"
        )
    count = settings.max_classes or len(train)
    drawn = sorted(_draw_some(range(len(train)), count, "glyphs/train"))
    return GlyphPlan(
        [train[n] for n in drawn],
        heldout,
        [known_classes[n] for n in drawn] if settings.known_classes else [],
    )


def _draw_some(numbers: Sequence[int], count: int, purpose: str) -> list[int]:
    """Draw `count` of the numbers at random; a larger count includes those of a smaller one."""
    drawn = stable_permutation(len(numbers), generator(0, purpose))[:count]
    return [numbers[i] for i in drawn.tolist()]


def merge_lookalikes(pictures: Mapping[Glyph, bytes]) -> list[list[Glyph]]:
    """Classes: code points that share a picture in any typeface are one, and so on from there.

    So no picture is ever in two classes. Classes are sorted by their lowest code point, glyphs by
    code point and typeface.
    """
    root: dict[int, int] = {}

    def find(code: int) -> int:
        while root.setdefault(code, code) != code:
            root[code] = code = root[root[code]]
        return code

    first: dict[bytes, int] = {}
    ordered = sorted(pictures)
    for glyph in ordered:
        twin = first.setdefault(pictures[glyph], glyph.code)
        low, high = sorted((find(glyph.code), find(twin)))
        root[high] = low
    groups: dict[int, list[Glyph]] = defaultdict(list)
    for glyph in ordered:
        groups[find(glyph.code)].append(glyph)
    return [groups[code] for code in sorted(groups)]


def _is_in_both(group: Sequence[Glyph], known: Mapping[str, int], unseen: set[str]) -> bool:
    fonts = {glyph.font for glyph in group}
    return not fonts.isdisjoint(known) and not fonts.isdisjoint(unseen)


def _enrol(
    group: Sequence[Glyph],
    pictures: Mapping[Glyph, bytes],
    known: Mapping[str, int],
    unseen: set[str],
) -> list[Glyph]:
    """A held-out class: one image in a known typeface, then all in the unseen ones."""
    gallery = min(
        (glyph for glyph in group if glyph.font in known),
        key=lambda glyph: (known[glyph.font], glyph.code),
    )
    probes = _distinct([glyph for glyph in group if glyph.font in unseen], pictures)
    return [gallery, *probes]


def _distinct(glyphs: Sequence[Glyph], pictures: Mapping[Glyph, bytes]) -> list[Glyph]:
    """The glyphs without those that repeat the picture of an earlier one."""
    first: dict[bytes, Glyph] = {}
    for glyph in glyphs:
        first.setdefault(pictures[glyph], glyph)
    return list(first.values())
