"""`mhe evaluate`, `mhe export`: what can be done with a run that was trained."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher import console, runs
from launcher.progress import accuracies
from mhe_dist.errors import UserError

PARITY_IMAGES = 64
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder or URL of a run, or its name in runs/.")
]


class Format(str, Enum):
    """What a backbone can be exported as."""

    TIMM = "timm"
    ONNX = "onnx"


EVERY = list(Format)


def evaluate(
    run: RunName,
    shards: Annotated[
        str, typer.Option(help="Held-out shards; those of the run's settings if left out.")
    ] = "",
    flip: Annotated[
        bool | None, typer.Option(help="Add the embedding of the mirrored image.")
    ] = None,
) -> None:
    """Evaluate the newest checkpoint of a run on held-out classes, 1:1 and 1:N.

    Example: mhe evaluate quickstart --shards data/other/heldout
    """
    from launcher import trained
    from mhe_dist.topology import Topology
    from pipelines.evaluate import heldout

    found = trained.load(run)
    config = found.config
    if shards:
        config.evaluate.shards = shards
    if flip is not None:
        config.evaluate.flip = flip
    if not config.evaluate.shards:
        raise UserError("evaluate.shards of the run is empty: name the held-out set with --shards")
    with console.out.status(f"evaluating {found.checkpoint}"):
        metrics = heldout.run(found.embed, config, Topology()).metrics
    table = Table(title=f"{found.checkpoint} on {config.evaluate.shards}", show_header=False)
    for name, value in accuracies(metrics):
        table.add_row(name, value)
    for name in ("gallery", "probes", "pairs", "impostors"):
        table.add_row(name, f"{metrics[name]:,.0f}")
    console.out.print(table)
    console.list_commands("Next", [("export it", f"mhe export {run}")])


def export(
    run: RunName,
    to: Annotated[list[Format], typer.Option(help="Format; repeat it for several.")] = EVERY,
    out: Annotated[
        str, typer.Option(help="Folder for the files; export/ of the run if left out.")
    ] = "",
) -> None:
    """Export the backbone of a run's newest checkpoint, and compare the files with it.

    timm makes a folder for timm.create_model('local-dir:...', pretrained=True), onnx a file for
    ONNX Runtime with a free batch size. Works while the run goes on, too.

    Example: mhe export quickstart --to onnx --out models/quickstart
    """
    import torch

    from launcher import trained
    from mhe_dist import export as exporter

    found = trained.load(run)
    folder = out.rstrip("/") or f"{runs.find(run)}/export"
    size = found.config.data.image_size
    images = torch.randint(0, 256, (PARITY_IMAGES, 3, size, size), dtype=torch.uint8)
    console.say(f"From {escape(found.checkpoint)}:")
    for name in dict.fromkeys(to):
        with console.out.status(f"writing {name.value} into {folder}"):
            path, difference = exporter.write(name.value, found.model, found.config, folder, images)
        console.say(f"  {escape(path)} (largest difference from the checkpoint {difference:.1e})")
    load = f"timm.create_model('local-dir:{folder}/timm', pretrained=True)"
    console.list_commands("Next", [("use it", f'python -c "import timm; {load}"')])
