"""Columns: one-dimensional NumPy files beside an index, mapped into memory and never copied.

A label set has such columns, too. A column holds one value for each sample, or the items of lists
of any length one after the other, with a second column for where each list ends. A local column is
mapped where it lies. A remote one is fetched once per node into a folder that all processes of a
user share, named by its checksum. So ranks and loader processes read the same pages, and only those
that they need.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from mhe_dist.storage_retry import RETRIES
from pipelines.storage.cache import FileCache
from pipelines.storage.ranges import CHECKSUM, WrongContentError, download, locate_file
from pipelines.storage.urls import atomic_write, is_local_url, open_stream

CACHE_VARIABLE: Final = "MHE_CACHE_DIR"
_DTYPES: Final = ("uint16", "uint32", "int64")

_CHUNK: Final = 1 << 23  # bytes that are hashed at a time
_NO_LIMIT: Final = 1 << 62  # bytes of all cached columns


@dataclass(frozen=True)
class ColumnEntry:
    """What an index says of a column.

    Attributes:
        file: its name, in the folder of the index.
        dtype: of its values, little-endian: `uint16`, `uint32` or `int64`.
        length: how many values.
        bytes: size of the file; its NumPy header comes before the values.
        checksum: `sha256:` and the hexadecimal digest of the file.
    """

    file: str
    dtype: str
    length: int
    bytes: int
    checksum: str

    def __post_init__(self) -> None:
        sizes = (self.length, self.bytes)
        if (
            not all(isinstance(text, str) for text in (self.file, self.dtype, self.checksum))
            or not all(isinstance(size, int) and size >= 0 for size in sizes)
            or self.file != os.path.basename(self.file)
            or self.file in ("", ".", "..")
            or self.dtype not in _DTYPES
            or not CHECKSUM.fullmatch(self.checksum)
            or self.header_bytes <= 0
        ):
            raise ValueError(f"not a column: {self}")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype as it is in the file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def header_bytes(self) -> int:
        """Where the values begin."""
        return self.bytes - self.length * self.numpy_dtype.itemsize


class Column:
    """A column that can be read; what is pickled is where it is, never its values."""

    def __init__(
        self, folder: str, entry: ColumnEntry, cache_dir: str = "", owner: str = "index"
    ) -> None:
        """Nothing is opened yet.

        Args:
            folder: path or URL of the index, or of the label set.
            entry: what that says of the column.
            cache_dir: folder of this node for remote columns; empty: `default_cache_dir`.
            owner: `index` or `label set`, for messages.
        """
        self.folder, self.entry = folder, entry
        self._cache_dir, self._owner = cache_dir, owner

    @property
    def url(self) -> str:
        """Path or URL of its file."""
        return f"{self.folder}/{self.entry.file}"

    @property
    def is_local(self) -> bool:
        """Whether its file is on this machine."""
        return is_local_url(self.folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Column) and (self.url, self.entry) == (other.url, other.entry)

    def __hash__(self) -> int:
        return hash((self.url, self.entry))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "values"}

    @cached_property
    def values(self) -> npt.NDArray[Any]:
        """Its values `[length]`, mapped when they are asked for first; not to be written to.

        Raises:
            UserError: the file is missing or is not the one of the index, or the node has no room.
            RunError: a remote file cannot be read.
        """
        with self._open() as stream:
            self._check(stream)
            mapped = mmap.mmap(stream.fileno(), self.entry.bytes, access=mmap.ACCESS_READ)
        entry = self.entry
        return np.frombuffer(mapped, entry.numpy_dtype, entry.length, entry.header_bytes)

    def find_fault(self) -> str:
        """What is wrong with the file: `missing`, `damaged` or nothing; all its bytes are read."""
        digest = hashlib.sha256()
        try:
            with open_stream(self.url) as stream:
                while data := stream.read(_CHUNK):
                    digest.update(data)
        except FileNotFoundError:
            return "missing"
        return "" if f"sha256:{digest.hexdigest()}" == self.entry.checksum else "damaged"

    def damaged(self, reason: str) -> UserError:
        """The error of a column that cannot be used: names the file and the cure."""
        cure = (
            f"make it again with `mhe data index {shlex.quote(self.folder)}`"
            if self._owner == "index"
            else "make the label set again, or copy it again from where it is whole"
        )
        return UserError(
            f"{self.url}: this column of the {self._owner} cannot be used ({reason}); {cure}"
        )

    def _open(self) -> BinaryIO:
        file = locate_file(self.url)
        try:
            if file.is_local:
                return open(file.path, "rb")
            fill = partial(download, file, self.entry.bytes, self.entry.checksum, RETRIES)
            return self._fetch(fill)
        except FileNotFoundError:
            raise self.damaged("the file is missing") from None
        except WrongContentError:
            raise self.damaged(
                f"its checksum is not that of the {self._owner}: it was changed or damaged"
            ) from None

    def _fetch(self, fill: Any) -> BinaryIO:
        """The file from this node's folder of columns, where it is put if it is not there."""
        folder = self._cache_dir or default_cache_dir()
        name = self.entry.checksum.removeprefix("sha256:")
        try:
            stream = FileCache(folder, _NO_LIMIT).open(name, self.entry.bytes, fill)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(
                f"{self.url}: cannot be kept in {folder} ({error}); make room there, or name "
                f"another folder of this machine with {CACHE_VARIABLE}"
            ) from error
        assert stream is not None, "there is no limit"
        return stream

    def _check(self, stream: BinaryIO) -> None:
        """Compare size and header of a file with what the index says."""
        size, entry = os.fstat(stream.fileno()).st_size, self.entry
        if size != entry.bytes:
            raise self.damaged(f"has {size} bytes, the {self._owner} says {entry.bytes}")
        if stream.read(entry.header_bytes) != _header(entry.numpy_dtype, entry.length):
            raise self.damaged(f"does not hold {entry.length} values of {entry.dtype}")


def write_column(
    url: str, dtype: str, length: int, parts: Iterable[npt.NDArray[Any]]
) -> ColumnEntry:
    """Write a column, part by part; it appears complete or not at all.

    Args:
        url: of the file; its name ends with `.npy`.
        dtype: see `ColumnEntry`; all values fit into it.
        length: values in all parts together.
        parts: one-dimensional arrays of integers.

    Raises:
        ValueError: the parts have another length together.
    """
    stored, written = np.dtype(dtype).newbyteorder("<"), 0
    header, digest = _header(stored, length), hashlib.sha256()
    digest.update(header)
    with atomic_write(url) as stream:
        stream.write(header)
        for part in parts:
            data = part.astype(stored).tobytes()
            digest.update(data)
            stream.write(data)
            written += len(part)
        if written != length:
            raise ValueError(f"{url}: {written} values where {length} belong")
    size = len(header) + length * stored.itemsize
    return ColumnEntry(url.rpartition("/")[2], dtype, length, size, f"sha256:{digest.hexdigest()}")


def smallest_dtype(lowest: int, highest: int) -> str:
    """The dtype of a column that holds integers from `lowest` to `highest` in the fewest bytes."""
    for dtype in _DTYPES[:-1]:
        if lowest >= 0 and highest <= np.iinfo(dtype).max:
            return dtype
    return _DTYPES[-1]


def default_cache_dir(kind: str = "columns") -> str:
    """The folder of remote columns on this node: of `MHE_CACHE_DIR`, or of the user's cache.

    Args:
        kind: of what is kept; each has a folder of its own.
    """
    base = os.environ.get(CACHE_VARIABLE)
    if not base:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        base = f"{base}/mhe"
    return f"{base}/{kind}"


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    """How a NumPy file with such values begins."""
    stream = io.BytesIO()
    about = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (length,),
    }
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()
