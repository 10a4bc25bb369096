"""A copy at a URL of a local file of lines that grows, uploaded in the background.

Object stores cannot append. So the copy is in parts, `metrics.jsonl`, `metrics-00001.jsonl` and so
on, which follow one another; only the last one is sent again. The first one alone is the whole file
of earlier versions.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import fsspec

from mhe_dist.storage_retry import path_exists, remove_if_exists, until_answered, with_retries

logger = logging.getLogger(__name__)

PART_BYTES: Final = 1 << 20  # a part of so many is not sent again
_EVERY_S = 60.0


class _Part(NamedTuple):
    """A part of the copy: its size, and the CRC-32 of its bytes."""

    bytes: int
    crc32: int


def iter_parts(filesystem: Any, path: str) -> Iterator[str]:
    """The paths of the parts that a copy has, in their order.

    Raises:
        StorageUnavailable, UserError: see `until_answered`; a part that is missed would be lost.
    """
    filesystem.invalidate_cache()  # another process adds some
    for number in itertools.count():
        part = _part_path(path, number)
        if not path_exists(filesystem, part):
            return
        yield part


def _part_path(path: str, number: int) -> str:
    stem, _, extension = path.rpartition(".")
    return f"{stem}-{number:05d}.{extension}" if number else path


class RemoteCopy:
    """Uploads what is new in the background, a minute apart at least, and once more at the end.

    An upload sends the last part and what was written since, so a minute costs `PART_BYTES` and its
    own lines at most, however long the file is. An upload that fails for longer than a moment is
    tried again with the next one.
    """

    def __init__(self, path: Path, url: str) -> None:
        """Args: path: the local file; url: where the first part is, any fsspec URL."""
        self._path, self._url = path, url
        self._thread: threading.Thread | None = None
        self._last = time.monotonic()
        self._parts: list[_Part] = []  # of the copy
        self._number, self._begin = 0, 0  # of the part that is sent next, and where it begins

    def fetch(self) -> None:
        """Make the local file from the copy, if there is one."""
        filesystem, path = fsspec.core.url_to_fs(self._url)
        for part in iter_parts(filesystem, path):
            data = until_answered(partial(filesystem.cat_file, part), self._url)
            with self._path.open("ab") as file:
                file.write(data)
            self._parts.append(_Part(len(data), zlib.crc32(data)))

    def resume(self) -> None:
        """Find what of the local file, which may have been changed, the copy has; call it once."""
        sound = 0
        with self._path.open("rb") as file:
            for part in self._parts:
                if zlib.crc32(file.read(part.bytes)) != part.crc32:
                    break
                sound += 1
        if sound == len(self._parts) and sound and self._parts[-1].bytes < PART_BYTES:
            sound -= 1  # it goes on
        self._number, self._begin = sound, sum(part.bytes for part in self._parts[:sound])

    def update(self) -> None:
        """Begin an upload if one is due and none is under way."""
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and time.monotonic() - self._last >= _EVERY_S:
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._upload, name="remote-copy", daemon=True)
            self._thread.start()

    def finish(self) -> bool:
        """Upload the file as it is now; say where it is when that fails. Whether it is there."""
        if self._thread is not None:
            self._thread.join()
        return self._upload()

    def _upload(self) -> bool:
        filesystem, path = fsspec.core.url_to_fs(self._url)
        try:
            folder = path.rpartition("/")[0]
            with_retries(lambda: filesystem.makedirs(folder, exist_ok=True), self._url)
            # From the last one on, so that at any time the copy is the beginning of a record.
            while len(self._parts) > self._number + 1:
                remove_if_exists(filesystem, _part_path(path, len(self._parts) - 1))
                self._parts.pop()
            self._send(filesystem, _part_path(path, self._number))
        except Exception as error:  # stores raise what they like, and no upload may end a run
            logger.warning("%s: cannot be written (%s); it is in %s", self._url, error, self._path)
            return False
        return True

    def _send(self, filesystem: Any, path: str) -> None:
        """Send whole lines as the last part; begin another one if it is long."""
        with self._path.open("rb") as file:
            file.seek(self._begin)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        with_retries(lambda: filesystem.pipe_file(path, data), self._url)
        if len(data) >= PART_BYTES:
            self._number, self._begin = self._number + 1, self._begin + len(data)
