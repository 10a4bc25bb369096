"""A table of figures beside their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from launcher.terminal import console

if TYPE_CHECKING:
    from pipelines.bench.scale.bounds import BoundedFigure


def list_bounds(title: str, lines: Sequence[BoundedFigure]) -> None:
    """Print what was measured, the most that it may be, and whether that holds."""
    table = Table("what", "figure", "bound", "", title=title, title_justify="left")
    for line in lines:
        verdict = "[green]holds[/]" if line.holds else "[red]does not hold[/]"
        figure, bound = (f"{value:,.3g} {line.unit}".strip() for value in (line.figure, line.bound))
        table.add_row(line.name, figure, bound, verdict)
    console.print_table(table)
