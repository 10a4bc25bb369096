"""`metrics.jsonl`: the record of a run that everything else can be rebuilt from."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from io import BytesIO, FileIO
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mhe_dist.atomic_file import replaced_file
from mhe_dist.errors import RunError, UserError
from mhe_dist.storage_retry import until_answered
from mhe_dist.tracking.base import Metrics, Status, TrackedDataset
from mhe_dist.tracking.remote_file import RemoteCopy, iter_parts

logger = logging.getLogger(__name__)


class JsonlTracker:
    """One JSON line for each `log`: `{"step": 10, "time": <Unix seconds>, "loss": 4.2}`.

    Every line is handed to the operating system before `log` returns, so it outlives the process
    (at a URL, the last minute may not: see `RemoteCopy`). Floats keep all their digits; what is not
    finite is written as `"nan"`, `"inf"`, `"-inf"`. Lines that the disk refuses wait, and are
    written with the next ones.
    """

    run_id: str | None = None
    page = ""
    problem = ""

    def __init__(self, path: str) -> None:
        """Args: path: the file, or its fsspec URL; its folder is made when it is missing."""
        self._name = path
        self._path = Path(path)
        self._copy: RemoteCopy | None = None
        self._file: FileIO | None = None
        self._size: int | None = None  # of the lines in the file; None: not started
        self._waiting: list[str] = []

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Drop the lines of steps >= `step` and open the file; config and tags are not kept."""
        if "://" in self._name:
            self._path = Path(tempfile.mkdtemp(prefix="mhe-")) / self._path.name
            self._copy = RemoteCopy(self._path, self._name)
            self._copy.fetch()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _replace(self._path, (_line(r) for r in iter_records(self._path) if r["step"] < step))
        if self._copy:
            self._copy.resume()
        self._size = self._path.stat().st_size

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line. Where the disk refuses it, it is logged and waits for the next one.

        Raises:
            RunError: there is no `start` before.
        """
        if self._size is None:
            raise RunError(f"{self._name}: log() before start()")
        self._waiting.append(_line({"step": step, "time": round(time.time(), 3), **metrics}))
        self._write()
        if self._copy:
            self._copy.update()

    def _write(self) -> None:
        """Write all waiting lines; some only as long as the disk fails in between."""
        try:
            self._append("".join(self._waiting).encode())
        except OSError as error:
            if not self.problem:  # counted and told again when it ends
                logger.error("%s: cannot be written, will go on trying: %s", self._name, error)
                self.problem = f"{self._name}: lines wait, as it cannot be written: {error}"
        else:
            if self.problem:
                logger.warning("%s: %d lines came late", self._name, len(self._waiting))
            self.problem, self._waiting = "", []

    def _append(self, data: bytes) -> None:
        """Add all of it to the file, or nothing that a reader sees as a line.

        A disk that failed may have lost the open file, and may have kept half a line.
        """
        assert self._size is not None
        try:
            if self._file is None:
                self._file = self._path.open("r+b", buffering=0)
                self._file.truncate(self._size)
                self._file.seek(self._size)
            left = data
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError:
            self._forget_file()
            raise
        self._size += len(data)

    def _forget_file(self) -> None:
        """Close the file without the half of a line that it may end with."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.truncate(self._size)
            with suppress(OSError):
                file.close()

    def artifact(self, path: str, folder: str = "") -> None:
        """Nothing: the run's folder holds its files already."""

    def model(self, path: str, name: str) -> None:
        """Nothing: the run's folder holds it already."""

    def dataset(self, dataset: TrackedDataset) -> None:
        """Keep nothing: the digest is in every checkpoint."""

    def note(self, text: str) -> None:
        """Keep nothing: `summary.json` has the figures."""

    def flush(self) -> None:
        """Bring the copy at a URL up to date."""
        if self._size is not None:
            self._write()
            if self._copy:
                self._copy.finish()

    def close(self, status: Status = "finished") -> None:
        """Close the file; the temporary one of a record at a URL goes once all of it is there."""
        if self._size is not None:
            self._write()
            if self._waiting:
                self.problem = f"{self._name}: {len(self._waiting)} lines are lost ({self.problem})"
                logger.error("%s", self.problem)
            self._forget_file()
            self._size = None
            if self._copy and self._copy.finish():
                shutil.rmtree(self._path.parent)  # it was temporary


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, a path or fsspec URL, in their order; none without a file.

    All of them are in memory, about a kilobyte for a step; see `iter_records`.

    Raises:
        UserError: a line that is not the last is no record.
    """
    return list(iter_records(path))


def iter_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The same lines one after the other: a long run has a million.

    At a URL they are in parts (`RemoteCopy`). A last line that a killed process left unfinished is
    ignored.

    Raises:
        UserError: see `read_records`.
        StorageUnavailable: the disk or the store gives no answer.
    """
    filesystem, file = fsspec.core.url_to_fs(str(path))
    for part in iter_parts(filesystem, file):
        name = f"{path}".removesuffix(file.rpartition("/")[2]) + part.rpartition("/")[2]
        with until_answered(partial(_open, filesystem, part), name) as stream:
            for number, line in enumerate(stream, 1):
                if line.endswith(b"\n"):
                    yield _record(name, number, line)


def _open(filesystem: Any, part: str) -> IO[bytes]:
    """A file of this machine; of one in a store all bytes, as a stream may fail at any of them."""
    if isinstance(filesystem, LocalFileSystem):
        return open(part, "rb")
    return BytesIO(filesystem.cat_file(part))


def _record(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        # The names are the same in all records, and would take most of their memory.
        values = {sys.intern(k): float(v) if isinstance(v, str) else v for k, v in record.items()}
        return values | {"step": int(record["step"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}:{number}: not a record ({error}): move the file away, or remove the line"
        ) from error


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({k: _plain(v) for k, v in record.items()}, allow_nan=False) + "\n"


def _plain(value: float) -> float | int | str:
    return value if math.isfinite(value) else str(float(value))


def _replace(path: Path, lines: Iterable[str]) -> None:
    with replaced_file(str(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)
