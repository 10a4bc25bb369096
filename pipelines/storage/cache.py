"""A folder of whole files with a bound on its size, shared by the processes of a host.

An entry is renamed into place when it is complete, so a reader never sees half of one. While it is
made it is `<name>.part`, locked by the process that makes it: a second process that needs the entry
waits and then finds it. When a process dies, the system drops its lock, and the next process takes
the remains over or removes them. Room is reserved before anything is written, so the bound holds at
every moment: the entries that were not used for the longest time are removed, but none that is
being made.

A reader that has an entry open may read on after it was removed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

_PART: Final = ".part"
_LOCK: Final = "lock"


class FileCache:
    """The folder; any number of processes and threads may use one at the same time."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        """Open or make the folder.

        Args:
            folder: on a local disk; it is made, for this user alone.
            max_bytes: bytes of all entries together, those that are being made included.

        Raises:
            OSError: it cannot be made.
        """
        self._folder, self._max_bytes = Path(folder).expanduser(), max_bytes
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open(self, name: str, size: int, fill: Callable[[BinaryIO], None]) -> BinaryIO | None:
        """A complete entry, opened for reading, or None if there is no room for it.

        Args:
            name: of the entry; a plain file name.
            size: its bytes.
            fill: writes exactly that many; what it raises leaves no entry behind.

        Raises:
            OSError: the disk is full, or the folder cannot be used.
        """
        while (stream := self._existing(name, size)) is None:
            with self._claimed(f"{name}{_PART}") as part:
                # Another process may have finished it since the first check.
                if part is None or (self._folder / name).exists():
                    continue
                if not self._reserve(part, size):
                    return None
                fill(part)
                part.flush()
                os.fsync(part.fileno())
                with self._locked():
                    os.replace(self._folder / f"{name}{_PART}", self._folder / name)
        return stream

    def discard(self, name: str, stream: BinaryIO) -> None:
        """Remove an entry that is not what it should be, unless another one is there by now.

        Args:
            name: of the entry.
            stream: what `open` gave.
        """
        with self._locked():
            if _is_at(stream, self._folder / name):
                (self._folder / name).unlink()

    def _existing(self, name: str, size: int) -> BinaryIO | None:
        """A complete entry; it counts as used now."""
        try:
            stream = open(self._folder / name, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        if os.fstat(stream.fileno()).st_size == size:
            os.utime(stream.fileno())
            return stream
        stream.close()  # cut off when the machine crashed
        (self._folder / name).unlink(missing_ok=True)
        return None

    @contextmanager
    def _claimed(self, name: str) -> Iterator[BinaryIO | None]:
        """A file of that name that is this caller's alone; None if another one had it until now.

        Unless it was renamed, it is removed at the end.
        """
        path = self._folder / name
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_at(stream, path):
                yield None
                return
            # From here on nobody else removes or renames it.
            os.ftruncate(stream.fileno(), 0)
            try:
                yield stream
            finally:
                if _is_at(stream, path):
                    path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock: sizes and names do not change, except that entries may be removed."""
        with open(self._folder / _LOCK, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, part: BinaryIO, size: int) -> bool:
        """Give a part its size, if there is room or room can be made."""
        with self._locked():
            paths = [Path(each.path) for each in os.scandir(self._folder) if each.is_file()]
            parts = [
                path for path in paths if path.suffix == _PART and not _remove_if_abandoned(path)
            ]
            room = self._max_bytes - size - sum(_size_and_age(path)[0] for path in parts)
            if room < 0:
                return False
            _evict([p for p in paths if p.suffix != _PART and p.name != _LOCK], room)
            os.ftruncate(part.fileno(), size)
            return True


def _evict(entries: list[Path], max_bytes: int) -> None:
    """Remove entries, the longest unused first, until they are `max_bytes` bytes together."""
    found = sorted((_size_and_age(path)[::-1], path) for path in entries)
    total = sum(size for (_, size), _ in found)
    for (_, size), path in found:
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


def _remove_if_abandoned(path: Path) -> bool:
    """Remove a part if the process that made it died; return whether it did."""
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return True
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_at(stream, path):
            path.unlink()
        return True


def _is_at(stream: BinaryIO, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _size_and_age(path: Path) -> tuple[int, int]:
    """Bytes of a file, and when it was used last; (0, 0) if it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
