"""`mhe bench checkpoint`: how long a save holds up training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from launcher.terminal import console


def checkpoint(
    mib: Annotated[int, typer.Option(help="Size of the state in MiB.", min=1)] = 1024,
    rounds: Annotated[int, typer.Option(help="Measurements of each kind.", min=1)] = 3,
    folder: Annotated[str, typer.Option(help="Where to write; a temporary folder.")] = ".",
) -> None:
    """Compare a save with torch.save of the same state, and with the disk's own pace.

    Example: mhe bench checkpoint --mib 1024
    """
    from pipelines.bench import checkpoint as benchmark

    with tempfile.TemporaryDirectory(prefix="mhe-bench-", dir=folder) as place:
        figures = benchmark.measure(Path(place), mib * benchmark.MIB, rounds)
    table = Table("what", "seconds", "MiB/s", box=None)
    size = figures.bytes / benchmark.MIB
    for what, seconds in [
        ("training waits for a save", figures.blocked_s),
        ("a save, to its manifest", figures.written_s),
        ("torch.save and fsync", figures.plain_s),
        ("the bytes alone and fsync", figures.disk_s),
    ]:
        table.add_row(what, f"{seconds:.2f}", f"{size / seconds:,.0f}")
    console.out.print(table)
    console.say(f"A save holds up training for {figures.blocked:.3f} of a synchronous one.")
