"""`mhe evaluate classification`: does the head name the class of other images of its classes?"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.evaluate.shared import EvaluatedHead, MlflowOption, save_results
from launcher.verbs.options import GpuOption, RunName
from pipelines.runs.trained import TrainedBackbone


def classification(
    run: RunName,
    shards: Annotated[
        str, typer.Option(help="Other images of the training classes, with the same class ids.")
    ],
    exhaustive: Annotated[
        bool,
        typer.Option(
            "--exhaustive",
            help="mhc: also score every class, and say how often the beam finds the best; a second "
            "an image for a million classes.",
        ),
    ] = False,
    gpu: GpuOption = None,
    mlflow: MlflowOption = True,
) -> None:
    """Other images of the training classes: the head names their class, top-1 and top-5.

    Classes with few, some and many training images are told apart: below 20, up to 100, more.

    Example: mhe evaluate classification photos --shards data/photos/heldout
    """
    from pipelines.evaluate.classification import evaluate_classification, refuse_other_classes

    opened = EvaluatedHead.open(run, shards, gpu, mlflow)
    backbone, topology, data = opened.backbone, opened.topology, opened.backbone.config.data
    refuse_other_classes(opened.index, data)
    training = opened.training_labels()
    counts = None if training is None else training.counts
    with opened.predicting() as head:
        figures = evaluate_classification(
            backbone.embed,
            head,
            opened.index,
            opened.classes,
            topology,
            data.image_size,
            counts,
            exhaustive,
        )
    if topology.is_first:
        results = {"shards": shards, "classes": opened.classes, **figures}
        _show(backbone, results, counts is not None)
        save_results(backbone, "classification", results, {}, "", figures if mlflow else {})


def _show(backbone: TrainedBackbone, results: dict[str, Any], has_counts: bool) -> None:
    title = f"{backbone.checkpoint} on {results['shards']}, {results['classes']:,} classes"
    console.show_table(title, _table(results))
    if not has_counts:
        console.say(
            f"No figures by training images of a class: {backbone.config.data.shards} cannot be "
            "read here, or its index does not tell labels (mhe data index makes one that does)."
        )


def _table(figures: dict[str, Any]) -> Table:
    from pipelines.evaluate.classification import SHOTS

    names = {
        "": "all",
        "few_shot/": "few-shot, below 20 training images",
        "medium_shot/": "medium-shot, 20 to 100",
        "many_shot/": "many-shot, more than 100",
    }
    table = Table("classes", "images", "top-1", "top-5")
    for prefix in ("", *(f"{name}/" for name in SHOTS)):
        if f"{prefix}samples" in figures:
            top = (f"{100 * figures[f'{prefix}top{k}']:.2f}" for k in (1, 5))
            table.add_row(names[prefix], f"{figures[f'{prefix}samples']:,.0f}", *top)
    if figures["unknown"]:
        table.add_row("left out: of no class of the run", f"{figures['unknown']:,.0f}", "", "")
    if "beam_recall" in figures:
        table.add_row(
            "the beam finds the best class", "", f"{100 * figures['beam_recall']:.2f}", ""
        )
    return table
