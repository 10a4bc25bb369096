"""`mhe evaluate identification`, `mhe evaluate probe`: a backbone on the user's own images."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.evaluate.shared import (
    GpuOption,
    MlflowOption,
    RunName,
    join_ranks,
    save_results,
    spinner,
)
from pipelines.runs.trained import load_trained_backbone

Source = Annotated[
    str, typer.Option(help="Folder of shards, or one with a folder of images for each class.")
]
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def identification(
    run: RunName,
    images: Source,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Also TAR at FAR over all pairs of images.")
    ] = False,
    flip: Annotated[
        bool | None, typer.Option(help="Add the mirrored image; as the run does if left out.")
    ] = None,
    gpu: GpuOption = None,
    mlflow: MlflowOption = True,
) -> None:
    """Own images, 1:N: one of each class is enrolled, and the others are looked up among those.

    The first image of each class is enrolled, unless the shards name others.

    Example: mhe evaluate identification quickstart --images photos --all-pairs
    """
    from pipelines.evaluate.own_images import identify_own_images

    topology = join_ranks(run, gpu)
    backbone = load_trained_backbone(run, topology.device)
    if flip is None:
        flip = backbone.config.evaluate.flip
    with spinner(topology, f"embedding {images}"):
        result = identify_own_images(
            backbone.embed,
            images,
            topology,
            backbone.config.data.image_size,
            flip,
            all_pairs_fars=FARS if all_pairs else (),
        )
    if result is None:
        return
    table = Table("figure", "value")
    for name, value in result.metrics.items():
        share = name not in ("gallery", "probes", "genuine", "impostors")
        table.add_row(name, f"{100 * value:.2f}" if share else f"{value:,.0f}")
    for far in result.skipped_fars:
        table.add_row(f"all pairs {far:g}", "would take too much memory")
    table.add_row("protocol of rank1, tar", result.protocol)
    console.show_table(f"{backbone.checkpoint} on {images}", table)
    save_results(
        backbone,
        name="identification",
        results={"images": images, "protocol": result.protocol, **result.metrics},
        curves={"gallery-probe pairs": result.roc},
        title=f"ROC, {images}",
        metrics=result.metrics if mlflow else {},
    )


def probe(
    run: RunName,
    images: Source,
    test: Annotated[
        str, typer.Option(help="The same for testing; a fifth of --images if left out.")
    ] = "",
    k: Annotated[int, typer.Option(min=1, help="Neighbours of the k-NN.")] = 20,
    gpu: GpuOption = None,
    mlflow: MlflowOption = True,
) -> None:
    """Is the backbone good for another task? k-NN and a linear classifier on its embeddings.

    Example: mhe evaluate probe quickstart --images data/flowers/train --test data/flowers/test
    """
    from pipelines.evaluate.probe import probe_images

    topology = join_ranks(run, gpu)
    backbone = load_trained_backbone(run, topology.device)
    with spinner(topology, f"embedding {images}"):
        result = probe_images(
            backbone.embed, images, test, topology, backbone.config.data.image_size, k
        )
    if result is None:
        return
    table = Table("classifier", "accuracy")
    for name, value in result.items():
        table.add_row(name, f"{100 * value:.2f}")
    console.show_table(f"{backbone.checkpoint} on {test or images}", table)
    settings = {"images": images, "test": test, "k": k}
    save_results(backbone, "probe", settings | result, {}, "", result if mlflow else {})
