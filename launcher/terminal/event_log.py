"""Events as lines of a job's log: one JSON object each, for `mhe logs`, for grep and for jq."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from launcher.events import Event
from launcher.terminal.progress import announce_once
from mhe_dist.redact import masked
from pipelines.storage.full_disk import full_disk_borne

_START = '{"event": '


class EventLogWriter:
    """Writes what goes on in a run as lines; a `launcher.execute.Watcher`."""

    def __init__(self, sink: IO[str]) -> None:
        """Args: sink: an open text file, such as standard output."""
        self._sink = sink

    def waiting(self, what: str) -> None:
        """Write that something begins."""
        self.handle({"event": "waiting", "what": what})

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Write that something begins, once it does."""
        yield announce_once(self.waiting, what)

    def handle(self, event: Event) -> None:
        """Write an event without secrets, and when it was.

        Where the disk is full the line waits in memory: the next one takes it along.
        """
        line = json.dumps({**masked(event), "time": round(time.time(), 3)}) + "\n"
        with full_disk_borne():
            self._sink.write(line)
            self._sink.flush()


def parse_event(line: str) -> Event | None:
    """The event that a line holds; None for a line of another kind."""
    if not line.startswith(_START):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def parse_error(log: str) -> str:
    """The error that a job's log ends with, as `launcher.job` worded it; empty: there is none."""
    _, found, message = f"\n{log}".rpartition("\nerror: ")
    return message.strip() if found else ""


def split_lines(chunks: Iterator[str]) -> Iterator[str]:
    """Whole lines, without their ends, of a text that arrives in pieces."""
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        yield from lines
    if rest:
        yield rest
