"""`mhe bench data`: the loader beside a bare loop and a plain webdataset pipeline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.terminal import console
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.outputs import usable_file

if TYPE_CHECKING:
    from pipelines.bench.data import LoaderComparison


def data(
    shards: Annotated[
        str, typer.Option(help="Folder of shards of square JPEGs; made-up photos if left out.")
    ] = "",
    images: Annotated[int, typer.Option(min=1000, help="How many photos to make up.")] = 20_000,
    workers: Annotated[int, typer.Option(min=1, help="Loader processes.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="How often each reads everything.")] = 5,
    out: Annotated[
        str, typer.Option(help="File or URL for the result.", callback=usable_file)
    ] = "bench/data.json",
) -> None:
    """Measure images/s of the loader beside other readers, in turns, on the same shards.

    The others: a bare loop, which reads a tar with tarfile and decodes with simplejpeg in one
    process; the decoder with hardly a loop at all; and a plain webdataset pipeline with its Pillow
    decoder and torch's DataLoader. If others use the machine too, compare CPU seconds.

    Example: mhe bench data --workers 2
    """
    from pipelines.bench.data import measure_loaders
    from pipelines.bench.photos import make_photos
    from pipelines.shards.index import ShardIndex
    from pipelines.storage.urls import atomic_write

    with console.status("making photos"):
        index = ShardIndex.load(shards) if shards else make_photos(images)
    with ProgressDisplay().counting("reading") as progress:
        result = measure_loaders(index, workers, repeats, progress)
    with atomic_write(out) as stream:
        stream.write(json.dumps(result.to_dict(), indent=2).encode())
    console.show_table(_title(result), _table(result))
    for name, ratios in result.ratios().items():
        text = ", ".join(f"[bold]{ratio:.2f}[/] {unit}" for unit, ratio in ratios.items())
        console.say(f"mhe / {name}: {text}")
    console.say(f"Result: {escape(out)}")
    again = ["mhe", "bench", "data", "--shards", index.folder, "--workers", str(workers + 1)]
    console.list_next([("with more processes", again)])


def _title(result: LoaderComparison) -> str:
    setting = result.setting
    return (
        f"{setting['images']:,} images of {setting['side']}x{setting['side']}, "
        f"{setting['mean_bytes']:,} bytes; {setting['workers']} loader processes; "
        f"medians of {setting['repeats']}; load {setting['load']:.1f} on {setting['cores']} cores"
    )


def _table(result: LoaderComparison) -> Table:
    """A row of medians for each reader."""
    columns = ("", "images/s", "slowest", "fastest", "per CPU second", "of a worker")
    table = Table(*columns)
    for name, timing in result.timings.items():
        rates = sorted(timing.images / seconds for seconds in timing.wall)
        clocks = [timing.rate(clock) for clock in ("wall", "cpu", "worker")]
        figures = (clocks[0], rates[0], rates[-1], *clocks[1:])
        table.add_row(name, *(f"{figure:,.0f}" for figure in figures))
    return table
