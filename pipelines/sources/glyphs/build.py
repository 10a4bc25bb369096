"""Glyphs as identities: a class is a Unicode code point, its images are that character in the
typefaces of a folder of fonts.

It is a real many-class data set that needs no download, because matplotlib ships its fonts. Code
points that look the same in any font are one class (Latin A, Greek Alpha), so no picture stands
under two classes. Held out are whole classes and whole typefaces: a probe is a character that
training never saw in a typeface that training never saw.
"""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np

from mhe_dist.config.data import HELDOUT, KNOWN, TRAIN, DataConfig, GlyphsConfig
from mhe_dist.errors import UserError
from mhe_dist.seeds import generator
from pipelines.data.order import stable_permutation
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.shards.tables import CLASSES_FILE, class_table, write_table
from pipelines.shards.writer import ShardWriter
from pipelines.sources.convert import Ints, TarTasks
from pipelines.sources.glyphs.draw import (
    DrawTask,
    FontFace,
    GlyphSample,
    SurveyTask,
    draw_samples,
    survey_typeface,
    unpack_fingerprints,
)
from pipelines.sources.glyphs.fonts import FontFile, find_fonts
from pipelines.sources.glyphs.plan import Glyph, GlyphPlan, plan_classes, split_fonts
from pipelines.sources.glyphs.typeface import Typeface, UnusableFontError, open_faces
from pipelines.storage.full_disk import explain_full_disk
from pipelines.storage.staging import Journal, require_absent_or_resumable
from pipelines.storage.worker_pool import HERE, LazyTasks, Progress, Workers, no_progress, run_tasks

_JOURNAL: Final = ".glyphs.partial"
_SHARD: Final = 1000  # least samples per tar, about 3 MB at 32 pixels
_SHARDS: Final = 256  # tars of a set so large that they hold more than that

log = logging.getLogger(__name__)


def ensure_glyphs(
    data: DataConfig, progress: Progress = no_progress, workers: Workers = HERE
) -> bool:
    """Make the glyph data set of `data.glyphs` if its shards are missing.

    Returns:
        whether anything was made.

    Raises:
        UserError: `data.shards` does not name a `train` folder, or holds glyphs that were made
            with other settings.
    """
    settings, shards = data.glyphs, data.shards.rstrip("/")
    if settings is None:
        return False
    if index_exists(shards):
        _refuse_other_settings(shards, settings)
        return False
    root, _, name = shards.rpartition("/")
    if name != TRAIN:
        raise UserError(
            f"data.shards={shards}: with data.glyphs it must be a folder named {TRAIN!r}; the "
            f"held-out set is written beside it as {HELDOUT!r}"
        )
    write_glyphs(settings.fonts, root or ".", settings, progress, workers)
    return True


def write_glyphs(
    fonts: str,
    out: str,
    settings: GlyphsConfig,
    progress: Progress = no_progress,
    workers: Workers = HERE,
) -> None:
    """Render the fonts of a folder into `out/train`, `out/heldout` and, if asked, `out/known`.

    The result depends on the fonts and the settings alone. The training samples are shuffled
    globally; the others lie class by class, in the held-out set the enrolment image first. An
    interrupted call goes on when it is repeated.

    Args:
        fonts: folder of font files, also in folders below; empty: those that matplotlib ships.
        out: folder for the data sets; none of them may exist.
        settings: see `GlyphsConfig`; its `fonts` is not used.
        progress: called with the pictures drawn and the number in all; two passes over them.
        workers: who draws.

    Raises:
        UserError: no fonts, a target that exists, or too few classes for the settings.
    """
    for name in settings.set_names:
        require_absent_or_resumable(f"{out}/{name}")
    files = find_fonts(fonts or matplotlib_fonts())
    typefaces = open_typefaces(files)
    known, unseen = split_fonts(list(typefaces.values()), settings)
    faces = [typefaces[name] for name in (*known, *unseen)]
    drawing = _GlyphDrawing(files, faces, settings.image_size, workers, progress)
    digests = [[file.name, file.digest] for file in files]
    journal = Journal(f"{out}/{_JOURNAL}", [digests, settings.image_size])
    plan = plan_classes(drawing.survey(journal), known, unseen, settings)
    drawing.set_remaining(plan.samples)
    about = {
        "source": "glyphs",
        "settings": _recorded(settings),
        "train_fonts": known,
        "heldout_fonts": unseen,
    }
    _write(out, plan, drawing, about, about | {"fonts": digests})
    journal.remove()


def _write(
    out: str, plan: GlyphPlan, drawing: _GlyphDrawing, about: dict[str, Any], recipe: dict[str, Any]
) -> None:
    """Write the sets; they appear together, the training set last: `ensure_glyphs` looks for it."""
    sets = {HELDOUT: plan.heldout, KNOWN: plan.known, TRAIN: plan.train}
    with ExitStack() as stack:
        finished = []
        for name, classes in sets.items():
            if not classes:
                continue
            writer = stack.enter_context(ShardWriter(f"{out}/{name}", name, recipe))
            rows = _GlyphSamples(name, classes)
            order = np.arange(len(rows.glyphs))
            if name == TRAIN:
                order = stable_permutation(len(order), generator(0, "glyphs/shuffle"))
            with explain_full_disk(f"{out}/{name}", writer.folder, drawing.size(rows)):
                drawing.write(writer, rows, order)
                _write_classes(writer, plan.train if name == KNOWN else classes)
            roles = _roles(rows) if name == HELDOUT else {}
            finished.append((writer, len(classes), roles))
        for writer, count, roles in finished:
            writer.finish(count, about | roles | {"class_names": CLASSES_FILE})


def matplotlib_fonts() -> str:
    """The folder of the fonts that matplotlib ships (DejaVu and STIX)."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf")


def open_typefaces(files: Sequence[FontFile]) -> dict[str, Typeface]:
    """The usable typefaces of font files by name; a damaged file is left out with a warning.

    Raises:
        UserError: there is none.
    """
    typefaces: dict[str, Typeface] = {}
    for file in files:
        try:
            faces = open_faces(Path(file.path), file.name)
        except UnusableFontError as error:
            log.warning("%s; left out", error)
            continue
        typefaces |= {face.name: face for face in faces}
    if not typefaces:
        raise UserError(f"data.glyphs.fonts: none of {len(files)} font files can be used")
    return typefaces


class _GlyphSamples:
    """The samples of a set, class by class.

    Attributes:
        glyphs: what each of them shows.
        firsts: int64 `[C]`, number of the first sample of each class.
    """

    def __init__(self, name: str, classes: list[list[Glyph]]) -> None:
        sizes = [len(glyphs) for glyphs in classes]
        self.glyphs = [glyph for glyphs in classes for glyph in glyphs]
        self.firsts: Ints = np.cumsum([0, *sizes])[:-1].astype(np.int64)
        self._labels = np.repeat(np.arange(len(classes)), sizes)
        self._name = name

    def row(self, number: int) -> GlyphSample:
        """A sample; its role is `train`, `gallery` (the first of a held-out class) or `probe`."""
        glyph, label = self.glyphs[number], int(self._labels[number])
        role = "train" if self._name == TRAIN else "probe"
        if self._name == HELDOUT and self.firsts[label] == number:
            role = "gallery"
        return GlyphSample(label, glyph.key, glyph.code, glyph.font, role)


class _GlyphDrawing:
    """Draws with all workers: first every character of every typeface, then the samples."""

    def __init__(
        self,
        files: Sequence[FontFile],
        typefaces: Sequence[Typeface],
        side: int,
        workers: Workers,
        progress: Progress,
    ) -> None:
        paths = {file.name: file.path for file in files}
        self._codes = {typeface.name: typeface.codes for typeface in typefaces}
        self._side = side
        self._faces = {}
        for typeface in typefaces:
            name, _, number = typeface.name.partition("#")
            self._faces[typeface.name] = FontFace(
                paths[name], side, int(number or 0), typeface.capital
            )
        self._workers, self._progress = workers, progress
        self._done, self._total = 0, 2 * sum(map(len, self._codes.values()))

    def size(self, rows: _GlyphSamples) -> int:
        """Bytes of the tars of these samples, about: JPEG of a byte a pixel, two small members."""
        return len(rows.glyphs) * (5 * tarfile.BLOCKSIZE + self._side**2)

    def set_remaining(self, pictures: int) -> None:
        """Set how many pictures are still to be drawn."""
        self._total = self._done + pictures

    def _count(self, pictures: int) -> None:
        self._done += pictures
        self._progress(self._done, self._total)

    def survey(self, journal: Journal) -> dict[Glyph, bytes]:
        """Fingerprint of every picture that is not blank."""
        names = list(self._faces)
        tasks = LazyTasks(
            len(names), lambda n: SurveyTask(self._faces[names[n]], self._codes[names[n]])
        )

        def _finished(number: int) -> dict[str, Any] | None:
            kept: dict[str, Any] | None = journal.get(number)
            if kept is not None:
                self._count(len(self._codes[names[number]]))
            return kept

        def _record(number: int, result: dict[str, Any]) -> None:
            journal.record(number, result)
            if result["broken"]:
                log.warning("%s: FreeType cannot draw %d glyphs", names[number], result["broken"])
            self._count(len(self._codes[names[number]]))

        results = run_tasks(survey_typeface, tasks, self._workers, _finished, _record)
        return {
            Glyph(code, name): fingerprint
            for number, name in enumerate(names)
            for code, fingerprint in unpack_fingerprints(results[number])
        }

    def write(self, writer: ShardWriter, rows: _GlyphSamples, order: Ints) -> None:
        """Write samples in an order, as shards of equal size."""
        total = len(order)
        shards = -(-total // max(_SHARD, -(-total // _SHARDS)))
        bounds = np.arange(shards + 1) * total // shards
        tars = TarTasks(order, bounds, partial(self._tar, rows))
        before = self._done

        def progress(done: int, _: int) -> None:
            self._count(before + int(bounds[done]) - self._done)

        writer.write_all(draw_samples, tars, self._workers, progress)

    def _tar(self, rows: _GlyphSamples, chosen: Ints) -> DrawTask:
        """The task for a process that draws some samples."""
        made = [rows.row(number) for number in chosen.tolist()]
        return DrawTask(made, {row.font: self._faces[row.font] for row in made})


def _write_classes(writer: ShardWriter, classes: list[list[Glyph]]) -> None:
    """The code points of each class, as its name."""
    codes = (sorted({glyph.code for glyph in glyphs}) for glyphs in classes)
    names = [" ".join(f"U+{code:04X}" for code in merged) for merged in codes]
    write_table(f"{writer.folder}/{CLASSES_FILE}", class_table(names, writer.shards))


def _roles(rows: _GlyphSamples) -> dict[str, Any]:
    """For the index of the held-out set: who is enrolled, and which typeface a sample is in.

    `gallery`: numbers of the enrolment samples, by class; all others are probes. `fonts` and
    `font`: names of the typefaces, and for each sample which one, so that an identification
    inside the unseen typefaces can be made as well.
    """
    fonts = sorted({glyph.font for glyph in rows.glyphs})
    number = {font: n for n, font in enumerate(fonts)}
    return {
        "gallery": rows.firsts.tolist(),
        "fonts": fonts,
        "font": [number[glyph.font] for glyph in rows.glyphs],
    }


def _recorded(settings: GlyphsConfig) -> dict[str, Any]:
    """The settings that shape the data; where the fonts lay does not."""
    return settings.model_dump(exclude={"fonts"})


def _refuse_other_settings(shards: str, settings: GlyphsConfig) -> None:
    """Raise UserError if the shards were made with other settings than the config's."""
    made = ShardIndex.load(shards).meta.get("settings")
    if made is None:
        return
    for key, value in _recorded(settings).items():
        before = made.get(key, GlyphsConfig.model_fields[key].default)
        if before != value:
            raise UserError(
                f"data.glyphs.{key}={value}: the glyphs in {shards} were made with {before}; "
                f"delete that folder or choose another data.shards"
            )
