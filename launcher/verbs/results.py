"""`mhe export`: the backbone of a run, for others."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer
from rich.markup import escape

from launcher import console
from launcher.verbs.evaluate import RunName

PARITY_IMAGES = 64


class Format(str, Enum):
    """What a backbone can be exported as."""

    TIMM = "timm"
    ONNX = "onnx"


EVERY = list(Format)


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
    folder = out.rstrip("/") or f"{found.path}/export"
    size = found.config.data.image_size
    images = torch.randint(0, 256, (PARITY_IMAGES, 3, size, size), dtype=torch.uint8)
    console.say(f"From {escape(found.checkpoint)}:")
    for name in dict.fromkeys(to):
        with console.out.status(f"writing {name.value} into {folder}"):
            path, difference = exporter.write(name.value, found.model, found.config, folder, images)
        console.say(f"  {escape(path)} (largest difference from the checkpoint {difference:.1e})")
    load = f"timm.create_model('local-dir:{folder}/timm', pretrained=True)"
    console.list_commands("Next", [("use it", f'python -c "import timm; {load}"')])
