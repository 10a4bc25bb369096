"""`mhe bench launches`: what a step of each head asks of a GPU, counted without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from launcher.terminal import console
from mhe_dist.errors import UserError

if TYPE_CHECKING:
    from pipelines.bench.fake_cuda.step_cost import StepCost


def launches(
    head: Annotated[
        str, typer.Option(help="Show all variants of route, gather, partial_fc, full, mhp or mhc.")
    ] = "",
    engine: Annotated[
        bool, typer.Option("--engine", help="Show the engine at ZeRO 0 to 3 instead of the heads.")
    ] = False,
    lines: Annotated[
        bool, typer.Option("--lines", help="Name the lines of code that wait or move the most.")
    ] = False,
) -> None:
    """Count launches, waits of the host, bytes and memory of one step, without a GPU.

    Rank 3 of 8, 2 million classes, embeddings of 512 (16 where rows are in host memory or a file),
    128 images per rank, heads of 128 classes, 321 extra heads. Nothing is computed: torch's own
    rules for shapes and devices say what a GPU would have to do. Launches are lower bounds.
    Names with tf32 have products in TF32, as bf16 runs do; GFLOP leave out what kernels multiply.
    The engine, with DeepSpeed's part, is counted on a small network.

    Example: mhe bench launches --head route --lines
    """
    from pipelines.bench.counted.launches import CASES, HEADS, SUMMARY, count_step

    if head and head not in HEADS:
        raise UserError(f"--head {head}: there is {', '.join(HEADS)}")
    if engine and head:
        raise UserError(f"--engine counts no head: leave out --head {head}, or --engine")
    names = [name for name in CASES if name.split()[0] == head] if head else SUMMARY
    counts = {name: partial(count_step, CASES[name]) for name in names}
    costs = _count(_engine_counts() if engine else counts)
    console.print_table(_table(costs))
    if lines:
        for name, cost in costs.items():
            console.say(f"[bold]{name}[/]\nwaits:\n{cost.ledger.waits() or '  nowhere'}")
            console.say(f"moves the most:\n{cost.ledger.heaviest(8)}")


def _engine_counts() -> dict[str, Callable[[], StepCost]]:
    from pipelines.bench.fake_cuda.engine_step import ENGINE_CASES, count_engine_step

    return {name: partial(count_engine_step, case) for name, case in ENGINE_CASES.items()}


def _count(counts: Mapping[str, Callable[[], StepCost]]) -> dict[str, StepCost]:
    costs = {}
    for number, (name, count) in enumerate(counts.items(), 1):
        with console.status(f"{number} of {len(counts)}: {name}"):
            costs[name] = count()
    return costs


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
