"""Files that appear as a whole or not at all, on this machine's disks and in any store."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import IO, Any, Final

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mhe_dist.storage_retry import with_retries

TEMPORARY_SUFFIX: Final = ".tmp"  # ends the name of a file that is not complete yet


def write_file(url: str, content: str | bytes) -> None:
    """Write a small file at a path or fsspec URL; a text as UTF-8.

    Raises:
        StorageUnavailable: the disk or the store fails for longer than a moment.
        OSError: the disk refuses it; what was there stays.
    """
    filesystem, path = url_to_fs(url)
    data = content.encode() if isinstance(content, str) else content

    def write() -> None:
        """One attempt."""
        if isinstance(filesystem, LocalFileSystem):
            with whole_file(filesystem, path) as stream:
                stream.write(data)
        else:  # a store shows whole objects by itself
            filesystem.pipe_file(path, data)

    with_retries(write, url)


@contextmanager
def whole_file(filesystem: Any, path: str) -> Iterator[IO[bytes]]:
    """A stream whose file appears at `path` when the block ends without an error.

    For an object store the bytes are collected in a temporary file of this machine, because closing
    a half-written object would make it appear. It has no name, so that nothing is left of it
    however this process ends.
    """
    if isinstance(filesystem, LocalFileSystem):
        with replaced_file(path) as temporary, open(temporary, "xb") as stream:
            yield stream
        return
    with TemporaryFile() as stream:
        yield stream
        stream.flush()
        source = f"/proc/self/fd/{stream.fileno()}"
        with_retries(lambda: filesystem.put_file(source, path), path)


@contextmanager
def replaced_file(path: str, ending: str = "") -> Iterator[str]:
    """The name of a file that the block writes, and that takes the place of `path` after it.

    It is in the same folder, which is made; nothing is left of it when the block fails.

    Args:
        path: on this machine.
        ending: of the name, for writers that want one.
    """
    parent, name = os.path.split(path)
    os.makedirs(parent or os.curdir, exist_ok=True)
    hidden = f".{name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}{ending}"
    temporary = os.path.join(parent, hidden)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
