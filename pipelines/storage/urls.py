"""Every path is a URL: local, `s3://`, `gs://`, `http(s)://` for reading, whatever fsspec knows.

Credentials come from where each store's own tools look for them, never from us.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from tempfile import TemporaryDirectory, mkdtemp
from typing import IO, Any, Final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mhe_dist.atomic_file import whole_file
from mhe_dist.config.section import local_path
from mhe_dist.errors import UserError
from mhe_dist.storage_errors import ABSENT, truncated_read
from mhe_dist.storage_retry import errors_naming, until_answered, with_retries
from mhe_dist.web_address import is_web_address
from pipelines.storage.unusable_path import explain_fault

NO_RANGES: Final = "the server gives whole files only, no parts of them: download it first"
_READ_AHEAD: Final = 1 << 23  # bytes that a remote file is read in


def resolve_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        UserError: no such protocol, or the package that speaks it is not installed, or a web
            address with a port that there is not.
    """
    if url.startswith(("http://", "https://")) and not is_web_address(url):
        raise UserError(f"{url}: is no address of a server: give http(s)://host:port/...")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}") from error
    return filesystem, path


def is_local(filesystem: Any) -> bool:
    """Whether a file system is this machine's own."""
    return isinstance(filesystem, LocalFileSystem)


def is_local_url(url: str) -> bool:
    """Whether a path or URL lies on this machine; raises as `resolve_url`."""
    return is_local(resolve_url(url)[0])


def protocol_names(filesystem: Any) -> tuple[str, ...]:
    """The names of a file system's protocol, e.g. `http` and `https`."""
    names = filesystem.protocol
    return (names,) if isinstance(names, str) else tuple(names)


def is_web(filesystem: Any) -> bool:
    """Whether a file system is a web server, which lists no folders."""
    return "http" in protocol_names(filesystem)


def is_absolute_url(url: str) -> bool:
    """Whether a URL says where it is by itself, without a folder before it."""
    return "://" in url or url.startswith("/")


def to_url(filesystem: Any, path: str) -> str:
    """The URL of a path in a file system; a local one stays a path."""
    return path if is_local(filesystem) else str(filesystem.unstrip_protocol(path))


def url_exists(url: str) -> bool:
    """Whether there is a file or folder at a path or URL.

    Raises:
        UserError: there is no file system for such a URL, or its server refuses to say.
        RunError: its server does not answer.
    """
    filesystem, path = resolve_url(url)
    try:
        # Not `exists`: to that, what a web server refuses is not there.
        with_retries(lambda: filesystem.info(path), url)
    except ABSENT:
        return False
    except OSError as error:
        raise UserError(f"{url}: cannot be read: {explain_fault(error)}") from error
    return True


def require_absent(url: str) -> None:
    """Raise UserError if there is anything at a path or URL, except an empty folder.

    Raises:
        StorageUnavailable: nobody knows now; what is there would be overwritten.
    """
    filesystem, path = resolve_url(url)
    try:
        about = until_answered(lambda: filesystem.info(path), url)
    except ABSENT:
        return
    if about["type"] != "directory" or list_folder(url):
        raise UserError(f"{url}: already exists; delete it or choose another output folder")


def list_folder(url: str) -> list[str]:
    """Paths of what lies in a folder, in order; none where there is no folder, or a web server.

    Its name may hold what a pattern gives a meaning: `[`, `*`, `?`.
    """
    filesystem, path = resolve_url(url)
    if is_web(filesystem):
        return []
    try:
        found = with_retries(lambda: filesystem.ls(path, detail=False), url)
    except ABSENT:
        return []
    return sorted(str(name).rstrip("/") for name in found)


def atomic_write(url: str) -> AbstractContextManager[IO[bytes]]:
    """A stream whose file appears at a path or URL, complete, when its block ends without an error.

    See `mhe_dist.atomic_file.whole_file`.

    Raises:
        UserError: see `resolve_url`.
    """
    return whole_file(*resolve_url(url))


@contextmanager
def local_copies() -> Iterator[Callable[[str], str]]:
    """Within, what gives the local path of a file or folder: of one in a store, that of a copy.

    For readers that take no URL. The copies go when the block ends.
    """
    with TemporaryDirectory(prefix="mhe-") as scratch:

        def copied(url: str) -> str:
            """A path or URL -> a path of the same last name."""
            filesystem, path = resolve_url(url)
            if is_local(filesystem):
                return local_path(url)
            target = f"{mkdtemp(dir=scratch)}/{path.rpartition('/')[2]}"
            filesystem.invalidate_cache()
            for file in with_retries(lambda: filesystem.find(path), url):
                copy = f"{target}{file.removeprefix(path)}"
                os.makedirs(os.path.dirname(copy), exist_ok=True)
                with_retries(partial(filesystem.get_file, file, copy), file)
            return target

        yield copied


@contextmanager
def open_stream(url: str) -> Iterator[RetryingStream]:
    """Open a file to read it from front to back.

    Raises:
        OSError: there is no such file; the error is the store's own.
        UserError: it may not be read.
    """
    filesystem, path = resolve_url(url)
    try:
        opened = with_retries(lambda: filesystem.open(path, "rb", block_size=_READ_AHEAD), url)
    except PermissionError as error:
        raise UserError(f"{url}: cannot be opened: {explain_fault(error)}") from error
    with opened as stream:
        yield RetryingStream(stream, url)


class RetryingStream:
    """A file opened for reading; a read that fails for the moment is tried again."""

    def __init__(self, stream: Any, url: str) -> None:
        self._stream, self._url, self._at = stream, url, 0
        self._size: int | None = getattr(stream, "size", None)  # some servers do not tell it

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end of the file.

        Raises:
            RunError: they cannot be read, or stop coming before the end of the file.
        """
        pieces, stop = [], self._at + size
        with errors_naming(self._url):
            while self._at < stop and (piece := self._piece(stop)):
                pieces.append(piece)
                self._at += len(piece)
        return b"".join(pieces)

    def _piece(self, stop: int) -> bytes:
        """Some of the next bytes up to `stop`; none at the end of the file."""

        def attempt() -> bytes:
            """One read."""
            piece = bytes(self._stream.read(stop - self._at))
            if not piece and self._size is not None and self._at < self._size:
                raise truncated_read(self._at, min(stop, self._size))
            return piece

        return with_retries(attempt, self._url)


class RangeReader:
    """Reads parts of one file, wherever it is; to be closed.

    Attributes:
        url: of the file.
        size: in bytes.
    """

    def __init__(self, url: str) -> None:
        """Open.

        Raises:
            UserError: there is no such file, or it cannot be opened.
        """
        self.url = url
        self._filesystem, self._path = resolve_url(url)
        self._stream: Any = None
        try:
            if is_local(self._filesystem):
                self._stream = open(self._path, "rb", buffering=0)  # noqa: SIM115
                self.size = os.fstat(self._stream.fileno()).st_size
            else:
                self._stream = with_retries(self._open, url)
                self.size = int(self._stream.size)
        except (OSError, TypeError) as error:  # TypeError: a server that tells no size
            self.close()
            raise UserError(f"{url}: cannot be opened: {explain_fault(error)}") from error

    def _open(self) -> Any:
        return self._filesystem.open(
            self._path, "rb", block_size=_READ_AHEAD, cache_type="readahead"
        )

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes `[start, stop)`; fewer at the end of the file. Cheap when read forward.

        Raises:
            RunError: they cannot be read, or the file has become shorter since it was opened.
            UserError: a server does not give parts of files.
        """
        pieces, at, stop = [], start, min(stop, self.size)
        with errors_naming(self.url):
            while at < stop:
                pieces.append(self._piece(at, stop))
                at += len(pieces[-1])
        return b"".join(pieces)

    def _piece(self, start: int, stop: int) -> bytes:
        """The first of the bytes `[start, stop)`, at least one."""
        if is_local(self._filesystem):
            if piece := os.pread(self._stream.fileno(), stop - start, start):
                return piece
            raise truncated_read(start, stop)

        def attempt() -> bytes:
            """One read."""
            self._stream.seek(start)
            if piece := bytes(self._stream.read(stop - start)):
                return piece
            raise truncated_read(start, stop)

        try:
            return with_retries(attempt, self.url)
        except ValueError as error:  # what fsspec makes of a server without range requests
            raise UserError(f"{self.url}: {NO_RANGES}") from error

    def read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Many parts in any order, each as `read` gives it; a store is asked for all at once.

        Raises:
            RunError: they cannot be read.
            UserError: a server does not give parts of files.
        """
        pairs = zip(map(int, starts), map(int, stops), strict=True)
        bounds = [(start, min(stop, self.size)) for start, stop in pairs]
        if is_local(self._filesystem):
            return [self.read(*each) for each in bounds]
        parts = {number: b"" for number, (start, stop) in enumerate(bounds) if start >= stop}
        with errors_naming(self.url):
            with_retries(lambda: self._add_missing(parts, bounds), self.url)
        return [parts[number] for number in range(len(bounds))]

    def _add_missing(self, parts: dict[int, bytes], bounds: list[tuple[int, int]]) -> None:
        """One attempt at the parts that have not come yet; what came whole is not asked again."""
        missing = [number for number in range(len(bounds)) if number not in parts]
        starts, stops = ([bounds[number][end] for number in missing] for end in (0, 1))
        paths = [self._path] * len(missing)
        found = self._filesystem.cat_ranges(paths, starts, stops, on_error="raise")
        short = None
        for number, start, stop, part in zip(missing, starts, stops, found, strict=True):
            if len(part) > stop - start:
                raise UserError(f"{self.url}: {NO_RANGES}")
            if len(part) < stop - start:
                short = truncated_read(start, stop, len(part))
            else:
                parts[number] = part
        if short is not None:
            raise short
