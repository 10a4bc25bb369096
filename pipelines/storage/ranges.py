"""Parts of files, wherever they are."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from mhe_dist.errors import RunError
from pipelines.storage import urls
from pipelines.storage.retry import RETRIES, chain, named, retried, status

_NOT_SATISFIABLE: Final = 416  # the range begins behind the end of the file


class CutOff(ConnectionError):
    """Fewer bytes came than the file has there, though the answer looked complete."""


class File(NamedTuple):
    """A file of any file system that fsspec knows."""

    url: str
    filesystem: Any
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return urls.is_local(self.filesystem)


def file_at(url: str) -> File:
    """The file of a URL, which need not exist.

    fsspec makes a client for each thread that asks, so ask in one and hand the file to the others.

    Raises:
        UserError: no such protocol.
    """
    return File(url, *urls.find(url))


def read_range(file: File, start: int, stop: int, retries: int = RETRIES) -> bytes:
    """The bytes `[start, stop)`; fewer only where the file itself ends.

    Raises:
        RunError: they cannot be read.
    """
    if start >= stop:
        return b""
    with named(file.url):
        if file.is_local:
            return bytes(file.filesystem.cat_file(file.path, start=start, end=stop))
        return retried(lambda: _range(file, start, stop), file.url, retries)


def _range(file: File, start: int, stop: int) -> bytes:
    """One attempt."""
    try:
        data = bytes(file.filesystem.cat_file(file.path, start=start, end=stop))
    except Exception as error:
        if _NOT_SATISFIABLE not in map(status, chain(error)):
            raise
        data = b""
    if len(data) == stop - start:
        return data
    size = file.filesystem.size(file.path)
    there = stop - start if size is None else max(0, min(size, stop) - start)
    if len(data) > there:
        raise RunError(f"{file.url}: {urls.WHOLE}")
    if len(data) < there:
        raise CutOff(f"{len(data)} bytes came instead of {there}")
    return data
