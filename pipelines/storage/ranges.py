"""Byte ranges of files, local or remote."""

from __future__ import annotations

import hashlib
import re
from typing import Any, BinaryIO, Final, NamedTuple

from mhe_dist.errors import RunError
from mhe_dist.storage_errors import error_chain, http_status, truncated_read
from mhe_dist.storage_retry import RETRIES, errors_naming, with_retries
from pipelines.storage.urls import NO_RANGES, is_local, resolve_url

CHECKSUM: Final = re.compile("sha256:([0-9a-f]{64})")
_BLOCK: Final = 8 << 20  # bytes that a download asks for at a time
_NOT_SATISFIABLE: Final = 416  # the range begins behind the end of the file


class WrongContentError(Exception):
    """A file that is not the one of the index; the message says why."""


class FileLocation(NamedTuple):
    """A file of any file system that fsspec knows."""

    url: str
    filesystem: Any
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return is_local(self.filesystem)


def locate_file(url: str) -> FileLocation:
    """The file of a URL, which need not exist.

    fsspec makes a client for each thread that calls this, so call it in one thread and hand the
    result to the others.

    Raises:
        UserError: no such protocol.
    """
    return FileLocation(url, *resolve_url(url))


def read_range(file: FileLocation, start: int, stop: int, retries: int = RETRIES) -> bytes:
    """The bytes `[start, stop)`; fewer only where the file itself ends.

    Raises:
        RunError: they cannot be read.
    """
    if start >= stop:
        return b""
    with errors_naming(file.url):
        if file.is_local:
            return bytes(file.filesystem.cat_file(file.path, start=start, end=stop))
        return with_retries(lambda: _range(file, start, stop), file.url, retries)


def _range(file: FileLocation, start: int, stop: int) -> bytes:
    """One attempt."""
    try:
        data = bytes(file.filesystem.cat_file(file.path, start=start, end=stop))
    except Exception as error:
        if _NOT_SATISFIABLE not in map(http_status, error_chain(error)):
            raise
        data = b""
    if len(data) == stop - start:
        return data
    size = file.filesystem.size(file.path)
    there = stop - start if size is None else max(0, min(size, stop) - start)
    if len(data) > there:
        raise RunError(f"{file.url}: {NO_RANGES}")
    if len(data) < there:
        raise truncated_read(start, start + there, len(data))
    return data


def download(file: FileLocation, size: int, checksum: str, retries: int, stream: BinaryIO) -> None:
    """Write a whole file; try again while its checksum is wrong, but not twice the same.

    Args:
        file: what to read.
        size: its bytes, by the index.
        checksum: `sha256:` and the digest, by the index; anything else: it is not known.
        retries: further attempts after a transient fault, and after a false checksum.
        stream: where to write.

    Raises:
        WrongContentError: it is shorter than `size`, or the same false checksum came twice.
        RunError: it cannot be read.
    """
    found: set[str] = set()
    for _ in range(retries + 1):
        stream.seek(0)
        digest = hashlib.sha256()
        for start in range(0, size, _BLOCK):
            stop = min(start + _BLOCK, size)
            data = read_range(file, start, stop, retries)
            if len(data) < stop - start:
                raise WrongContentError(f"has {start + len(data)} bytes, the index says {size}")
            digest.update(data)
            stream.write(data)
        actual = f"sha256:{digest.hexdigest()}"
        if actual == checksum or not CHECKSUM.fullmatch(checksum):
            return
        if actual in found:
            break
        found.add(actual)
    raise WrongContentError("its checksum is not that of the index: it was changed or damaged")
