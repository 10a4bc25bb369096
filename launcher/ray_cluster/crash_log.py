"""What a rank's log says of a process that a signal killed: no exception tells of it.

Python's faulthandler writes where it was into the log; the process that follows, or the driver,
reads it there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

TRIAL_FUNCTION: Final = "refuse_untrainable"  # of mhe_dist.engine.first_pass
_TAIL: Final = 1 << 18  # bytes of the log that are read
_BEGIN: Final = re.compile(r"^--- a process of (.*) begins$", re.MULTILINE)
_FATAL: Final = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)
_FRAME: Final = re.compile(r'^  File "(.+)", line (\d+) in (\S+)$', re.MULTILINE)
_LIBRARIES: Final = ("/torch/", "/deepspeed/", "/ray/")
_SHOWN: Final = 3  # parts of a file's path
_IN_TRIAL: Final = "(the first pass of the backbone)"


def begin_line(command: str) -> str:
    """The line with which a process of a command begins its part of the log."""
    return f"--- a process of {command} begins"


def find_crash(log: Path, command: str) -> str:
    """How a signal killed the last process of a log, and where it was; empty if none did.

    Args:
        log: of a rank; it need not exist.
        command: the key of the command that must have started the process; else it is history.
    """
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        text = file.read().decode("utf-8", "replace")
    *_, begun = [None, *_BEGIN.finditer(text)]
    fatal = _FATAL.search(text, begun.end()) if begun and begun[1] == command else None
    if fatal is None:
        return ""
    frames = _FRAME.findall(text[fatal.end() :])
    ours = next((f for f in frames if not any(part in f[0] for part in _LIBRARIES)), None)
    places = list(dict.fromkeys(f for f in (*frames[:1], ours) if f))
    where = ", called from ".join(_describe(frame) for frame in places)
    during = f" {_IN_TRIAL}" if _in_trial(frames) else ""
    return f"killed by a signal: {fatal[1]}{' in ' if where else ''}{where}{during}; see {log}"


def killed_by_backbone(crash: str) -> bool:
    """Whether that happened in the trial of the backbone, where it would happen again."""
    return _IN_TRIAL in crash


def _in_trial(frames: list[tuple[str, str, str]]) -> bool:
    return any(function == TRIAL_FUNCTION for _, _, function in frames)


def _describe(frame: tuple[str, str, str]) -> str:
    file, line, function = frame
    return f"{'/'.join(Path(file).parts[-_SHOWN:])}:{line} {function}"
