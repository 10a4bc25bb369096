"""Long work that can be interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.markup import escape

from launcher.signals import Interrupted, interruptible
from launcher.terminal import console
from launcher.terminal.commands import invoked_command


@contextmanager
def resumable() -> Iterator[None]:
    """Work that can be interrupted and goes on with the same command."""
    try:
        with interruptible():
            yield
    except Interrupted as stop:
        console.say(
            "[yellow]Stopped.[/] What is finished is kept; the same command goes on with it:\n"
            f"  [cyan]{escape(invoked_command())}[/]"
        )
        raise typer.Exit(stop.exit_code) from None
