"""What the verbs of `mhe evaluate` share: where they run, and where their results go."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from launcher.terminal import console
from mhe_dist.errors import RunError
from pipelines.runs.trained import TrainedBackbone

if TYPE_CHECKING:
    from mhe_dist.distributed.topology import Topology
    from mhe_dist.tracking.base import Metrics
    from pipelines.report.evaluation import Curves

RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Folder or URL of a run, its name in runs/, or a step_* checkpoint."
    ),
]
Flip = Annotated[bool, typer.Option(help="Add the embedding of the mirrored image.")]
Log = Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Add the figures to the run.")]


def join() -> Topology:
    """This process among those that torchrun started, or alone."""
    from mhe_dist.distributed.topology import Topology, connect, default_device

    if "RANK" in os.environ:
        return connect()
    return Topology(device=default_device())


def busy(topology: Topology, what: str) -> AbstractContextManager[Any]:
    """A spinner on the first rank's terminal."""
    return console.out.status(escape(what)) if topology.is_first else nullcontext()


def keep(
    found: TrainedBackbone, name: str, plain: Any, curves: Curves, title: str, figures: Metrics
) -> None:
    """Write results beside the run, to MLflow if there are figures, and say where they are."""
    from mhe_dist.tracking.factory import mlflow_uri
    from pipelines.report import evaluation as keeping

    about = {"checkpoint": found.checkpoint, "step": found.step, "results": plain}
    files = keeping.write(found.path, name, about, curves, title)
    console.say("Written: " + ", ".join(escape(file) for file in files))
    if not (figures and found.run_id and found.config.tracking.mlflow):
        return
    named = {f"{name}/{key}": value for key, value in figures.items()}
    try:
        keeping.to_mlflow(mlflow_uri(found.config), found.run_id, found.step, named, files)
    except RunError as error:
        console.say(f"[yellow]warning:[/] {escape(str(error))}; the files above have them")
