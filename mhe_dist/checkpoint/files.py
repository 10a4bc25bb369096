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
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecWriter

from mhe_dist.checkpoint.step_folder import MANIFEST

RUN = "run.json"
SCORES = "scores.json"
FORMAT = 1
_CHUNK = 1 << 22
_WAITS_S = (0.5, 2.0)  # before the further attempts at reading from a store


@dataclass(frozen=True)
class FileEntry:
    """The manifest's entry of a file: its size, and CRC-32 as 8 hexadecimal digits."""

    bytes: int
    crc32: str


class ChecksumWriter(FsspecWriter):
    """torch.distributed.checkpoint's writer to any fsspec URL, which remembers what it wrote.

    Attributes:
        entries: file name -> size and checksum, of the files that this rank wrote.
    """

    def __init__(self, path: str) -> None:
        local = isinstance(fsspec.core.url_to_fs(path)[0], LocalFileSystem)
        super().__init__(path, sync_files=local)
        recording = _RecordingFileSystem()
        self.fs = recording  # type: ignore[assignment]
        self.path = recording.init_path(path)
        self.entries: dict[str, FileEntry] = recording.entries


class _RecordingFileSystem(FileSystem):
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
            yield recorded
        self.entries[os.path.basename(path)] = recorded.entry

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.entries[os.path.basename(new_path)] = self.entries.pop(os.path.basename(path))


class _ChecksumStream:
    """A stream that is written from front to back, with the checksum of what went through it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._bytes = 0
        self._crc = 0

    def write(self, data: Any) -> int:
        self._crc = zlib.crc32(data, self._crc)
        self._bytes += memoryview(data).nbytes
        return self._stream.write(data)

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


class Unreadable(str):
    """Why a manifest could not be read, perhaps for the moment: it says nothing of the files."""


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
        """Write a small file as a whole or not at all; object stores do that by themselves."""
        local = isinstance(self.fs, LocalFileSystem)
        target = self._path_of(f"{name}.tmp" if local else name)
        with self.fs.open(target, "wb") as file:
            file.write(data)
            if local:
                file.flush()
                os.fsync(file.fileno())
        if local:
            os.replace(target, self._path_of(name))

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the folder."""
        return json.loads(self.fs.cat_file(self._path_of(name)))

    def manifest(self) -> dict[str, FileEntry] | str:
        """The files of the checkpoint, or the reason why this is none (sizes are compared).

        `Unreadable` is a reason that tells nothing: the disk or the store gave no answer.
        """
        reason = ""
        for _ in self._attempts():
            try:
                return self._read_manifest()
            except Exception as error:  # stores raise what they like: gcsfs no OSError
                reason = f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
                if isinstance(error, FileNotFoundError):  # a folder that is still to be written
                    break
                if not isinstance(error, (ValueError, KeyError, TypeError)):  # of what was read
                    reason = Unreadable(reason)
        return reason

    def _attempts(self) -> Iterator[None]:
        """A turn for each attempt at reading; a store, but no disk, may fail for the moment.

        To pass over a good checkpoint loses the work since the one before.
        """
        yield
        for wait in () if isinstance(self.fs, LocalFileSystem) else _WAITS_S:
            time.sleep(wait)
            yield

    def _read_manifest(self) -> dict[str, FileEntry] | str:
        """See `manifest`; raises what a damaged one or a store raises."""
        listed = {entry["name"]: entry["size"] for entry in self.fs.ls(self._path, detail=True)}
        sizes = {os.path.basename(name.rstrip("/")): size for name, size in listed.items()}
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
        """The first file whose checksum is not the manifest's, in words; None: there is none."""
        for name, entry in files:
            for _ in self._attempts():
                fault = self._fault(name, entry)
                if fault is None:
                    break
            else:
                return fault
        return None

    def _fault(self, name: str, entry: FileEntry) -> str | None:
        """What one attempt at reading a file finds wrong with it."""
        size = crc = 0
        try:
            with self.fs.open(self._path_of(name), "rb") as file:
                while chunk := file.read(_CHUNK):
                    size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        except Exception as error:  # see `manifest`
            return f"{name} cannot be read: {error}"
        if size != entry.bytes:
            return f"{name} gave {size} bytes, {MANIFEST} says {entry.bytes}"
        if f"{crc:08x}" != entry.crc32:
            return f"{name} has CRC-32 {crc:08x}, {MANIFEST} says {entry.crc32}"
        return None

    def find_fault_of_zip(self, name: str, begin: int, end: int) -> str | None:
        """What is wrong with the zip in some bytes of a file, of which no others are read.

        None: its parts have the CRC-32 that is stored with them.
        """
        for _ in self._attempts():
            try:
                stored = self.fs.cat_file(self._path_of(name), start=begin, end=end)
            except Exception as error:  # see `manifest`
                fault = f"cannot be read: {error}"
                continue
            if _is_intact(stored):
                return None
            fault = "does not have the CRC-32 that is stored with it"
        return fault

    def remove(self) -> None:
        """Delete the folder, its manifest first: half of it must not pass for a checkpoint."""
        self.fs.invalidate_cache()
        if self.fs.exists(self._path_of(MANIFEST)):
            self.fs.rm_file(self._path_of(MANIFEST))
        if self.fs.exists(self._path):
            self.fs.rm(self._path, recursive=True)


def _is_intact(stored: bytes) -> bool:
    """Whether all parts of a zip have their checksum, and none has become a folder."""
    try:
        parts = zipfile.ZipFile(io.BytesIO(stored))
        return parts.testzip() is None and not any(p.external_attr for p in parts.infolist())
    # What a flipped bit in its table leads to.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError):
        return False
