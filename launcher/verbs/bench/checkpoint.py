"""`mhe bench checkpoint`: how long a save holds up training."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.outputs import scratch_folder
from mhe_dist.sizes import MIB


def checkpoint(
    mib: Annotated[int, typer.Option(help="Size of the state in MiB.", min=1)] = 1024,
    rounds: Annotated[int, typer.Option(help="Measurements of each kind.", min=1)] = 3,
    folder: Annotated[str, typer.Option(help="Where to write; a temporary folder.")] = ".",
) -> None:
    """Compare a save with torch.save of the same state, and with the speed of the disk alone.

    Example: mhe bench checkpoint --mib 1024
    """
    from pipelines.bench.checkpoint import measure_saves

    with scratch_folder(folder) as temporary:
        times = measure_saves(temporary, mib * MIB, rounds)
    table = Table("what", "seconds", "MiB/s", box=None)
    size = times.bytes / MIB
    for what, seconds in [
        ("training waits for a save", times.blocked_s),
        ("a save, to its manifest", times.written_s),
        ("torch.save and fsync", times.plain_s),
        ("the bytes alone and fsync", times.disk_s),
    ]:
        table.add_row(what, f"{seconds:.2f}", f"{size / seconds:,.0f}")
    console.print_table(table)
    console.say(f"A save holds up training for {times.blocked:.3f} of a synchronous one.")
