"""Files of a checkpoint: written with checksums, listed by a manifest, checked against it.

A folder is a checkpoint only if its `manifest.json`, written last, is there and agrees with the
files. Everything goes through fsspec, so a folder may be local or in an object store.
"""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mhe_dist.atomic_file import write_file
from mhe_dist.checkpoint.step_folder import MANIFEST
from mhe_dist.errors import describe_error
from mhe_dist.storage_errors import ABSENT
from mhe_dist.storage_retry import remove_if_exists, until_answered, with_retries

RUN = "run.json"
SCORES = "scores.json"
FORMAT = 1
_CHUNK = 1 << 22
_WAITS_S = (0.5, 2.0)  # before what came from a store is read again, as it is damaged


@dataclass(frozen=True)
class FileEntry:
    """The manifest's entry of a file: its size, and CRC-32 as 8 hexadecimal digits."""

    bytes: int
    crc32: str


class ChecksumWriter(FsspecWriter):
    """torch.distributed.checkpoint's writer to any fsspec URL, which remembers what it wrote.

    Where the disk or the store fails for the moment, a rank's file is written again from its
    beginning; the other ranks wait for it as they do for a slow one.

    Attributes:
        entries: file name -> size and checksum, of the files that this rank wrote.
    """

    def __init__(self, path: str) -> None:
        local = isinstance(fsspec.core.url_to_fs(path)[0], LocalFileSystem)
        super().__init__(path, sync_files=local)
        recording = _RecordingFileSystem()
        self.fs = recording  # type: ignore[assignment]
        self.path = self._url = str(recording.init_path(path))
        self.entries: dict[str, FileEntry] = recording.entries

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder."""
        return with_retries(partial(super().prepare_local_plan, plan), self._url)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        return with_retries(partial(super().write_data, plan, planner), self._url)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`."""
        with_retries(partial(super().finish, metadata, results), self._url)


class _RecordingFileSystem(FileSystem):
    fs: Any

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any, None, None]:
        """A stream to `path`; a written file gets its entry when the stream ends without error."""
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            recorded = _ChecksumStream(stream)
            try:
                yield recorded
            except Exception as error:
                # `torch.save` tells where the file ends then, and not why.
                cause = recorded.failure or error
                raise cause from cause.__cause__
        self.entries[os.path.basename(path)] = recorded.entry

    def rm_file(self, path: str | os.PathLike) -> None:
        """Delete a file; to `rm`, what a base class calls, its name may be a pattern."""
        self.fs.rm_file(path)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a file, whatever its name; a store copies it."""
        if isinstance(self.fs, LocalFileSystem):
            super().rename(path, new_path)
        else:
            self.fs.cp_file(path, new_path)
            self.fs.rm_file(path)
        self.entries[os.path.basename(new_path)] = self.entries.pop(os.path.basename(path))


class _ChecksumStream:
    """A stream that is written from front to back, with the checksum of what went through it.

    Attributes:
        failure: the first error of a write.
    """

    def __init__(self, stream: Any) -> None:
        self.failure: Exception | None = None
        self._stream = stream
        self._bytes = 0
        self._crc = 0

    def write(self, data: Any) -> int:
        """Write bytes; how many were written."""
        self._crc = zlib.crc32(data, self._crc)
        self._bytes += memoryview(data).nbytes
        try:
            return self._stream.write(data)
        except Exception as error:
            self.failure = self.failure or error
            raise

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self._bytes, f"{self._crc:08x}")


class CheckpointFolder:
    """One checkpoint's folder, local or remote."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self._path = fsspec.core.url_to_fs(url)

    def _path_of(self, name: str) -> str:
        return f"{self._path}/{name}"

    def write_manifest(self, entries: dict[str, FileEntry], run: dict[str, Any]) -> int:
        """Write `run.json`, then the manifest that makes the folder a checkpoint.

        Returns:
            Bytes of all files that the manifest names.
        """
        data = json.dumps(run, indent=1).encode()
        self._put(RUN, data)
        entries = entries | {RUN: FileEntry(len(data), f"{zlib.crc32(data):08x}")}
        files = {name: asdict(entry) for name, entry in sorted(entries.items())}
        self._put(MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())
        return sum(entry.bytes for entry in entries.values())

    def write_scores(self, scores: dict[str, float]) -> None:
        """Write figures that came later than the manifest."""
        self._put(SCORES, json.dumps(scores, indent=1).encode())

    def _put(self, name: str, data: bytes) -> None:
        """Write a small file as a whole or not at all."""
        write_file(f"{self.url}/{name}", data)

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the folder.

        Raises:
            FileNotFoundError, StorageUnavailable, UserError: see `until_answered`.
            ValueError: it is damaged.
        """
        path = self._path_of(name)
        return json.loads(until_answered(lambda: self.fs.cat_file(path), f"{self.url}/{name}"))

    def manifest(self) -> dict[str, FileEntry] | str:
        """The files of the checkpoint, or the reason why this is none (sizes are compared).

        Raises:
            StorageUnavailable: the disk or the store gives no answer, which is no reason.
        """
        for _ in self._attempts():
            try:
                return self._read_manifest()
            except ABSENT as error:  # a folder that is still to be written
                return f"{MANIFEST} cannot be read: {describe_error(error)}"
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{MANIFEST} cannot be read: {describe_error(error)}"
        return reason

    def _attempts(self) -> Iterator[None]:
        """A turn for each attempt at what arrives damaged from a store; a disk has one.

        To pass over a good checkpoint loses the work since the one before.
        """
        yield
        for wait in () if isinstance(self.fs, LocalFileSystem) else _WAITS_S:
            time.sleep(wait)
            yield

    def _read_manifest(self) -> dict[str, FileEntry] | str:
        """See `manifest`; raises what a damaged one makes Python raise, too."""
        listed = until_answered(lambda: self.fs.ls(self._path, detail=True), self.url)
        sizes = {os.path.basename(each["name"].rstrip("/")): each["size"] for each in listed}
        if MANIFEST not in sizes:
            return f"no {MANIFEST}: it was not written to the end"
        content = self.read_json(MANIFEST)
        if content["format"] != FORMAT:
            return f"format {content['format']}, this version reads {FORMAT}"
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        for name, entry in files.items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != entry.bytes:
                return f"{name} has {sizes[name]} bytes, {MANIFEST} says {entry.bytes}"
        return files

    def first_corrupt_file(self, files: Iterable[tuple[str, FileEntry]]) -> str | None:
        """The first file whose checksum is not the manifest's, in words; None: there is none.

        Raises:
            StorageUnavailable: see `manifest`.
        """
        for name, entry in files:
            for _ in self._attempts():
                fault = self._fault(name, entry)
                if fault is None:
                    break
            else:
                return fault
        return None

    def _fault(self, name: str, entry: FileEntry) -> str | None:
        """What is wrong with a file that was read to its end."""
        try:
            size, crc = until_answered(lambda: self._read_through(name), f"{self.url}/{name}")
        except ABSENT as error:
            return f"{name} cannot be read: {error}"
        if size != entry.bytes:
            return f"{name} gave {size} bytes, {MANIFEST} says {entry.bytes}"
        if f"{crc:08x}" != entry.crc32:
            return f"{name} has CRC-32 {crc:08x}, {MANIFEST} says {entry.crc32}"
        return None

    def _read_through(self, name: str) -> tuple[int, int]:
        """Bytes and CRC-32 of a file."""
        size = crc = 0
        with self.fs.open(self._path_of(name), "rb") as file:
            while chunk := file.read(_CHUNK):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        return size, crc

    def read_part(self, name: str, begin: int, end: int) -> bytes:
        """The bytes `[begin, end)` of a file; no others are read.

        Raises:
            FileNotFoundError, StorageUnavailable, UserError: see `until_answered`.
        """
        path = self._path_of(name)
        return until_answered(
            lambda: bytes(self.fs.cat_file(path, start=begin, end=end)), f"{self.url}/{name}"
        )

    def find_fault_of_zip(self, name: str, begin: int, end: int) -> str | None:
        """What is wrong with the zip in some bytes of a file, of which no others are read.

        None: its parts have the CRC-32 that is stored with them.

        Raises:
            StorageUnavailable: see `manifest`.
        """
        for _ in self._attempts():
            try:
                if _is_intact(self.read_part(name, begin, end)):
                    return None
            except ABSENT as error:
                return f"cannot be read: {error}"
        return "does not have the CRC-32 that is stored with it"

    def remove(self) -> None:
        """Delete the folder, its manifest first: half of it must not pass for a checkpoint.

        Raises:
            StorageUnavailable, UserError, OSError: see `with_retries`.
        """
        remove_if_exists(self.fs, self._path_of(MANIFEST))
        remove_if_exists(self.fs, self._path)


def _is_intact(stored: bytes) -> bool:
    """Whether all parts of a zip have their checksum, and none has become a folder."""
    try:
        parts = zipfile.ZipFile(io.BytesIO(stored))
        return parts.testzip() is None and not any(p.external_attr for p in parts.infolist())
    # What a flipped bit in its table leads to.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError):
        return False
