"""A folder of image files to shards: one folder per class, or an `.lst` file that says the classes.

`.lst` files have two dialects, told apart line by line: `number, label, path` (mxnet's im2rec; more
labels may stand before the path) and `aligned, path, label` (InsightFace). Fields are separated by
tabs. What the files hold is copied as it is.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import numpy as np

from mhe_dist.errors import RunError, UserError
from pipelines.shards.image_format import EXTENSIONS, extension_of
from pipelines.shards.index import Fault
from pipelines.shards.writer import Sample
from pipelines.sources import convert
from pipelines.sources.convert import DEFAULTS, Converted, Found, Ints, Options
from pipelines.storage import urls
from pipelines.storage.staging import refuse_existing
from pipelines.storage.worker_pool import Progress, ignore

FILES: Final = "files.tsv"
_AT_ONCE: Final = 64  # files that a store is asked for together
_UNKNOWN_SIZE: Final = 1 << 16
_NUMBER: Final = re.compile(r"[+-]?\d{1,18}(\.\d*)?([eE][+-]?\d+)?")
_MOST_CLASSES: Final = 1 << 62


class File(NamedTuple):
    """An image file: its path below the root, what its class is called, and its bytes."""

    path: str
    label: str
    size: int


def import_folder(
    root: str,
    out: str,
    lst: str | None = None,
    options: Options = DEFAULTS,
    writing: Progress = ignore,
) -> Converted:
    """Convert a folder of images.

    Args:
        root: folder or URL; without `lst` the folders in it are the classes, with all that is
            below them.
        out: folder or URL for the shards, which must not exist.
        lst: path or URL of a list of files below `root` with their labels.
        options: of writing.
        writing: called with the finished tars and their number.

    Raises:
        UserError: nothing to read, or an output that exists.
        RunError: more bad files than the options allow.
    """
    refuse_existing(out)
    root = root.rstrip("/")
    faults: list[Fault] = []
    warnings: list[str] = []
    if lst is None:
        files = sorted(_by_folder(below(root), warnings))
    else:
        files = list(_by_list(root, lst, faults))
    names, classes = _classes(files, numeric=lst is not None)
    sizes = np.array([file.size for file in files], np.int64)
    paths = [file.path for file in files]

    def task(chosen: Ints) -> _Task:
        mine = [paths[number] for number in chosen.tolist()]
        return _Task(root, mine, chosen, classes[chosen])

    found = Found(names, classes, sizes, faults, warnings)
    about = {"source": "folder", "from": root, "lst": lst, "files": convert.digest_of(paths)}
    keys = ((key_of(number), path) for number, path in enumerate(paths))
    table = {FILES: (["key", "path"], keys)}
    return convert.write(out, found, _samples, task, about, [], options, writing, table)


def key_of(number: int) -> str:
    """Key of the sample of the n-th file (line n + 2 of `files.tsv`)."""
    return f"{number:09d}"


def _classes(files: list[File], numeric: bool) -> tuple[list[str], Ints]:
    """Names of the classes, sorted, and the class of each file."""
    labels = {file.label for file in files}
    names = sorted(labels, key=int) if numeric else sorted(labels)
    number = {name: n for n, name in enumerate(names)}
    return names, np.array([number[file.label] for file in files], np.int64)


def below(root: str) -> Iterator[tuple[str, int]]:
    """Path below `root` and size of every file there; hidden ones are left out."""
    filesystem, path = urls.find(root)
    if _is_web(filesystem):
        raise UserError(f"{root}: a web server does not list its folders; name the files by --lst")
    if not filesystem.isdir(path):
        raise UserError(f"{root}: no such folder")
    if urls.is_local(filesystem):
        yield from _below_local(path)
        return
    for name, info in filesystem.find(path, detail=True).items():
        inside = name[len(path) :].lstrip("/")
        if not any(part.startswith(".") for part in inside.split("/")):
            yield inside, int(info["size"] or 0)


def _below_local(root: str) -> Iterator[tuple[str, int]]:
    """The same for a local folder; links are followed, each folder is entered once."""
    entered: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            below.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            place = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(place):
                yield os.path.relpath(place, root), os.path.getsize(place)


def _by_folder(found: Iterable[tuple[str, int]], warnings: list[str]) -> Iterator[File]:
    """The images that are in a class."""
    outside = other = 0
    for path, size in found:
        name, _, rest = path.partition("/")
        if not is_image(path):
            other += 1
        elif not rest:
            outside += 1
        else:
            yield File(path, name, size)
    if outside:
        warnings.append(f"{outside:,} images are in no class folder; left out")
    if other:
        warnings.append(f"{other:,} files do not end like an image; left out")


def is_image(path: str) -> bool:
    """Whether a file is called like an image."""
    return path.rpartition(".")[2].lower() in EXTENSIONS


def _by_list(root: str, lst: str, faults: list[Fault]) -> Iterator[File]:
    """The files of a list that are there."""
    filesystem, top = urls.find(root)
    listed = None if _is_web(filesystem) or urls.is_local(filesystem) else dict(below(root))
    with urls.Reader(lst) as reader:
        lines = reader.read(0, reader.size).decode(errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, name = parse_line(line.rstrip("\r"))
            path = inside(name, top)
            if _is_web(filesystem):
                size = _UNKNOWN_SIZE
            elif listed is None:
                size = os.stat(f"{top}/{path}").st_size
            elif path in listed:
                size = listed[path]
            else:
                raise ValueError(f"{name}: no such file")
        except (ValueError, OSError) as error:
            faults.append(Fault(f"{lst} line {number}", str(error)))
            continue
        yield File(path, str(label), size)


def parse_line(line: str) -> tuple[int, str]:
    """Label and path of a line in either dialect.

    Raises:
        ValueError: it is of neither, or its label is no class.
    """
    fields = line.split("\t")
    if len(fields) >= 3 and _NUMBER.fullmatch(fields[0]):
        second, last = (bool(_NUMBER.fullmatch(field)) for field in (fields[1], fields[-1]))
        if second and not last:
            return _label(fields[1]), fields[-1]
        if not second and _NUMBER.fullmatch(fields[2]) and fields[0] in ("0", "1"):
            return _label(fields[2]), fields[1]
    raise ValueError(
        f"{line[:60]!r} is neither number, label, path nor aligned, path, label (with tabs)"
    )


def _label(text: str) -> int:
    """A class; whole numbers are read exactly, however large."""
    value = Decimal(text)
    if not 0 <= value < _MOST_CLASSES or value != int(value):
        raise ValueError(f"label {text} is no class")
    return int(value)


def inside(name: str, root: str) -> str:
    """A path of a list as a path below `root`.

    Raises:
        ValueError: it would leave the folder.
    """
    path = posixpath.normpath(name)
    if path.startswith("/"):
        path = posixpath.relpath(path, posixpath.normpath(root))
    if path in (".", "..") or path.startswith("../") or "\0" in path:
        raise ValueError(f"{name[:80]!r} leaves the folder")
    return path


class _Task(NamedTuple):
    """Files that go into one tar, with their numbers and classes."""

    root: str
    paths: list[str]
    numbers: Ints
    classes: Ints


def _samples(task: _Task) -> Iterator[Sample | Fault]:
    for path, number, label, data in zip(
        task.paths, task.numbers.tolist(), task.classes.tolist(), _contents(task), strict=True
    ):
        place = f"{task.root}/{path}"
        if not isinstance(data, bytes):
            yield Fault(place, f"cannot be read ({data})")
        elif (extension := extension_of(data)) is None:
            yield Fault(place, f"no image of a known format (it begins with {data[:8]!r})")
        else:
            yield Sample(key_of(number), {extension: data, "cls": str(label).encode()})


def _contents(task: _Task) -> Iterator[bytes | OSError]:
    """The content of each file, or why there is none."""
    filesystem, root = urls.find(task.root)
    for first in range(0, len(task.paths), _AT_ONCE):
        paths = task.paths[first : first + _AT_ONCE]
        places = [f"{root}/{quote(path) if _is_web(filesystem) else path}" for path in paths]
        if urls.is_local(filesystem):
            yield from map(_read, places)
            continue
        whole: list[None] = [None] * len(places)
        found = filesystem.cat_ranges(places, whole, whole, on_error="return")
        for place, data in zip(places, found, strict=True):
            if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                raise RunError(f"{task.root}: {place} cannot be read ({data})") from data
            yield data


def _read(place: str) -> bytes | OSError:
    try:
        with open(place, "rb") as stream:
            return stream.read()
    except OSError as error:
        return error


def _is_web(filesystem: Any) -> bool:
    return "http" in urls.protocols(filesystem)
