"""`mhe bench classifier`: what each head's exported classifier costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.outputs import scratch_folder, usable_folder_here
from mhe_dist.errors import UserError
from mhe_dist.sizes import GIB

if TYPE_CHECKING:
    from pipelines.bench.classifier import ClassifierCost


def classifier(
    classes: Annotated[int, typer.Option(min=4, help="Classes.")] = 1_000_000,
    dim: Annotated[int, typer.Option(min=1, help="Numbers of an embedding.")] = 512,
    top: Annotated[int, typer.Option(min=1, help="Classes of an answer.")] = 5,
    checked: Annotated[
        int, typer.Option(min=1, help="Embeddings compared with a search in float64.")
    ] = 256,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the processor.")] = 1,
    kinds: Annotated[str, typer.Option(help="Of full, mhp, mhc; with commas.")] = "full,mhp,mhc",
    out: Annotated[
        str, typer.Option(help="Folder for classifier.json.", callback=usable_folder_here)
    ] = "runs/bench",
) -> None:
    """Measure what a head costs once it is exported: size, time of an answer, the best class found.

    As mhe export --classify writes it, without a backbone: embeddings in, classes out. mhs and
    partial_fc are written as full is. mhp and mhc have two digits of about the root of the classes.
    The rows are random; an embedding is the sum of the rows of a class, with noise as long. A head
    that does not fit into the memory that is free now is left out and named.

    Example: mhe bench classifier --classes 100_000
    """
    from pipelines.bench.classifier import (
        KINDS,
        ClassifierCase,
        fits_in_memory,
        measure_classifier,
    )

    chosen = [name.strip() for name in kinds.split(",")]
    if wrong := [name for name in chosen if name not in KINDS]:
        raise UserError(f"--kinds {wrong[0]}: there is {', '.join(KINDS)}")
    if top > classes:
        raise UserError(f"--top {top}: there are {classes} classes; give at most as many")
    found: list[ClassifierCost] = []
    for kind in chosen:
        case = ClassifierCase(kind, classes, dim, top, checked, threads)
        if not fits_in_memory(case):
            needed = f"about {case.needed_bytes / GIB:.0f} GiB, more than is free"
            console.say(f"[yellow]left out:[/] {kind}, {classes:,} classes needs {needed}")
            continue
        with (
            scratch_folder(out) as folder,
            console.status(f"{kind}, {classes:,} classes"),
        ):
            found += measure_classifier(case, str(folder))
    if not found:
        raise UserError(f"--classes {classes}: no head fits into the memory that is free")
    console.print_table(_table(found, f"{classes:,} classes, embeddings of {dim}"))
    file = Path(out, "classifier.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {"classes": classes, "dim": dim, "top": top, "threads": threads, "checked": checked}
    results = [asdict(cost) for cost in found]
    file.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    console.list_rows("Where it is", [("figures", str(file))])
    export = ["mhe", "export", "RUN", "--classify", str(top)]
    console.list_next([("export one with its backbone", export)])


def _table(costs: list[ClassifierCost], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for name in ("head", "format", "MB", "ms, 1", "ms, 64", "best class"):
        table.add_column(name, justify="left" if name in ("head", "format") else "right")
    for cost in costs:
        table.add_row(
            cost.kind,
            cost.format,
            f"{cost.file_bytes / 1e6:,.1f}",
            *(f"{1e3 * seconds:,.1f}" for seconds in cost.seconds.values()),
            f"{100 * cost.same:.2f} %",
        )
    return table
