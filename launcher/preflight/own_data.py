"""What a user has: shards, a folder of images, RecordIO, tars or a table; how much, how large."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from mhe_dist.errors import UserError
from pipelines.shards.index import UNLABELLED, ShardIndex, index_exists
from pipelines.storage.urls import list_folder, resolve_url

HELDOUT_SHARE: Final = 10  # one class of so many is held out
MOST_HELDOUT: Final = 1000  # classes; more would not make a figure surer
_FEWEST_CLASSES: Final = 20  # of a set of which some are held out
_LOOKED_AT: Final = 32  # images whose size is looked up
SHARDS, FOLDER, TABLE = "shards", "a folder of images", "a table of images"
_TABLES: Final = (".csv", ".tsv", ".parquet")


class OwnData(NamedTuple):
    """What there is to train on.

    Attributes:
        kind: what it is, in words.
        classes: C of the training; without those held out.
        images: for training; 0: not known before they are read.
        side: usual shorter side of an image in pixels; 0: unknown.
        shards: where the training shards are, or will be.
        heldout: the same for held-out ones; empty: there are none.
        command: words of the command that makes the shards, or `labels`; none: they are there.
        same_classes: whether the held-out images are of the training's classes.
        labels: label set that clustering will make of images in no class; empty: they have classes.
    """

    kind: str
    classes: int
    images: int
    side: int
    shards: str
    heldout: str = ""
    command: Sequence[str] = ()
    same_classes: bool = False
    labels: str = ""


_WANTED = (
    "give mhe init a folder with one folder of images per class, a table of path and class (CSV, "
    "Parquet), RecordIO, tars, or shards"
)


def survey_data(source: str, root: str = "", classes: int = 0) -> OwnData:
    """Find out what `source` is.

    Args:
        source: folder of shards, or of two such folders `train` and `heldout`; folder of images
            with a folder for each class; a `.rec` file or its folder; tars or their folder; a CSV
            or Parquet table of path and class.
        root: of a table: the folder that its paths are below; empty: the table's own.
        classes: number of classes, where the source does not say it.

    Raises:
        UserError: it is none of these, the number of classes is not known, or an argument is given
            that it has no use for.
    """
    _, path = resolve_url(source)
    if not path.strip("/"):
        raise UserError(f"{source}: is the root of a disk or store; {_WANTED}")
    found = _find_data(source.rstrip("/"), root, classes)
    if root and found.kind != TABLE:
        raise UserError(
            f"--root {root}: a table's paths may lie below another folder, and {source} is "
            f"{found.kind}; leave it out"
        )
    if classes and found.kind in (SHARDS, FOLDER, TABLE):
        raise UserError(
            f"--classes {classes}: {source} says its classes itself, {found.classes:,} to train "
            "on; leave it out"
        )
    if "$" in found.shards:
        raise UserError(
            f"{found.shards}: in a config $ begins a variable; give the folder another "
            "name, or give a symbolic link to it"
        )
    return found


def _find_data(source: str, root: str, classes: int) -> OwnData:
    if index_exists(source):
        return _from_shards(source, "", classes)
    if index_exists(f"{source}/train"):
        heldout = f"{source}/heldout"
        return _from_shards(f"{source}/train", heldout if index_exists(heldout) else "", classes)
    if source.lower().endswith(_TABLES):
        return _from_table(source, root or _parent(source))
    files = [path.rpartition("/")[2] for path in list_folder(source)]
    record = next((name for name in files if name.endswith(".rec")), "")
    if source.endswith(".rec") or record:
        return _from_records(source if source.endswith(".rec") else f"{source}/{record}", classes)
    if source.endswith(".tar") or any(name.endswith(".tar") for name in files):
        return _from_tars(source, classes)
    return _from_folder(source)


def make_name(source: str) -> str:
    """A name for a run and its files, from the last part of a path or URL."""
    parts = [part for part in source.rstrip("/").split("/") if part not in (".", "..")]
    if len(parts) > 1 and (parts[-1] == "train" or Path(parts[-1]).suffix in (".rec", ".tar")):
        parts.pop()
    stem = re.sub(r"\.\w+$", "", parts[-1]) if parts else ""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-") or "run"


def _from_shards(shards: str, heldout: str, classes: int) -> OwnData:
    index = ShardIndex.load(shards)
    side = _usual_side(_images_of_shards(index))
    if not index.meta.get(UNLABELLED):
        same = bool(index.meta.get("split", {}).get("images"))  # of `mhe data folder`
        return OwnData(SHARDS, index.num_classes, index.samples, side, shards, heldout, (), same)
    if not classes:
        raise UserError(
            f"{shards}: its images are in no class (mhe data folder --no-classes); say with "
            "--classes N how many mhe cluster shall make of them"
        )
    labels = f"{shards}-1"
    command = ["mhe", "cluster", shards, "--classes", str(classes), "--out", labels]
    kind = "shards without classes"
    return OwnData(kind, classes, index.samples, side, shards, "", command, labels=labels)


def _from_folder(root: str) -> OwnData:
    from pipelines.sources.image_folder import has_image_extension
    from pipelines.storage.file_listing import list_files

    filesystem, path = resolve_url(root)
    if filesystem.isfile(path):
        raise UserError(f"{root}: is a file of no kind that mhe init knows; {_WANTED}")
    found = sorted(path for path, _ in list_files(root) if has_image_extension(path))
    inside = [path for path in found if "/" in path]
    if not inside:
        what = f"its {len(found):,} images lie in no class folder" if found else "holds no image"
        raise UserError(f"{root}: {what}; {_WANTED}{_without_classes(root) if found else ''}")
    counts = Counter(path.partition("/")[0] for path in inside)
    side = _usual_side(_images_of_files(root, inside))
    return _converted(FOLDER, root, ["--root", root], counts, side)


def _without_classes(root: str) -> str:
    """What to do where the images of a folder have no classes."""
    from launcher.terminal.commands import command_line

    out = f"data/{make_name(root)}"
    folder = command_line(["mhe", "data", "folder", "--root", root, "--no-classes", "--out", out])
    init = command_line(["mhe", "init", out, "--classes", "N"])
    return f". Images without classes are clustered: {folder}, then {init}"


def _from_table(table: str, root: str) -> OwnData:
    from pipelines.sources.image_table import read_image_table

    rows = [row for row in read_image_table(table) if not row.problem]
    if not rows:
        raise UserError(f"{table}: no row names a path and a class")
    side = _usual_side(_images_of_files(root, [row.path for row in rows]))
    words = ["--root", root, "--table", table]
    return _converted(TABLE, table, words, Counter(row.label for row in rows), side)


def _converted(
    kind: str, source: str, words: list[str], counts: Counter[str], side: int
) -> OwnData:
    """Images that `mhe data folder` makes shards of; some classes are held out if that can be."""
    if len(counts) < 2:
        raise UserError(
            f"{source}: its images are all of one class, {next(iter(counts))!r}, and a classifier "
            f"needs two; {_WANTED}{_without_classes(source) if kind == FOLDER else ''}"
        )
    out = f"data/{make_name(source)}"
    command = ["mhe", "data", "folder", *words, "--out", out]
    able = sum(count >= 2 for count in counts.values())
    held = min(len(counts) // HELDOUT_SHARE, MOST_HELDOUT, able)
    images = counts.total()
    if len(counts) < _FEWEST_CLASSES or not held:
        return OwnData(kind, len(counts), images, side, out, "", command)
    left = images - round(images * held / len(counts))
    command += ["--heldout-classes", str(held)]
    return OwnData(kind, len(counts) - held, left, side, f"{out}/train", f"{out}/heldout", command)


def _from_records(rec: str, classes: int) -> OwnData:
    folder, out = _parent(rec), f"data/{make_name(rec)}"
    side = 0
    with suppress(OSError):
        numbers = re.findall(rb"\d+", _read(f"{folder}/property")[:100])
        if len(numbers) == 3:
            classes, side = classes or int(numbers[0]), int(numbers[1])
    command = ["mhe", "data", "recordio", "--rec", rec, "--out", out]
    _require_classes(rec, classes, f"{folder}/property, which would say it, is missing", command)
    images = 0
    with suppress(OSError):
        lines = _read(f"{rec.removesuffix('.rec')}.idx").splitlines()
        images = max(0, len(lines) - classes - 1)
    return OwnData("RecordIO", classes, images, side, out, "", command)


def _from_tars(source: str, classes: int) -> OwnData:
    shards = source if not source.endswith(".tar") else f"data/{make_name(source)}"
    command = ["mhe", "data", "index", source]
    command += ["--out", shards] if source.endswith(".tar") else []
    _require_classes(source, classes, "only reading the tars can tell", command)
    return OwnData("tars", classes, 0, 0, shards, "", command)


def _require_classes(source: str, classes: int, why: str, command: Sequence[str]) -> None:
    from launcher.terminal.commands import command_line

    if not classes:
        raise UserError(
            f"{source}: the number of classes is not known ({why}). Say it with --classes, or make "
            f"the shards first, with {command_line(command)}, and give mhe init their folder"
        )


def _parent(url: str) -> str:
    """The folder of a file."""
    folder, slash, _ = url.rpartition("/")
    return folder or slash or "."


def _read(url: str) -> bytes:
    filesystem, path = resolve_url(url)
    return bytes(filesystem.cat_file(path))


def _images_of_files(root: str, paths: Sequence[str]) -> Iterator[bytes]:
    """Some of the files, from all over the list."""
    filesystem, top = resolve_url(root)
    for path in paths[:: max(1, len(paths) // _LOOKED_AT)][:_LOOKED_AT]:
        with suppress(OSError):
            yield bytes(filesystem.cat_file(path if path.startswith("/") else f"{top}/{path}"))


def _images_of_shards(index: ShardIndex) -> Iterator[bytes]:
    """The first samples of the first shard that has any."""
    from pipelines.data.order import ShardSpan
    from pipelines.data.sample import BadSampleError, extract_sample, read_span

    number = next((n for n, shard in enumerate(index.shards) if shard.samples), None)
    if number is None:
        return
    span = ShardSpan(number, 0, min(_LOOKED_AT, index.shards[number].samples))
    for position, raw in enumerate(read_span(index, span)):
        with suppress(BadSampleError):
            entry = index.entry(number, position)
            yield extract_sample(raw, len(raw), index.num_classes, entry).data


def _usual_side(images: Iterable[bytes]) -> int:
    """Median of the shorter sides, in pixels; 0: no image could be read."""
    from PIL import Image

    sides = []
    for data in images:
        with suppress(Exception), Image.open(io.BytesIO(data)) as image:
            sides.append(min(image.size))
    return round(median(sides)) if sides else 0
