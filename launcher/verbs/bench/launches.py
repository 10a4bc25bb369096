"""`mhe bench launches`: what a step of each head asks of a GPU, counted without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from launcher.terminal import console
from mhe_dist.errors import UserError

if TYPE_CHECKING:
    from pipelines.bench.launches import StepCost


def launches(
    head: Annotated[
        str, typer.Option(help="Show all variants of route, gather, partial_fc, full, mhp or mhc.")
    ] = "",
    lines: Annotated[
        bool, typer.Option("--lines", help="Name the lines of code that wait or move the most.")
    ] = False,
) -> None:
    """Count launches, waits of the host, bytes and memory of one step, without a GPU.

    Rank 3 of 8, 2 million classes, embeddings of 512 (16 where rows are in host memory or a file),
    128 images per rank, heads of 128 classes, 321 extra heads. Nothing is computed: torch's own
    rules for shapes and devices say what a GPU would have to do. Launches are lower bounds.

    Example: mhe bench launches --head route --lines
    """
    from pipelines.bench.launches import CASES, HEADS, count_step

    if head and head not in HEADS:
        raise UserError(f"--head {head}: there is {', '.join(HEADS)}")
    names = [name for name in CASES if name.split()[0] == head] if head else list(HEADS)
    costs: dict[str, StepCost] = {}
    for number, name in enumerate(names, 1):
        with console.out.status(f"{number} of {len(names)}: {name}"):
            costs[name] = count_step(CASES[name])
    console.out.print(_table(costs))
    if lines:
        for name, cost in costs.items():
            console.say(f"[bold]{name}[/]\nwaits:\n{cost.ledger.waits() or '  nowhere'}")
            console.say(f"moves the most:\n{cost.ledger.heaviest(8)}")


def _table(costs: dict[str, StepCost]) -> Table:
    table = Table("step", box=None)
    for column in ("launches", "syncs", "GB moved", "GFLOP", "peak MB"):
        table.add_column(column, justify="right")
    for name, cost in costs.items():
        table.add_row(
            name,
            f"{cost.launches:,}",
            f"{cost.syncs:,}",
            f"{cost.moved / 1e9:.2f}",
            f"{cost.flops / 1e9:,.1f}",
            f"{cost.peak / 1e6:,.0f}",
        )
    return table
