"""Metrics that wait on disk until a server has them: no outage and no crash loses one.

A record is written here before it is queued, and the file is emptied when all of it has arrived. A
process that dies in between sends some records twice, with the same time and value; MLflow keeps
one of each.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from mhe_dist.atomic_file import write_file
from mhe_dist.tracking.base import Status

logger = logging.getLogger(__name__)


class MetricRecord(NamedTuple):
    """Metrics of a step."""

    step: int
    time_ms: int
    metrics: dict[str, float]


class RunEnd(NamedTuple):
    """How and when a run ended: the status of `base.Status`, and milliseconds."""

    status: Status
    time_ms: int


class Spool:
    """One file of JSON lines, and beside it the id of their run, and its end if that waits, too.

    Attributes:
        folder: where it is, in the folder of the run.
        lock: held while a record is added and queued, so that `clear` knows what was queued.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: made when it is missing."""
        self.folder, self.lock = folder, threading.RLock()
        self._file, self._id = folder / "waiting.jsonl", folder / "run_id"
        self._request, self._end = folder / "request", folder / "end.json"
        self._failed = False
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def run_id(self) -> str | None:
        """The run that the records belong to, if it was ever opened."""
        return self._id.read_text().strip() or None if self._id.exists() else None

    @run_id.setter
    def run_id(self, run_id: str) -> None:
        """Keep the id, if the disk has room."""
        try:
            write_file(str(self._id), run_id)
        except OSError as error:  # the checkpoints know the id, too
            logger.warning("the id of MLflow's run cannot be kept in %s: %s", self._id, error)

    @property
    def request(self) -> str:
        """What a run of MLflow is asked for by, so that it is made once.

        Whoever follows a process that was killed before it kept the id finds by this what it made.
        """
        with suppress(OSError):
            if not self._request.exists():
                write_file(str(self._request), uuid.uuid4().hex)
            return self._request.read_text()
        return uuid.uuid4().hex

    @property
    def end(self) -> RunEnd | None:
        """How the run ended, if MLflow was not told so far."""
        try:
            return RunEnd(*json.loads(self._end.read_text()))
        except (OSError, ValueError, TypeError):  # none, or torn by a full disk
            return None

    @end.setter
    def end(self, end: RunEnd | None) -> None:
        """Keep the end until MLflow is told, if the disk has room; None: it was, or goes on."""
        with suppress(OSError):
            if end is None:
                self._end.unlink(missing_ok=True)
            else:
                write_file(str(self._end), json.dumps(end))

    def pending(self, step: int) -> list[MetricRecord]:
        """The records that wait; those of steps >= `step`, recorded anew later, are dropped."""
        if not self._file.exists():
            return []
        lines = self._file.read_text(errors="replace").split("\n")
        found = (record for line in lines if (record := _record(line)))
        kept = [record for record in found if record.step < step]
        try:
            write_file(str(self._file), "".join(map(_line, kept)))
        except OSError as error:  # a full disk: the old file stands
            logger.warning("%s cannot be written anew: %s", self._file, error)
        return kept

    def add(self, record: MetricRecord) -> None:
        """Write a record; where the disk refuses it, that is logged once and the record is lost."""
        try:
            with self._file.open("ab", buffering=0) as file:
                _append(file, _line(record).encode())
        except OSError as error:
            if not self._failed:
                logger.warning("metrics cannot wait for MLflow in %s: %s", self._file, error)
            self._failed = True

    def clear(self) -> None:
        """Empty the file: all of it has arrived."""
        with self.lock, suppress(OSError):  # what stays is sent twice, and kept once
            if self._file.exists() and self._file.stat().st_size:
                self._file.write_text("")

    def __len__(self) -> int:
        if not self._file.exists():
            return 0
        return sum(map(bool, map(_record, self._file.read_text(errors="replace").split("\n"))))


def _append(file: FileIO, data: bytes) -> None:
    """Write all of it, or nothing: half a line would spoil the next one.

    Raises:
        OSError: the disk refuses it.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) or 0 :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def _record(line: str) -> MetricRecord | None:
    """The record of a line; None: it was torn, by a kill or a full disk."""
    try:
        return MetricRecord(*json.loads(line))
    except (ValueError, TypeError):
        return None


def _line(record: MetricRecord) -> str:
    return json.dumps(record) + "\n"
