"""`mhe bench audit`: what an audit costs at any size, and whether it finds the same when killed."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.bench.bounds import list_bounds
from launcher.verbs.outputs import scratch_folder


def audit(
    images: Annotated[
        int, typer.Option(min=10_000, help="Images; a tenth of them are classes.")
    ] = 100_000,
    dim: Annotated[int, typer.Option(min=8, help="Width of their embeddings.")] = 512,
    folder: Annotated[
        str,
        typer.Option(help="Where to write: 3 KiB an image and its embedding, removed at the end."),
    ] = ".",
) -> None:
    """Audit synthetic embeddings with planted faults, once in peace and once killed six times.

    Up to 10^6 images of width 512 the bounds are those of 10^6: ten minutes on two cores, and 4
    GiB, in which pages of files count; above, they grow with images and width.

    Example: mhe bench audit --images 1_000_000
    """
    from pipelines.bench.scale.audit import measure_audit

    with (
        scratch_folder(folder) as temporary,
        ProgressDisplay() as display,
        display.counting("auditing") as progress,
    ):
        lines = measure_audit(temporary, images, dim, progress)
    list_bounds(f"{images:,} images of width {dim}", lines)
