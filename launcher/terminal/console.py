"""The terminal: one console for results, one for errors, and how both look."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from rich.text import Text

from launcher.terminal.commands import command_line
from mhe_dist.redact import scrub

# Without emoji: rich takes `:100:` in the name of a file for one.
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def say(text: str) -> None:
    """Print a line of rich markup; the terminal wraps it, so that paths can be copied."""
    out.print(text, soft_wrap=True)


def error(text: str) -> None:
    """Print plain text, a mistake or a failure, to standard error, without secrets."""
    err.print(f"[bold red]error:[/] {escape(scrub(text))}", soft_wrap=True)


def note(text: str) -> None:
    """Print plain text that is no result, like `error`, where it spoils no output."""
    err.print(f"[yellow]note:[/] {escape(scrub(text))}", soft_wrap=True)


def status(what: str) -> Status:
    """A spinner beside plain text, while the block goes on."""
    return out.status(Text(what))


def show_table(title: str, table: Table) -> None:
    """Print a table below its title, which a title of the table itself would be wrapped to fit."""
    say(f"[bold]{escape(title)}[/]")
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table; what is wider than its column goes on below, so that nothing is cut off."""
    for column in table.columns:
        column.overflow = "fold"
    out.print(table)


def list_next(rows: Iterable[tuple[str, str | Sequence[str]]]) -> None:
    """Print what to do next: rows of what it does, and the words of a command or a link."""
    list_rows(
        "Next",
        [(what, step if isinstance(step, str) else command_line(step)) for what, step in rows],
    )


def list_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print `(what it is, path or command)` rows under a title; nothing without rows."""
    if not (rows := list(rows)):
        return
    width = max(len(what) for what, _ in rows)
    say(f"\n[bold]{title}[/]")
    for what, command in rows:
        say(f"  {escape(what.ljust(width))}  [cyan]{escape(command)}[/]")


@contextmanager
def capture_logs(log: Path) -> Iterator[None]:
    """Append to `log` whatever is printed inside the block except by our consoles.

    Libraries write to the file descriptors, from native code and other threads too, so these are
    redirected.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    terminals = [
        os.fdopen(os.dup(stream.fileno()), "w", errors="backslashreplace")
        for stream in (sys.stdout, sys.stderr)
    ]
    consoles = (out, err)
    files = [console.file for console in consoles]
    with log.open("ab") as sink:
        _point_output_at(sink.fileno(), sink.fileno())
    for console, terminal in zip(consoles, terminals, strict=True):
        console.file = terminal
    try:
        yield
    finally:
        for console, file, terminal in zip(consoles, files, terminals, strict=True):
            terminal.flush()
            console.file = file
        _point_output_at(*(terminal.fileno() for terminal in terminals))
        for terminal in terminals:
            terminal.close()


def _point_output_at(stdout: int, stderr: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
