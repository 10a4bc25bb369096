"""`mhe bench index`: what an index costs at any number of samples, and whether the bounds hold."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.terminal import console
from launcher.verbs.bench.bounds import list_bounds
from launcher.verbs.outputs import scratch_folder


def index(
    samples: Annotated[int, typer.Option(min=1, help="Samples, in tars of 10,000.")] = 10_000_000,
    folder: Annotated[
        str, typer.Option(help="Where to write: 12 bytes a sample at most, removed at the end.")
    ] = ".",
) -> None:
    """Measure what the index of a data set of any size costs: synthetic columns, no tars.

    Up to 10^8 samples the bounds are those of 10^8; above, they grow to those of 10^9.

    Example: mhe bench index --samples 100_000_000
    """
    from pipelines.bench.scale.index import measure_index

    with (
        scratch_folder(folder) as temporary,
        console.status("measuring"),
    ):
        lines = measure_index(temporary, samples)
    list_bounds(f"{samples:,} samples", lines)
