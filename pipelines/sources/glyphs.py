"""Glyphs as identities: a class is a Unicode code point, its images are that character in the
typefaces of a folder of fonts.

It is a real many-class data set that needs no download, because matplotlib ships its fonts. Code
points that look the same in any font are one class (Latin A, Greek Alpha), so no picture stands
under two classes. Held out are whole classes and whole typefaces: a probe is a character that
training never saw in a typeface that training never saw.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib
import simplejpeg

from mhe_dist.config import Config, GlyphsConfig
from mhe_dist.errors import RunError, UserError
from mhe_dist.seeds import generator
from pipelines.order import permutation
from pipelines.parallel import Progress, ignore
from pipelines.shards import Sample, ShardIndex, ShardWriter, exists
from pipelines.sources.glyph_plan import Glyph, plan_classes, split_fonts
from pipelines.sources.typeface import Typeface, Unusable
from pipelines.urls import refuse_existing

TRAIN: Final = "train"
HELDOUT: Final = "heldout"
_SHARD: Final = 1000  # samples per tar, about 3 MB at 32 pixels
_QUALITY: Final = 95
_FONT_FILES: Final = (".ttf", ".otf", ".ttc")

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A sample to be written; its role is `train`, `gallery` (enrolled) or `probe`."""

    label: int
    glyph: Glyph
    role: str


def ensure_glyphs(config: Config, progress: Progress = ignore) -> bool:
    """Make the glyph data set of `config.data.glyphs` if its shards are missing.

    Returns:
        whether anything was made.

    Raises:
        UserError: `data.shards` does not name a `train` folder, or holds glyphs that were made
            with other settings.
    """
    settings, shards = config.data.glyphs, config.data.shards.rstrip("/")
    if settings is None:
        return False
    if exists(shards):
        _refuse_other_settings(shards, settings)
        return False
    root, _, name = shards.rpartition("/")
    if name != TRAIN:
        raise UserError(
            f"data.shards={shards}: with data.glyphs it must be a folder named {TRAIN!r}; the "
            f"held-out set is written beside it as {HELDOUT!r}"
        )
    write_glyphs(settings.fonts, root or ".", settings, progress)
    return True


def write_glyphs(fonts: str, out: str, settings: GlyphsConfig, progress: Progress = ignore) -> None:
    """Render the fonts of a folder into `out/train` and `out/heldout`.

    The result depends on the fonts and the settings alone. The training samples are shuffled
    globally; the held-out ones lie class by class, enrolment image first.

    Args:
        fonts: folder of font files; empty: those that matplotlib ships.
        out: folder for the two data sets; neither may exist.
        settings: see `GlyphsConfig`; its `fonts` is not looked at.
        progress: called with the pictures drawn and the number in all; two passes over them.

    Raises:
        UserError: no fonts, a target that exists, or too few classes for the settings.
    """
    for name in (TRAIN, HELDOUT):
        refuse_existing(f"{out}/{name}")
    typefaces = open_typefaces(fonts or matplotlib_fonts(), settings.image_size)
    known, unseen = split_fonts(list(typefaces.values()), settings)
    faces = [typefaces[name] for name in (*known, *unseen)]
    count = _Count(progress, 2 * sum(len(face.codes) for face in faces))
    plan = plan_classes(survey(faces, count.add), known, unseen, settings)
    count.total = count.done + plan.samples
    about = {
        "source": "glyphs",
        "settings": _recorded(settings),
        "train_fonts": known,
        "heldout_fonts": unseen,
    }
    with (
        ShardWriter(f"{out}/{HELDOUT}", HELDOUT) as heldout,
        ShardWriter(f"{out}/{TRAIN}", TRAIN) as train,
    ):
        rows = _rows(plan.heldout, "gallery", "probe")
        _write(heldout, rows, typefaces, count)
        shuffled = _rows(plan.train, "train", "train")
        order = permutation(len(shuffled), generator(0, "glyphs/shuffle"))
        _write(train, [shuffled[i] for i in order], typefaces, count)
        # The training set last: its index is what `ensure_glyphs` looks for.
        heldout.finish(len(plan.heldout), about | _roles(rows) | _characters(plan.heldout))
        train.finish(len(plan.train), about | _characters(plan.train))


def matplotlib_fonts() -> str:
    """The folder of the fonts that matplotlib ships (DejaVu and STIX)."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf")


def open_typefaces(folder: str, side: int) -> dict[str, Typeface]:
    """The usable fonts of a folder by file name, sorted; a damaged one is left out with a warning.

    Raises:
        UserError: there is none.
    """
    typefaces: dict[str, Typeface] = {}
    for path in sorted(Path(folder).glob("*")):
        if path.stem in {Path(name).stem for name in typefaces}:
            log.warning("%s: another file has this name already; left out", path)
        elif path.suffix.lower() in _FONT_FILES:
            try:
                typefaces[path.name] = Typeface(path, side)
            except Unusable as error:
                log.warning("%s; left out", error)
    if not typefaces:
        raise UserError(f"data.glyphs.fonts={folder}: no font file ({', '.join(_FONT_FILES)}) here")
    return typefaces


class _Count:
    """Tells the progress callback how many pictures are done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, pictures: int) -> None:
        self.done += pictures
        self.progress(self.done, self.total)


def survey(faces: list[Typeface], drawn: Callable[[int], None]) -> dict[Glyph, bytes]:
    """Draw every character of every typeface; the fingerprints of those that are not blank.

    Args:
        faces: the typefaces.
        drawn: called after each of them with the number of its characters.
    """
    found = {}
    for face in faces:
        broken = 0
        for code in face.codes:
            try:
                picture = face.draw(code)
            except OSError:
                broken += 1
                continue
            if picture is not None:
                found[Glyph(code, face.name)] = blake2b(picture.tobytes(), digest_size=16).digest()
        if broken:
            log.warning("%s: FreeType cannot draw %d glyphs; left out", face.name, broken)
        drawn(len(face.codes))
    return found


def _rows(classes: list[list[Glyph]], first: str, others: str) -> list[Row]:
    """All glyphs class by class, with the role of a class's first one and of its others."""
    return [
        Row(label, glyph, others if number else first)
        for label, glyphs in enumerate(classes)
        for number, glyph in enumerate(glyphs)
    ]


def _write(
    writer: ShardWriter, rows: list[Row], typefaces: dict[str, Typeface], count: _Count
) -> None:
    """Write rows in their order, as shards of equal size."""
    shards = -(-len(rows) // _SHARD)
    for number in range(shards):
        part = rows[number * len(rows) // shards : (number + 1) * len(rows) // shards]
        writer.write(_sample(row, typefaces[row.glyph.font]) for row in part)
        count.add(len(part))


def _sample(row: Row, face: Typeface) -> Sample:
    """White ink on black, as a grey JPEG: black is also what augmentation fills with."""
    glyph = row.glyph
    picture = face.draw(glyph.code)
    if picture is None:
        raise RunError(f"{glyph.key}: drew ink the first time and nothing the second time")
    image = simplejpeg.encode_jpeg(picture[:, :, None], quality=_QUALITY, colorspace="GRAY")
    about = {"codepoint": glyph.code, "font": glyph.font, "role": row.role}
    members = {"jpg": image, "cls": str(row.label).encode(), "json": json.dumps(about).encode()}
    return Sample(glyph.key, members)


def _roles(rows: list[Row]) -> dict[str, Any]:
    """For the index of the held-out set: who is enrolled, and which typeface a sample is in.

    `gallery`: numbers of the enrolment samples, by class; all others are probes. `fonts` and
    `font`: names of the typefaces, and for each sample which one, so that an identification
    inside the unseen typefaces can be made as well.
    """
    fonts = sorted({row.glyph.font for row in rows})
    return {
        "gallery": [number for number, row in enumerate(rows) if row.role == "gallery"],
        "fonts": fonts,
        "font": [fonts.index(row.glyph.font) for row in rows],
    }


def _characters(classes: list[list[Glyph]]) -> dict[str, Any]:
    """For the index: the code points of each class."""
    codes = (sorted({glyph.code for glyph in glyphs}) for glyphs in classes)
    return {"classes": [" ".join(f"U+{code:04X}" for code in merged) for merged in codes]}


def _recorded(settings: GlyphsConfig) -> dict[str, Any]:
    """The settings that shape the data; where the fonts lay does not."""
    return settings.model_dump(exclude={"fonts"})


def _refuse_other_settings(shards: str, settings: GlyphsConfig) -> None:
    """Old shards must not pass for what the config asks for now."""
    made = ShardIndex.load(shards).meta.get("settings")
    if made is None:
        return
    for key, value in _recorded(settings).items():
        if made.get(key) != value:
            raise UserError(
                f"data.glyphs.{key}={value}: the glyphs in {shards} were made with "
                f"{made.get(key)}; delete that folder or choose another data.shards"
            )
