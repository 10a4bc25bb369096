"""`mhe evaluate identification`, `mhe evaluate probe`: a backbone on the user's own images."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.evaluate.shared import Log, RunName, busy, join, keep
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
    mlflow: Log = True,
) -> None:
    """Own images, 1:N: one of each class is enrolled, the others are looked up among those.

    Shards may say who is enrolled; otherwise it is the first image of each class.

    Example: mhe evaluate identification quickstart --images photos --all-pairs
    """
    from pipelines.evaluate import own_images as protocol

    topology = join()
    found = load_trained_backbone(run, topology.device)
    if flip is None:
        flip = found.config.evaluate.flip
    with busy(topology, f"embedding {images}"):
        result = protocol.evaluate(
            *(found.embed, images, topology, found.config.data.image_size, flip),
            FARS if all_pairs else (),
        )
    if result is None:
        return
    table = Table("figure", "value", title=f"{found.checkpoint} on {images}")
    for name, value in result.metrics.items():
        share = name not in ("gallery", "probes", "genuine", "impostors")
        table.add_row(name, f"{100 * value:.2f}" if share else f"{value:,.0f}")
    for far in result.beyond:
        table.add_row(f"all pairs {far:g}", "would take too much memory")
    console.out.print(table)
    keep(
        *(found, "identification", {"images": images, **result.metrics}),
        {"gallery-probe pairs": result.roc},
        *(f"ROC, {images}", result.metrics if mlflow else {}),
    )


def probe(
    run: RunName,
    images: Source,
    test: Annotated[
        str, typer.Option(help="The same for testing; a fifth of --images if left out.")
    ] = "",
    k: Annotated[int, typer.Option(min=1, help="Neighbours of the k-NN.")] = 20,
    mlflow: Log = True,
) -> None:
    """Is the backbone good for another task? k-NN and a linear classifier on its embeddings.

    Example: mhe evaluate probe quickstart --images data/flowers/train --test data/flowers/test
    """
    from pipelines.evaluate import probe as protocol

    topology = join()
    found = load_trained_backbone(run, topology.device)
    with busy(topology, f"embedding {images}"):
        result = protocol.evaluate(
            found.embed, images, test, topology, found.config.data.image_size, k
        )
    if result is None:
        return
    table = Table("classifier", "accuracy", title=f"{found.checkpoint} on {test or images}")
    for name, value in result.items():
        table.add_row(name, f"{100 * value:.2f}")
    console.out.print(table)
    about = {"images": images, "test": test, "k": k, **result}
    keep(found, "probe", about, {}, "", result if mlflow else {})
