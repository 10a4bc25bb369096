"""`mhe bench train`: a whole step beside a bare loop of PyTorch."""

from __future__ import annotations

import json
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.outputs import usable_file
from mhe_dist.errors import UserError

if TYPE_CHECKING:
    from pipelines.bench.train import TrainTimes


def train(
    backbone: Annotated[str, typer.Option(help="Of timm, or one of the iresnets.")] = "iresnet18",
    micro_batch: Annotated[int, typer.Option(min=2, help="Images of a rank in a step.")] = 16,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks; on a GPU each needs one.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each loop in a round.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    precision: Annotated[
        Literal["float32", "bf16"], typer.Option(help="What the network computes in.")
    ] = "float32",
    gpu: Annotated[bool, typer.Option("--gpu", help="Compute on GPUs, one for each rank.")] = False,
    out: Annotated[
        str, typer.Option(help="File or URL for the result.", callback=usable_file)
    ] = "bench/train.json",
) -> None:
    """Measure images/s of training beside DistributedDataParallel around the same network.

    The bare loop trains on the same images, held in memory, with torch's SGD and the matrix
    products of the same head: nothing else. Both take turns on the same ranks.

    Example: mhe bench train --backbone iresnet18
    """
    from mhe_dist.backbone.model import check_model_name
    from pipelines.bench.train import TrainCase, measure_training
    from pipelines.storage.urls import atomic_write

    try:
        check_model_name(backbone)
    except UserError as error:
        raise UserError(str(error).replace("model.name=", "--backbone ", 1)) from None
    case = TrainCase(
        backbone=backbone,
        micro_batch=micro_batch,
        world_size=world_size,
        steps=steps,
        rounds=rounds,
        precision=precision,
    )
    with console.status("training in turns"):
        times = measure_training(case, gpu)
    with atomic_write(out) as stream:
        stream.write(json.dumps(times.to_dict(), indent=2).encode())
    console.show_table(_title(times), _table(times))
    console.say(f"mhe / bare: [bold]{times.ratio:.3f}[/] of the images per second")
    console.say(f"Result: {escape(out)}")
    again = ["mhe", "bench", "train", "--backbone", backbone, "--rounds", str(2 * rounds)]
    console.list_next([("with more rounds", again)])


def _title(times: TrainTimes) -> str:
    case = times.case
    return (
        f"{case.backbone}, {case.world_size} ranks of {case.micro_batch} images, "
        f"{case.precision}; medians of {case.rounds} rounds of {case.steps} steps"
    )


def _table(times: TrainTimes) -> Table:
    """Both loops, then the parts of ours."""
    table = Table("", "ms per step", "images/s")
    for name, seconds in (("bare", times.bare), ("mhe", times.mhe)):
        rate = f"{times.images_per_s(seconds):,.1f}"
        table.add_row(name, f"{1000 * median(seconds):,.1f}", rate)
    for part, taken in times.parts.items():
        table.add_row(f"  {part}", f"{1000 * taken:,.1f}", "")
    rest = median(times.mhe) - sum(times.parts.values())
    table.add_row("  labels, records, the slower rank", f"{1000 * rest:,.1f}", "")
    return table
