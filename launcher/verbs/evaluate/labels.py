"""`mhe evaluate labels`: does the head rank the several classes of images first?"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.evaluate.shared import EvaluatedHead, MlflowOption, save_results
from launcher.verbs.options import GpuOption, RunName


def labels(
    run: RunName,
    shards: Annotated[str, typer.Option(help="Other images of the training classes.")],
    labels: Annotated[
        str, typer.Option(help="Label set of these shards, with the class ids of the run's labels.")
    ],
    gpu: GpuOption = None,
    mlflow: MlflowOption = True,
) -> None:
    """Several classes per image: precision, recall, nDCG and propensity-scored precision at k.

    Example: mhe evaluate labels tags --shards data/heldout --labels data/heldout_tags
    """
    from pipelines.evaluate.label_prediction import evaluate_labels, open_evaluated_labels

    opened = EvaluatedHead.open(run, shards, gpu, mlflow)
    backbone, topology, data = opened.backbone, opened.topology, opened.backbone.config.data
    found = open_evaluated_labels(labels, opened.index, data, opened.classes)
    training = opened.training_labels()
    with opened.predicting() as head:
        figures = evaluate_labels(
            backbone.embed, head, opened.index, found, topology, data.image_size, training
        )
    if topology.is_first:
        title = f"{backbone.checkpoint} on {labels}, {opened.classes:,} classes"
        console.show_table(title, _table(figures))
        if training is None:
            console.say(
                "No PSP and no figures by training images of a class: the training set "
                f"{data.shards} and its labels cannot be read here."
            )
        results = {"shards": shards, "labels": labels, "classes": opened.classes, **figures}
        logged = {name.replace("@", ""): value for name, value in figures.items()}
        save_results(backbone, "labels", results, {}, "", logged if mlflow else {})


def _table(figures: dict[str, Any]) -> Table:
    from pipelines.evaluate.classification import SHOTS
    from pipelines.evaluate.metrics.label_ranking import KS

    rows = {"p": "precision (P)", "recall": "recall", "ndcg": "nDCG", "psp": "PSP"}
    rows |= {f"{name}/recall": f"recall of {name.replace('_', '-')} labels" for name in SHOTS}
    rows |= {"frequent/p": "P of the most frequent classes", "frequent/psp": "PSP of these"}
    table = Table(f"{figures['samples']:,.0f} images", *(f"at {k}" for k in KS))
    for key, name in rows.items():
        if f"{key}@1" in figures:
            table.add_row(name, *(f"{100 * figures[f'{key}@{k}']:.2f}" for k in KS))
    return table
