"""A job's output, drawn as the run itself would be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.markup import escape

from launcher.terminal import console
from launcher.terminal.event_log import parse_event
from launcher.terminal.progress import ProgressDisplay


def replay_log(lines: Iterable[str]) -> dict[str, Any] | None:
    """Draw the lines of a job's output by the clock of its events.

    Returns:
        The run's summary, if it got so far.
    """
    now = 0.0
    with ProgressDisplay(clock=lambda: now) as display:
        for line in lines:
            event = parse_event(line)
            if event is None:
                console.say(escape(line))
            else:
                now = event.get("time", now)
                display.handle(event)
    return display.summary
