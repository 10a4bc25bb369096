"""`mhe evaluate identification`, `mhe evaluate probe`: a backbone on the user's own images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from launcher.tasks.resumable import resumable
from launcher.terminal import console
from launcher.verbs.evaluate.shared import (
    EvaluatedBackbone,
    MlflowOption,
    WorkersOption,
    save_results,
    spinner,
)
from launcher.verbs.options import AddressOption, GpuOption, RunName
from mhe_dist.errors import UserError
from pipelines.runs.trained import TrainedBackbone

if TYPE_CHECKING:
    from pipelines.embedding.folder import EmbeddingsFolder
    from pipelines.evaluate.own_images import OwnImagesResult

Source = Annotated[
    str, typer.Option(help="Folder of shards, or one with a folder of images for each class.")
]
COMPARED = ".compared"  # of a folder of embeddings: what is shared and finished of a comparison
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def identification(
    run: RunName,
    images: Annotated[
        str,
        typer.Option(
            help="Shards, a folder with a folder of images for each class, or one of embeddings."
        ),
    ],
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Also TAR at FAR over all pairs of images.")
    ] = False,
    workers: WorkersOption = None,
    address: AddressOption = "",
    flip: Annotated[
        bool | None, typer.Option(help="Add the mirrored image; as the run does if left out.")
    ] = None,
    gpu: GpuOption = None,
    mlflow: MlflowOption = True,
) -> None:
    """Own images, 1:N: one of each class is enrolled, and the others are looked up among those.

    The first image of each class is enrolled, unless the shards name others. Of very many images,
    name the folder that mhe embed RUN --out FOLDER has filled: its rows are mapped, and the same
    command goes on where it was interrupted.

    Example: mhe evaluate identification quickstart --images photos --all-pairs

    Example: mhe evaluate identification quickstart --images rows --all-pairs --workers 0
    """
    from pipelines.embedding.folder import holds_rows

    is_embedded = holds_rows(images)
    has_room = is_embedded and os.access(images, os.W_OK)
    folder = str(Path(images).absolute() / COMPARED) if has_room else ""
    what = "comparing" if is_embedded else "embedding"
    with (
        resumable() if is_embedded else nullcontext(),
        EvaluatedBackbone.open(run, gpu, workers, address, folder, mlflow) as opened,
        spinner(opened.topology, f"{what} {images}"),
    ):
        backbone, fars = opened.backbone, FARS if all_pairs else ()
        if is_embedded:
            result = _compare_embedded(opened, images, flip, fars)
        else:
            result = _embed_and_compare(opened, images, flip, fars)
    if result is None:
        return
    console.show_table(f"{backbone.checkpoint} on {images}", _as_table(result))
    save_results(
        backbone,
        name="identification",
        results={"images": images, "protocol": result.protocol, **result.metrics},
        curves={"gallery-probe pairs": result.roc},
        title=f"ROC, {images}",
        metrics=result.metrics if mlflow else {},
    )


def _embed_and_compare(
    opened: EvaluatedBackbone, images: str, flip: bool | None, fars: Sequence[float]
) -> OwnImagesResult | None:
    from pipelines.evaluate.own_images import identify_own_images

    flip = opened.backbone.config.evaluate.flip if flip is None else flip
    return identify_own_images(
        *(opened.embed, images, opened.topology, opened.image_size, flip),
        *(fars, opened.workers, opened.folder),
    )


def _compare_embedded(
    opened: EvaluatedBackbone, images: str, flip: bool | None, fars: Sequence[float]
) -> OwnImagesResult | None:
    from pipelines.evaluate.own_images import comparison_folder, identify_embeddings

    if not opened.topology.is_first:
        return None
    embedded = _open_embeddings(opened.backbone, images, flip)
    if not opened.folder:
        return identify_embeddings(embedded, fars)
    with comparison_folder(opened.folder):
        return identify_embeddings(embedded, fars, opened.workers, opened.folder)


def _as_table(result: OwnImagesResult) -> Table:
    table = Table("figure", "value")
    for name, value in result.metrics.items():
        share = name not in ("gallery", "probes", "genuine", "impostors")
        table.add_row(_in_words(name), f"{100 * value:.2f}" if share else f"{value:,.0f}")
    for name in result.skipped:
        table.add_row(_in_words(name), "would take too much memory")
    table.add_row("protocol of rank-1, TAR", result.protocol)
    return table


def _in_words(name: str) -> str:
    """A figure as the table of the held-out classes names it."""
    name = name.replace("rank", "rank-").replace("all/", "all pairs: ")
    return name.replace("tar@far=1e", "TAR@FAR=1E")


def _open_embeddings(backbone: TrainedBackbone, path: str, flip: bool | None) -> EmbeddingsFolder:
    """The embeddings of a folder.

    Raises:
        UserError: they are of another model, or with other flipping than is asked for.
    """
    from pipelines.embedding.folder import EmbeddingsFolder
    from pipelines.embedding.made_by import MadeBy

    folder = EmbeddingsFolder.open(path)
    made_by = folder.recipe.made_by
    if flip is not None and flip != made_by.flip:
        raise UserError(f"{path}: was embedded with flip {made_by.flip}: leave --flip out")
    MadeBy.of(backbone, made_by.flip).refuse_other(made_by, path)
    return folder


def probe(
    run: RunName,
    images: Source,
    test: Annotated[
        str, typer.Option(help="The same for testing; a fifth of --images if left out.")
    ] = "",
    k: Annotated[int, typer.Option(min=1, help="Neighbours of the k-NN.")] = 20,
    gpu: GpuOption = None,
    workers: WorkersOption = None,
    address: AddressOption = "",
    mlflow: MlflowOption = True,
) -> None:
    """Is the backbone good for another task? k-NN and a linear classifier on its embeddings.

    Example: mhe evaluate probe quickstart --images data/flowers/train --test data/flowers/test
    """
    from pipelines.evaluate.probe import probe_images

    with EvaluatedBackbone.open(run, gpu, workers, address, mlflow=mlflow) as opened:
        backbone, topology = opened.backbone, opened.topology
        with spinner(topology, f"embedding {images}"):
            result = probe_images(opened.embed, images, test, topology, opened.image_size, k)
    if result is None:
        return
    table = Table("classifier", "accuracy")
    for name, value in result.items():
        table.add_row(name, f"{100 * value:.2f}")
    console.show_table(f"{backbone.checkpoint} on {test or images}", table)
    settings = {"images": images, "test": test, "k": k}
    save_results(backbone, "probe", settings | result, {}, "", result if mlflow else {})
