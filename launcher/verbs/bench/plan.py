"""`mhe bench plan`: what a run needs on a cluster that is not here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.options import ConfigFile, Overrides
from mhe_dist.config.load import load_config
from pipelines.shards.index import ShardIndex, index_exists


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    classes: Annotated[
        int | None,
        typer.Option(min=2, max=10**12, help="Left out: the data's; 1,000,000 if it is not here."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**12,
            help="Images, in tars of 10,000. Left out: the data's; 10,000,000 if it is not here.",
        ),
    ] = None,
    per_node: Annotated[int, typer.Option(min=1, max=2**16, help="GPUs of a node.")] = 8,
    write_rate: Annotated[
        float, typer.Option(min=0.001, help="GB/s that a node writes into the checkpoints' store.")
    ] = 1.0,
) -> None:
    """Count what a run would need on scale.workers GPUs: memory, traffic of a step, checkpoints.

    Neither the GPUs nor the data need to be there: shapes decide. Each line says whether it was
    counted, follows from a formula or was measured elsewhere. Times of steps are not predicted.

    Example: mhe bench plan webface42m_r100 scale.workers=64 head.groups=64 train.global_batch=8192
    --classes 10_000_000 --samples 100_000_000
    """
    from pipelines.bench.counted.run_costs import cost_of_run

    loaded = load_config(config, overrides or [])
    data = loaded.data
    is_whole = data.shards and not (data.mix or data.classes or data.images_per_class)
    index = ShardIndex.load(data.shards) if is_whole and index_exists(data.shards) else None
    classes = classes or (index.num_classes if index else 1_000_000)
    samples = samples or (index.samples if index else 10_000_000)
    with console.status("counting a step"):
        found = cost_of_run(loaded, classes, samples, per_node, write_rate)
    console.say(f"For {classes:,} classes and {samples:,} images:\n")
    for title, lines in found.items():
        table = Table(title, "", "how it was found", box=None, title_justify="left")
        for line in lines:
            table.add_row(line.name, line.figure, f"[dim]{line.source}[/]")
        console.print_table(table)
        console.out.print()
