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
from pipelines.shards.image_format import IMAGE_EXTENSIONS, image_extension
from pipelines.shards.index import Fault
from pipelines.shards.writer import Sample
from pipelines.sources.convert import (
    DEFAULT_OPTIONS,
    FoundSamples,
    ImportOptions,
    ImportResult,
    Ints,
    digest_texts,
    write_dataset,
)
from pipelines.storage.staging import require_absent_or_resumable
from pipelines.storage.urls import RangeReader, is_local, protocol_names, resolve_url
from pipelines.storage.worker_pool import Progress, no_progress

FILES_TABLE: Final = "files.tsv"
_FILES_PER_REQUEST: Final = 64  # files that a store is asked for together
_UNKNOWN_SIZE: Final = 1 << 16
_NUMBER: Final = re.compile(r"[+-]?\d{1,18}(\.\d*)?([eE][+-]?\d+)?")
_MAX_CLASSES: Final = 1 << 62


class ImageFile(NamedTuple):
    """An image file: its path below the root, what its class is called, and its bytes."""

    path: str
    label: str
    size: int


def import_folder(
    root: str,
    out: str,
    lst: str | None = None,
    options: ImportOptions = DEFAULT_OPTIONS,
    writing: Progress = no_progress,
) -> ImportResult:
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
    require_absent_or_resumable(out)
    root = root.rstrip("/")
    faults: list[Fault] = []
    warnings: list[str] = []
    if lst is None:
        files = sorted(_by_folder(list_files(root), warnings))
    else:
        files = list(_by_list(root, lst, faults))
    names, classes = _classes(files, numeric=lst is not None)
    sizes = np.array([file.size for file in files], np.int64)
    paths = [file.path for file in files]

    def task(chosen: Ints) -> _FileTask:
        mine = [paths[number] for number in chosen.tolist()]
        return _FileTask(root, mine, chosen, classes[chosen])

    found = FoundSamples(names, classes, sizes, faults, warnings)
    about = {"source": "folder", "from": root, "lst": lst, "files": digest_texts(paths)}
    keys = ((sample_key(number), path) for number, path in enumerate(paths))
    table = {FILES_TABLE: (["key", "path"], keys)}
    return write_dataset(out, found, _samples, task, about, [], options, writing, table)


def sample_key(number: int) -> str:
    """Key of the sample of the n-th file (line n + 2 of `files.tsv`)."""
    return f"{number:09d}"


def _classes(files: list[ImageFile], numeric: bool) -> tuple[list[str], Ints]:
    """Names of the classes, sorted, and the class of each file."""
    labels = {file.label for file in files}
    names = sorted(labels, key=int) if numeric else sorted(labels)
    number = {name: n for n, name in enumerate(names)}
    return names, np.array([number[file.label] for file in files], np.int64)


def list_files(root: str) -> Iterator[tuple[str, int]]:
    """Path below `root` and size of every file there; hidden ones are left out."""
    filesystem, path = resolve_url(root)
    if _is_web(filesystem):
        raise UserError(f"{root}: a web server does not list its folders; name the files by --lst")
    if not filesystem.isdir(path):
        raise UserError(f"{root}: no such folder")
    if is_local(filesystem):
        yield from _list_local_files(path)
        return
    for name, info in filesystem.find(path, detail=True).items():
        inside = name[len(path) :].lstrip("/")
        if not any(part.startswith(".") for part in inside.split("/")):
            yield inside, int(info["size"] or 0)


def _list_local_files(root: str) -> Iterator[tuple[str, int]]:
    """See `list_files`; links are followed, and each folder is entered once."""
    entered: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            below.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield os.path.relpath(path, root), os.path.getsize(path)


def _by_folder(found: Iterable[tuple[str, int]], warnings: list[str]) -> Iterator[ImageFile]:
    """The images that lie in a class folder; the others are counted in `warnings`."""
    outside = other = 0
    for path, size in found:
        name, _, rest = path.partition("/")
        if not has_image_extension(path):
            other += 1
        elif not rest:
            outside += 1
        else:
            yield ImageFile(path, name, size)
    if outside:
        warnings.append(f"{outside:,} images are in no class folder; left out")
    if other:
        warnings.append(f"{other:,} files do not end like an image; left out")


def has_image_extension(path: str) -> bool:
    """Whether a file name ends like that of an image."""
    return path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _by_list(root: str, lst: str, faults: list[Fault]) -> Iterator[ImageFile]:
    """The files of a list that exist; the others are added to `faults`."""
    filesystem, top = resolve_url(root)
    listed = None if _is_web(filesystem) or is_local(filesystem) else dict(list_files(root))
    with RangeReader(lst) as reader:
        lines = reader.read(0, reader.size).decode(errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, name = parse_list_line(line.rstrip("\r"))
            path = path_below_root(name, top)
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
        yield ImageFile(path, str(label), size)


def parse_list_line(line: str) -> tuple[int, str]:
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
    if not 0 <= value < _MAX_CLASSES or value != int(value):
        raise ValueError(f"label {text} is no class")
    return int(value)


def path_below_root(name: str, root: str) -> str:
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


class _FileTask(NamedTuple):
    """Files that go into one tar, with their numbers and classes."""

    root: str
    paths: list[str]
    numbers: Ints
    classes: Ints


def _samples(task: _FileTask) -> Iterator[Sample | Fault]:
    for path, number, label, data in zip(
        task.paths, task.numbers.tolist(), task.classes.tolist(), _contents(task), strict=True
    ):
        url = f"{task.root}/{path}"
        if not isinstance(data, bytes):
            yield Fault(url, f"cannot be read ({data})")
        elif (extension := image_extension(data)) is None:
            yield Fault(url, f"no image of a known format (it begins with {data[:8]!r})")
        else:
            yield Sample(sample_key(number), {extension: data, "cls": str(label).encode()})


def _contents(task: _FileTask) -> Iterator[bytes | OSError]:
    """The content of each file, or why there is none."""
    filesystem, root = resolve_url(task.root)
    for first in range(0, len(task.paths), _FILES_PER_REQUEST):
        paths = task.paths[first : first + _FILES_PER_REQUEST]
        urls = [f"{root}/{quote(path) if _is_web(filesystem) else path}" for path in paths]
        if is_local(filesystem):
            yield from map(_read, urls)
            continue
        whole: list[None] = [None] * len(urls)
        found = filesystem.cat_ranges(urls, whole, whole, on_error="return")
        for url, data in zip(urls, found, strict=True):
            if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                raise RunError(f"{task.root}: {url} cannot be read ({data})") from data
            yield data


def _read(path: str) -> bytes | OSError:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        return error


def _is_web(filesystem: Any) -> bool:
    return "http" in protocol_names(filesystem)
