"""A file, wherever it is, as Python's readers of texts and tables want it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from pipelines.storage.urls import RangeReader

_BUFFER: Final = 1 << 14  # bytes; of a store, 8 MB are read ahead


@contextmanager
def open_buffered(url: str) -> Iterator[io.BufferedReader[Any]]:
    """Open a file that is read piece by piece, so that its size does not matter.

    Raises:
        UserError: there is no such file, or a server does not give parts of files.
    """
    with RangeReader(url) as reader, io.BufferedReader(_RawFile(reader), _BUFFER) as stream:
        yield stream


class _RawFile(io.RawIOBase):
    """The position of a reader who knows none."""

    def __init__(self, reader: RangeReader) -> None:
        super().__init__()
        self._reader, self._at = reader, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes, and count the bytes."""
        data = self._reader.read(self._at, self._at + len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, and say which."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._reader.size}
        self._at = origin[whence] + offset
        return self._at
