"""What a run of this machine wrote down is read again, while it goes on and when it has ended."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.terminal import run_log
from launcher.terminal.event_log import EventLogWriter
from launcher.terminal.progress import ProgressDisplay
from launcher.terminal.run_log import RunLog, RunLogReader
from mhe_dist.errors import Preempted, RunError, UserError

WARNING = {"event": "warning", "step": 3, "message": "careful"}


def write(path: Path, error: Exception | None = None, events: int = 1) -> str:
    """A run that ends as the error says; returns what was shown."""
    shown = io.StringIO()
    with RunLog(ProgressDisplay(Console(file=shown, width=200)), path) as log:
        log.waiting("starting")
        for _ in range(events):
            log.handle(dict(WARNING))
        if error:
            raise error
    return shown.getvalue()


def test_it_is_shown_and_written_down(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.log"
    assert write(path).splitlines() == ["starting", "step 3  warning: careful"]
    reader = RunLogReader(path)
    begun, event, ended = reader.lines()
    assert begun.startswith("began: process ") and ended.endswith("exit code 0")
    assert event.startswith('{"event": "warning"')
    assert reader.exit_code == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(Preempted("told"), 75), (UserError("x"), 2), (RunError("x"), 1), (ValueError("x"), 1)],
)
def test_it_ends_as_the_run_did(error: Exception, code: int, tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    with pytest.raises(type(error)):
        write(path, error)
    reader = RunLogReader(path)
    assert len(list(reader.lines(follow=True))) == 3
    assert reader.exit_code == code


def test_the_last_start_is_read_and_one_without_an_event_is_none(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    with pytest.raises(Preempted):
        write(path, Preempted("told"))
    write(path, events=2)
    with pytest.raises(ValueError, match="refused"):
        write(path, ValueError("refused"), events=0)
    reader = RunLogReader(path)
    assert sum("warning" in line for line in reader.lines()) == 2
    assert reader.exit_code == 0


def test_a_run_that_goes_on_is_followed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.log"
    write(path)
    whole = path.read_text()
    path.write_text(whole[:60])

    def more() -> Iterator[str]:
        for stop in range(60, len(whole) + 7, 7):
            yield whole[stop : stop + 7]

    parts = more()

    def go_on(_: float) -> None:
        with path.open("a") as file:
            file.write(next(parts))

    monkeypatch.setattr(run_log.time, "sleep", go_on)
    reader = RunLogReader(path, is_alive=lambda process: True)
    assert "\n".join(reader.lines(follow=True)) == whole.strip()
    assert reader.exit_code == 0


def test_a_process_that_was_killed_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.log"
    write(path)
    path.write_text(path.read_text().partition("ended")[0])
    monkeypatch.setattr(run_log.time, "sleep", lambda _: None)
    reader = RunLogReader(path, is_alive=lambda process: False)
    assert list(reader.lines(follow=True))[-1].endswith("ended without a word")
    assert reader.exit_code == 1


def test_a_full_disk_ends_no_run(tmp_path: Path) -> None:
    full = tmp_path / "run.log"
    full.symlink_to("/dev/full")
    assert write(full, events=2).count("warning: careful") == 2
    with pytest.raises(Preempted):
        write(full, Preempted("told"))


def test_lines_that_waited_for_a_full_disk_come_when_there_is_room(tmp_path: Path) -> None:
    class Disk(io.RawIOBase):
        full, content = True, b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.content += bytes(data)
            return len(data)

    disk = Disk()
    log = EventLogWriter(io.TextIOWrapper(io.BufferedWriter(disk)))
    log.handle(dict(WARNING))
    disk.full = False
    log.handle({"event": "end", "uri": "postgresql://me:planted@db"})
    first, second = (json.loads(line) for line in disk.content.decode().splitlines())
    assert (first["event"], second["uri"]) == ("warning", "postgresql://***@db")
