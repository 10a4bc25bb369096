"""`mhe bench index`: what an index costs at any number of samples, and whether the bounds hold."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from launcher.terminal import console


def index(
    samples: Annotated[int, typer.Option(min=1, help="Samples, in tars of 10,000.")] = 10_000_000,
    folder: Annotated[
        str, typer.Option(help="Where to write: 12 bytes a sample at most, removed at the end.")
    ] = ".",
) -> None:
    """Measure what the index of a data set of any size costs: synthetic columns, no tars.

    Up to 10^8 samples the bounds are those of 10^8; above, they grow to those of 10^9.

    Example: mhe bench index --samples 100_000_000
    """
    from pipelines.bench.index import measure_index

    Path(folder).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="mhe-bench-", dir=folder) as temporary,
        console.out.status("measuring"),
    ):
        lines = measure_index(Path(temporary), samples)
    table = Table("what", "figure", "bound", "", title=f"{samples:,} samples", title_justify="left")
    for line in lines:
        verdict = "[green]holds[/]" if line.holds else "[red]does not hold[/]"
        table.add_row(
            line.name,
            f"{line.figure:,.3g} {line.unit}",
            f"{line.bound:,.3g} {line.unit}",
            verdict,
        )
    console.out.print(table)
