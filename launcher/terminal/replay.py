"""A job's output, drawn as the run itself would be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.markup import escape

from launcher.terminal import console
from launcher.terminal import event_log as event_lines
from launcher.terminal.progress import Display


def draw(lines: Iterable[str]) -> dict[str, Any] | None:
    """Draw the lines of a job's output by the clock of its events.

    Returns:
        The run's summary, if it got so far.
    """
    now = 0.0
    with Display(clock=lambda: now) as display:
        for line in lines:
            event = event_lines.parse(line)
            if event is None:
                console.say(escape(line))
            else:
                now = event["time"]
                display.handle(event)
    return display.summary
