"""`mhe export`, `mhe report`, `mhe sync`: the results of a run, for others to use."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from launcher.terminal import console
from launcher.terminal.commands import (
    fetched_name,
    fetching_code,
    is_in_store,
    loading_code,
    serving_command,
    viewing_steps,
)
from launcher.verbs.evaluate.shared import classes_of
from launcher.verbs.options import RunName
from launcher.verbs.outputs import refuse_unwritable_store, usable_file, usable_folder
from mhe_dist.config.stored import stored_config
from mhe_dist.errors import UserError
from mhe_dist.tracking.factory import count_waiting, follow_moved_artifacts, sync_mlflow
from pipelines.runs.folder import config_at, find_run, read_heldout_figures, read_run_config
from pipelines.runs.lock import kept_from_training

if TYPE_CHECKING:
    from torch import Tensor

    from mhe_dist.backbone.export import ExportOptions
    from pipelines.runs.trained import TrainedBackbone
    from pipelines.serving.model_card import TrainedModel

PARITY_IMAGES = 64


class Format(str, Enum):
    """A format of an exported backbone."""

    TIMM = "timm"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
    MLFLOW = "mlflow"
    HUB_FOLDER = "hub-folder"


DEFAULT_FORMATS = [Format.TIMM, Format.ONNX]
WITH_HEAD = (Format.ONNX, Format.TORCH_EXPORT, Format.MLFLOW)


def export(
    context: typer.Context,
    run: RunName,
    to: Annotated[
        list[Format], typer.Option(help="Format; repeat it for several. With --classify: onnx.")
    ] = DEFAULT_FORMATS,
    out: Annotated[
        str,
        typer.Option(help="Folder or URL; export/ of the run if left out.", callback=usable_folder),
    ] = "",
    classify: Annotated[
        int,
        typer.Option(
            min=0, max=100, metavar="K", help="With the head: answers the K best classes; 0: no."
        ),
    ] = 0,
    opset: Annotated[
        int, typer.Option(min=0, help="ONNX operator set; 0: the exporter's choice.")
    ] = 0,
    fp16: Annotated[bool, typer.Option("--fp16", help="ONNX computes in float16.")] = False,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Embeddings of length 1 (not in the timm folder).")
    ] = False,
    uint8: Annotated[
        bool,
        typer.Option("--uint8", help="ONNX takes pixels, uint8 [N, H, W, 3], and normalises them."),
    ] = False,
) -> None:
    """Export the backbone of a run's newest checkpoint, and compare the files with it.

    timm makes a folder for timm.create_model('local-dir:...', pretrained=True), onnx a file for
    ONNX Runtime, torch-export a program for torch.export.load, mlflow a model that takes images and
    that mlflow models predict and serve, hub-folder a folder for the Hugging Face Hub (nothing is
    uploaded); the batch size is free. Each has a model card, README.md. Works during the run, too,
    and for any of its checkpoints: RUN may be runs/NAME/checkpoints/step_...

    With --classify, onnx, torch-export and mlflow hold the head, too: images in, class ids [N, K]
    and their scores out, the best first. The names of the classes lie beside them in
    class_names.tsv; the mlflow model gives them, too.

    Example: mhe export quickstart --to onnx --fp16 --normalize --out models/quickstart

    Example: mhe export photos --classify 5 --to onnx --to torch-export
    """
    from mhe_dist.backbone.export import ExportOptions
    from pipelines.runs.trained import load_trained_backbone

    formats = _formats(to if _was_given(context, "to") else None, classify, normalize)
    backbone = load_trained_backbone(run)
    folder = out.rstrip("/") or f"{backbone.path}/export"
    refuse_unwritable_store(folder)
    options = ExportOptions(opset, fp16, normalize, uint8)
    write = _writer(backbone, formats, classify, folder, options)
    console.say(f"From {escape(backbone.checkpoint)}:")
    paths = {name: _write(name, write, folder) for name in formats}
    if normalize and (Format.TIMM in formats or Format.HUB_FOLDER in formats):
        console.say("  the timm folder holds a plain timm model: normalise its embeddings yourself")
    console.list_next(_next_steps(paths, backbone.config.model.name))


def _write(name: Format, write: Callable[[str], tuple[str, float]], folder: str) -> str:
    """Write one format, and say where it is; its path."""
    with console.status(f"writing {name.value} into {folder}"):
        path, difference = write(name.value)
    console.say(f"  {escape(path)} (largest difference from the checkpoint {difference:.1e})")
    return path


def _was_given(context: typer.Context, option: str) -> bool:
    """Whether the command line has that option."""
    source = context.get_parameter_source(option)  # an enum of click, or of typer's copy of it
    return source is None or source.name != "DEFAULT"


def _formats(to: list[Format] | None, classify: int, normalize: bool) -> list[Format]:
    """The formats that are wanted, each once.

    Raises:
        UserError: they cannot hold a head.
    """
    if not classify:
        return list(dict.fromkeys(to or DEFAULT_FORMATS))
    formats = list(dict.fromkeys(to or [Format.ONNX]))
    if wrong := [name.value for name in formats if name not in WITH_HEAD]:
        holding = ", ".join(name.value for name in WITH_HEAD)
        raise UserError(f"--to {wrong[0]} holds the backbone alone; --classify is for {holding}")
    if normalize:
        raise UserError("--normalize is for embeddings, which --classify does not give: drop one")
    return formats


def _writer(
    backbone: TrainedBackbone,
    formats: list[Format],
    classify: int,
    folder: str,
    options: ExportOptions,
) -> Callable[[Any], tuple[str, float]]:
    """What writes a format, and returns path and difference from the checkpoint."""
    import torch

    from pipelines.serving.exports import write_format
    from pipelines.serving.model_card import TrainedModel
    from pipelines.serving.output_folder import refuse_overwriting

    if folder != f"{backbone.path}/export":  # all of which is ours, also what was interrupted
        refuse_overwriting(folder, [name.value for name in formats], bool(classify), options)
    size = backbone.config.data.image_size
    images = torch.randint(0, 256, (PARITY_IMAGES, 3, size, size), dtype=torch.uint8)
    figures, protocol = read_heldout_figures(backbone.path, backbone.step)
    trained = TrainedModel(
        *(backbone.model, backbone.config, backbone.step, backbone.trained_on, figures, protocol)
    )
    if classify:
        return _with_head(backbone, formats, classify, trained, folder, images, options)
    return partial(write_format, trained=trained, folder=folder, images=images, options=options)


def _with_head(
    backbone: TrainedBackbone,
    formats: list[Format],
    k: int,
    trained: TrainedModel,
    folder: str,
    images: Tensor,
    options: ExportOptions,
) -> Callable[[Any], tuple[str, float]]:
    """What writes a format with the head, and returns path and difference."""
    from mhe_dist.distributed.topology import Topology
    from pipelines.runs.warm_start import find_checkpoint, trained_head
    from pipelines.serving.classifier import (
        refuse_large_classifier,
        take_classifier,
        write_classifier,
    )

    classes = classes_of(backbone)
    size = sum(part.nbytes for part in backbone.model.parameters())
    for name in formats:
        refuse_large_classifier(name.value, backbone.config, classes, size, options.half)
    checkpoint = find_checkpoint(backbone.checkpoint)
    with console.status("reading the head"), trained_head(checkpoint, Topology()) as head:
        classifier = take_classifier(head, trained, images, k)
    return partial(
        write_classifier,
        trained=trained,
        classifier=classifier,
        folder=folder,
        images=images,
        options=options,
    )


_LOADED_IN_A_LINE = (Format.TIMM, Format.ONNX, Format.TORCH_EXPORT)


def _next_steps(paths: dict[Format, str], model: str) -> list[tuple[str, str | list[str]]]:
    """How what was written is used; of a store, first how it is fetched."""
    uses: list[tuple[str, str | list[str]]] = [
        (f"fetch it ({name.value})", ["python", "-c", fetching_code(path)])
        for name, path in paths.items()
        if is_in_store(path)
    ]
    here = {name: fetched_name(path) for name, path in paths.items()}
    uses += [
        (f"use it ({name.value})", ["python", "-c", loading_code(name.value, path, model)])
        for name, path in here.items()
        if name in _LOADED_IN_A_LINE
    ]
    if Format.MLFLOW in here:
        uses.append(("serve it (mlflow)", serving_command(here[Format.MLFLOW])))
    if Format.HUB_FOLDER in here:
        upload = ["hf", "upload", "USER/NAME", here[Format.HUB_FOLDER]]
        uses.append(("publish it (say the licence first)", upload))
    return uses


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Folder or URL of a run, or its name in runs/; or several."
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="The page; report.html of the run, or comparison.html, if left out.",
            callback=usable_file,
        ),
    ] = "",
) -> None:
    """Write one HTML page about a run, or one that compares several.

    Of one run: figures, curves, ROC, restarts, bad samples, settings. Of several: figures side by
    side, curves over each other, the settings in which they differ. The page needs no network and
    no other file. Works during the run, too.

    Example: mhe report quickstart --out quickstart.html

    Example: mhe report quickstart wide narrow
    """
    from pipelines.report.html import write_run_page
    from pipelines.report.run_comparison import write_comparison_page

    paths = list(dict.fromkeys(find_run(run.rstrip("/")) for run in runs))
    target = out or (f"{paths[0]}/report.html" if len(paths) == 1 else "comparison.html")
    refuse_unwritable_store(target.rpartition("/")[0])
    with console.status(f"drawing {', '.join(paths)}"):
        if len(paths) == 1:
            sections = write_run_page(paths[0], target)
        else:
            sections = write_comparison_page(paths, target)
    console.say(f"{escape(target)}: {', '.join(sections)}")
    console.list_next(viewing_steps(target))


def sync(run: RunName) -> None:
    """Send the metrics of a run to MLflow that did not reach it, because it was down at the end.

    A run that is still going sends them by itself, and is refused. Nothing else of MLflow's run
    changes, but for how it ended, if MLflow was not told that. Where runs were copied or moved
    together with the database beside them, it finds their artifacts again afterwards.

    Example: mhe sync quickstart
    """
    path = find_run(run)
    config = config_at(stored_config(read_run_config(path) or {}), path)
    instead = "it sends what waits for MLflow by itself; mhe sync is for afterwards"
    with kept_from_training(path, instead):
        if moved := follow_moved_artifacts(config):
            console.say(f"MLflow now has the new place of the artifacts of {moved:,} runs.")
        sent = count_waiting(config)
        sync_mlflow(config)
    console.say(f"{sent:,} records sent." if sent else "Nothing waits: MLflow has everything.")
