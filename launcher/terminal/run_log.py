"""What a run of this machine did, written down beside it for `mhe logs`, and read again."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO

from launcher.events import Event
from launcher.terminal.event_log import EventLogWriter
from launcher.terminal.progress import ProgressDisplay
from pipelines.storage.full_disk import full_disk_borne

RUN_LOG = "run.log"
_POLL_S = 0.5
_BEGAN = re.compile(r"began: process (\d+) on (\S+), ")
_ENDED = re.compile(r"ended: process (\d+) on (\S+), exit code (\d+)")


class RunLog:
    """Shows a run, and writes its events down; a `launcher.execute.Watcher`.

    A context manager around the run. The file has a first and a last line for each time that the
    run is started; a start that comes to no event, such as one that is refused, leaves none.

    Args:
        display: shows the run.
        path: of the file; lines are added to it.
    """

    def __init__(self, display: ProgressDisplay, path: Path) -> None:
        self._display, self._path = display, path
        self._file: IO[str] | None = None
        self._writer: EventLogWriter | None = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        code = 0 if error is None else getattr(error, "exit_code", 1)
        with full_disk_borne():
            self._file.write(f"ended: {_this_process()}, exit code {code}\n")
        with full_disk_borne():
            self._file.close()

    def waiting(self, what: str) -> None:
        """Show that something begins."""
        self._display.waiting(what)

    def counting(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show work that is not the run."""
        return self._display.counting(what)

    def handle(self, event: Event) -> None:
        """Show an event, and write it down if the disk has room."""
        with full_disk_borne():
            self._open().handle(event)
        self._display.handle(event)

    def _open(self) -> EventLogWriter:
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.write(f"began: {_this_process()}, {now}\n")
            self._writer = EventLogWriter(self._file)
        return self._writer


class RunLogReader:
    """Reads what a run wrote down the last time that it was started.

    Args:
        path: of the file.
        is_alive: whether a process of this machine runs; for tests.

    Attributes:
        exit_code: of the run, once it has ended; 1 if it ended without a word; None before.
    """

    def __init__(self, path: Path, is_alive: Callable[[int], bool] | None = None) -> None:
        self._path, self._is_alive = path, is_alive or _is_alive
        self.exit_code: int | None = None

    def lines(self, follow: bool = False) -> Iterator[str]:
        """Its lines; with `follow` until the run has ended, as they come."""
        rest, process = "", (0, "")
        with self._path.open(encoding="utf-8", errors="replace") as file:
            file.seek(_last_start(self._path))
            while True:
                is_alive = process[1] != socket.gethostname() or self._is_alive(process[0])
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    if begun := _BEGAN.match(line):
                        process = (int(begun[1]), begun[2])
                    if ended := _ENDED.match(line):
                        self.exit_code = int(ended[3])
                    yield line
                if self.exit_code is not None or not follow:
                    return
                if not lines and not is_alive:
                    self.exit_code = 1
                    yield f"{process[1]}: process {process[0]} ended without a word"
                    return
                time.sleep(_POLL_S)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _last_start(path: Path) -> int:
    """Where the last start begins, in bytes."""
    position, found = 0, 0
    with path.open("rb") as file:
        for line in file:
            found = position if line.startswith(b"began: ") else found
            position += len(line)
    return found


def _is_alive(process: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(process))
