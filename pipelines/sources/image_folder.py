"""A folder of image files to shards: a folder per class, a list or table of classes, or no classes.

What the files hold is copied as it is, if it can be decoded.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import RunError, UserError
from mhe_dist.redact import scrub
from mhe_dist.storage_errors import as_os_error, is_transient
from mhe_dist.storage_retry import errors_naming, with_retries
from pipelines.data.decode import ImageDecodeError, decode_image
from pipelines.shards.image_format import IMAGE_EXTENSIONS, image_extension
from pipelines.shards.index import UNLABELLED, Fault
from pipelines.shards.writer import Sample
from pipelines.sources.convert import (
    DEFAULT_OPTIONS,
    FoundSamples,
    ImportOptions,
    ImportResult,
    Ints,
    NewDataset,
    dense_classes,
    describe_unknown_format,
    digest_texts,
    require_two_classes,
    write_dataset,
    write_datasets,
)
from pipelines.sources.heldout_split import HeldoutSplit, hold_out
from pipelines.sources.image_list import read_list_file
from pipelines.sources.image_table import ListedRow, read_image_table
from pipelines.sources.text_column import TextColumn
from pipelines.storage.file_listing import list_files
from pipelines.storage.staging import require_absent_or_resumable
from pipelines.storage.urls import is_local, is_web, resolve_url
from pipelines.storage.worker_pool import Progress, no_progress

FILES_TABLE: Final = "files.tsv"
_FILES_PER_REQUEST: Final = 64  # files that a store is asked for together
_UNKNOWN_SIZE: Final = 1 << 16
_MAX_SIZE: Final = (1 << 32) - 1  # a column of sizes has 4 bytes for each, one of classes too
_WANTED: Final = (
    "name the folder that holds a folder for each class, or say --no-classes for shards that are "
    "embedded or clustered and not trained on"
)
_SIDE: Final = 32  # JPEG is read completely, and computed at a scale near this
_WHOLE_NUMBER: Final = re.compile(r"[0-9]+")


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
    table: str | None = None,
    classless: bool = False,
) -> ImportResult:
    """Convert a folder of images.

    Args:
        root: folder or URL; without `lst` and `table` the folders in it are the classes, with all
            that is below them.
        out: folder or URL for the shards, which must not exist.
        lst: path or URL of a list of files below `root` with their labels.
        options: of writing.
        writing: called with the finished tars and their number.
        table: path or URL of a CSV or Parquet table of files below `root` and their classes.
        classless: all images below `root` are in one class, which stands for none.

    Raises:
        UserError: nothing to read, or an output that exists.
        RunError: more bad files than the options allow.
    """
    require_absent_or_resumable(out)
    found = _find_images(root.rstrip("/"), lst, table, classless)
    return write_dataset(_new_dataset(out, found, options), _samples, writing)


def import_split_folder(
    root: str,
    out: str,
    split: HeldoutSplit,
    lst: str | None = None,
    options: ImportOptions = DEFAULT_OPTIONS,
    writing: Progress = no_progress,
    table: str | None = None,
) -> list[ImportResult]:
    """Convert a folder of images to `out/heldout` and `out/train`, which appear together.

    The held-out set lies class by class.

    Args:
        root, out, lst, options, writing, table: see `import_folder`.
        split: what is held out.

    Returns:
        The held-out set, and that to train on.

    Raises:
        UserError: as `import_folder`, or there is less than should be held out.
        RunError: as `import_folder`.
    """
    targets = [f"{out}/heldout", f"{out}/train"]
    for target in targets:
        require_absent_or_resumable(target)
    found = _find_images(root.rstrip("/"), lst, table)
    found.about["split"] = split._asdict()
    held = hold_out(found.paths, found.names, found.classes, split)
    # Split by images, both sets keep all classes, so that their labels mean the same.
    train = found.choose(~held, keep_classes=not split.classes)
    heldout = found.choose(held, keep_classes=not split.classes)._replace(faults=[], warnings=[])
    sets = [
        _new_dataset(targets[0], heldout, options._replace(shuffle=False)),
        _new_dataset(targets[1], train, options),
    ]
    return write_datasets(sets, _samples, writing)


class _FoundImages(NamedTuple):
    """Image files below a root as columns, the names of the classes, and what goes to the index.

    Paths are below the root; sizes are uint32 `[N]` bytes, classes integers `[N]`.
    """

    root: str
    paths: TextColumn
    sizes: npt.NDArray[Any]
    names: list[str]
    classes: npt.NDArray[Any]
    faults: list[Fault]
    warnings: list[str]
    about: dict[str, Any]

    def choose(self, kept: npt.NDArray[np.bool_], keep_classes: bool) -> _FoundImages:
        """Some of the files; classes of which none is left keep their numbers, or lose them."""
        paths, sizes = self.paths.choose(np.flatnonzero(kept)), self.sizes[kept]
        names, classes = self.names, self.classes[kept]
        if not keep_classes:
            left, classes = dense_classes(classes)
            names = [self.names[number] for number in left.tolist()]
        return self._replace(paths=paths, sizes=sizes, names=names, classes=classes)


def _find_images(
    root: str, lst: str | None, table: str | None, classless: bool = False
) -> _FoundImages:
    faults: list[Fault] = []
    warnings: list[str] = []
    about: dict[str, Any] = {"source": "folder", "from": scrub(root), "lst": lst and scrub(lst)}
    if lst is not None:
        files = _named_files(root, read_list_file(lst), faults)
    elif table is not None:
        files = _named_files(root, read_image_table(table), faults)
        about["table"] = scrub(table)
    else:
        files = _by_folder(root, list_files(root), classless, warnings)
    if classless:
        about[UNLABELLED] = True
    paths, sizes, labels, numbers = TextColumn(), array("I"), array("i"), dict[str, int]()
    for file in files:
        paths.append(file.path)
        sizes.append(min(file.size, _MAX_SIZE))
        labels.append(numbers.setdefault(file.label, len(numbers)))
    names, new_numbers = _sort_names(numbers, may_be_numbers=bool(lst or table))
    if not classless and not faults:  # else the files of the other class may be among the bad ones
        require_two_classes(scrub(table or lst or root), names, _WANTED)
    classes = new_numbers[np.frombuffer(labels, np.int32)]
    column = np.frombuffer(sizes, np.uint32)
    return _FoundImages(root, paths, column, names, classes, faults, warnings, about)


def _new_dataset(out: str, found: _FoundImages, options: ImportOptions) -> NewDataset[_FileTask]:
    paths, root = found.paths, found.root

    def task(chosen: Ints) -> _FileTask:
        mine = [paths[number] for number in chosen.tolist()]
        return _FileTask(root, mine, chosen, found.classes[chosen])

    samples = FoundSamples(found.names, found.classes, found.sizes, found.faults, found.warnings)
    keys = ((sample_key(number), path) for number, path in enumerate(paths))
    tables = {FILES_TABLE: (["key", "path"], keys)}
    about = found.about | {"files": digest_texts(paths)}
    return NewDataset(out, samples, task, about, [], options, tables)


def sample_key(number: int) -> str:
    """Key of the sample of the n-th file (line n + 2 of `files.tsv`)."""
    return f"{number:09d}"


def _sort_names(
    labels: dict[str, int], may_be_numbers: bool
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Names of the classes, sorted, as numbers if they are; and their new numbers by the old."""
    numeric = may_be_numbers and all(_WHOLE_NUMBER.fullmatch(label) for label in labels)
    names = sorted(labels, key=int) if numeric else sorted(labels)
    numbers = np.empty(len(names), np.int32)
    numbers[[labels[name] for name in names]] = np.arange(len(names))
    return names, numbers


def _by_folder(
    root: str, found: Iterable[tuple[str, int]], classless: bool, warnings: list[str]
) -> Iterator[ImageFile]:
    """The images that lie in a class folder, or all; the others are counted in `warnings`.

    Raises:
        UserError: none of them lies in a class folder.
    """
    inside = outside = other = 0
    for path, size in found:
        name, _, rest = path.partition("/")
        if not has_image_extension(path):
            other += 1
        elif classless:
            yield ImageFile(path, UNLABELLED, size)
        elif not rest:
            outside += 1
        else:
            inside += 1
            yield ImageFile(path, name, size)
    if outside and not inside:
        raise UserError(
            f"{root}: its {outside:,} images lie in no class folder; name the classes with --table "
            f"FILE (path,class), {_WANTED}"
        )
    if outside:
        warnings.append(f"{outside:,} images are in no class folder; left out")
    if other:
        warnings.append(f"{other:,} files do not end like an image; left out")


def has_image_extension(path: str) -> bool:
    """Whether a file name ends like that of an image."""
    return path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _named_files(root: str, rows: Iterable[ListedRow], faults: list[Fault]) -> Iterator[ImageFile]:
    """The files of a list or table that exist; the others are added to `faults`."""
    filesystem, top = resolve_url(root)
    listed = None if is_web(filesystem) or is_local(filesystem) else _StoredSizes(root)
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            path = path_below_root(row.path, top)
            if is_web(filesystem):
                size = _UNKNOWN_SIZE
            elif listed is None:
                size = os.stat(f"{top}/{path}").st_size
            elif (known := listed.find(path)) is not None:
                size = known
            else:
                raise ValueError(f"{row.path}: no such file")
        except (ValueError, OSError) as error:
            faults.append(Fault(row.location, str(error)))
            continue
        yield ImageFile(path, row.label, size)


class _StoredSizes:
    """Sizes of the files below a folder of a store, by path: 16 bytes a file.

    A path is kept as 64 bits of its digest. If another one had the same, a file that is not there
    would be taken for it, and be a fault when it is read.
    """

    def __init__(self, root: str) -> None:
        digests, sizes = array("Q"), array("Q")
        for path, size in list_files(root):
            digests.append(_digest(path))
            sizes.append(size)
        order = np.argsort(np.frombuffer(digests, np.uint64))
        self._digests = np.frombuffer(digests, np.uint64)[order]
        self._sizes = np.frombuffer(sizes, np.uint64)[order]

    def find(self, path: str) -> int | None:
        """Bytes of a file; None: there is none."""
        digest = np.uint64(_digest(path))
        number = int(np.searchsorted(self._digests, digest))
        known = number < len(self._digests) and self._digests[number] == digest
        return int(self._sizes[number]) if known else None


def _digest(path: str) -> int:
    data = path.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


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
            yield Fault(url, describe_unknown_format(data))
        elif problem := _decoding_problem(data):
            yield Fault(url, problem)
        else:
            yield Sample(sample_key(number), {extension: data, "cls": str(label).encode()})


def _decoding_problem(data: bytes) -> str:
    """Why an image cannot be decoded, as training would say; empty if it can."""
    try:
        decode_image(data, _SIDE)
    except ImageDecodeError as error:
        return str(error)
    return ""


def _contents(task: _FileTask) -> Iterator[bytes | OSError]:
    """The content of each file, or why there is none."""
    filesystem, root = resolve_url(task.root)
    for first in range(0, len(task.paths), _FILES_PER_REQUEST):
        paths = task.paths[first : first + _FILES_PER_REQUEST]
        urls = [f"{root}/{quote(path) if is_web(filesystem) else path}" for path in paths]
        if is_local(filesystem):
            yield from map(_read, urls)
            continue
        whole: list[None] = [None] * len(urls)
        found = filesystem.cat_ranges(urls, whole, whole, on_error="return")
        for url, data in zip(urls, found, strict=True):
            if isinstance(data, Exception) and is_transient(data):
                yield _read_again(filesystem, url)
                continue
            known = as_os_error(data) if isinstance(data, Exception) else data
            if isinstance(known, Exception) and not isinstance(known, FileNotFoundError):
                raise RunError(f"{task.root}: {url} cannot be read ({known})") from known
            yield known


def _read_again(filesystem: Any, url: str) -> bytes | OSError:
    """A file that could not be read for the moment.

    Raises:
        RunError: it still cannot be read.
    """
    try:
        with errors_naming(url):
            return with_retries(lambda: bytes(filesystem.cat_file(url)), url)
    except RunError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return error.__cause__
        raise


def _read(path: str) -> bytes | OSError:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        return error
