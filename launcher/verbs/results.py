"""`mhe export`, `mhe report`: a run for others: its backbone, and a page about it."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer
from rich.markup import escape

from launcher import console, runs
from launcher.verbs.evaluate import RunName

PARITY_IMAGES = 64


class Format(str, Enum):
    """What a backbone can be exported as."""

    TIMM = "timm"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
    MLFLOW = "mlflow"


USUAL = [Format.TIMM, Format.ONNX]


def export(
    run: RunName,
    to: Annotated[list[Format], typer.Option(help="Format; repeat it for several.")] = USUAL,
    out: Annotated[
        str, typer.Option(help="Folder for the files; export/ of the run if left out.")
    ] = "",
    opset: Annotated[
        int, typer.Option(min=0, help="ONNX operator set; 0: the exporter's choice.")
    ] = 0,
    fp16: Annotated[bool, typer.Option("--fp16", help="ONNX computes in float16.")] = False,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Embeddings of length 1 (not in the timm folder).")
    ] = False,
) -> None:
    """Export the backbone of a run's newest checkpoint, and compare what was written with it.

    timm makes a folder for timm.create_model('local-dir:...', pretrained=True), onnx a file for
    ONNX Runtime, torch-export a program for torch.export.load, mlflow a model that mlflow models
    predict and serve; the batch size is free. Works while the run goes on, too, and for any of its
    checkpoints: RUN may be runs/NAME/checkpoints/step_...

    Example: mhe export quickstart --to onnx --fp16 --normalize --out models/quickstart
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
            path, difference = exporter.write(
                *(name.value, found.model, found.config, folder, images),
                exporter.Options(opset, fp16, normalize),
            )
        console.say(f"  {escape(path)} (largest difference from the checkpoint {difference:.1e})")
    if normalize and Format.TIMM in to:
        console.say("  the timm folder holds a plain timm model: normalise its embeddings yourself")
    console.list_commands("Next", _uses(to, folder))


def _uses(to: list[Format], folder: str) -> list[tuple[str, str]]:
    load = {
        Format.TIMM: f"import timm; timm.create_model('local-dir:{folder}/timm', pretrained=True)",
        Format.ONNX: f"import onnxruntime; onnxruntime.InferenceSession('{folder}/backbone.onnx')",
        Format.TORCH_EXPORT: f"import torch; torch.export.load('{folder}/backbone.pt2').module()",
    }
    uses = [(f"use it ({name.value})", f'python -c "{load[name]}"') for name in to if name in load]
    if Format.MLFLOW in to:
        serve = f"mlflow models serve -m {folder}/mlflow --env-manager local"
        uses.append(("serve it (mlflow)", serve))
    return uses


def report(
    run: RunName,
    out: Annotated[str, typer.Option(help="The page; report.html of the run if left out.")] = "",
) -> None:
    """Write one HTML page about a run: figures, curves, ROC, restarts, bad samples, settings.

    It needs no network and no other file. Works while the run goes on, too.

    Example: mhe report quickstart --out quickstart.html
    """
    from pipelines import page

    place = runs.find(run.rstrip("/"))
    target = out or f"{place}/report.html"
    with console.out.status(f"drawing {escape(place)}"):
        sections = page.write(place, target)
    console.say(f"{escape(target)}: {', '.join(sections)}")
    console.list_commands("Next", [("see it", f"python -m webbrowser {target}")])
