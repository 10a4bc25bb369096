"""Shared by the verbs of `mhe evaluate`: they join ranks or choose workers, and save results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from launcher.tasks.choose import choose_workers
from launcher.terminal import console
from mhe_dist.errors import RunError, UserError
from pipelines.runs.folder import config_at
from pipelines.runs.trained import TrainedBackbone, load_trained_backbone, read_trained_config
from pipelines.storage.urls import is_local_url

if TYPE_CHECKING:
    from mhe_dist.distributed.topology import Topology
    from mhe_dist.heads.base import Head
    from mhe_dist.tracking.base import Metrics
    from pipelines.embedding.embeddings import Embed
    from pipelines.evaluate.classification import TrainingLabels
    from pipelines.report.charts.run_charts import Curves
    from pipelines.shards.index import ShardIndex
    from pipelines.storage.worker_pool import Workers

MAX_NAMED = 20  # images that were left out

FlipOption = Annotated[bool, typer.Option(help="Add the embedding of the mirrored image.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Embed and compare at the same time; 0: one per core, or per GPU. Left out: 1, here; "
        "with --address 0.",
    ),
]
MlflowOption = Annotated[
    bool, typer.Option("--mlflow/--no-mlflow", help="Add the figures to the run.")
]


def join_ranks(run: str, gpu: bool | None) -> Topology:
    """Join the processes that torchrun started; without torchrun this process is alone.

    Args:
        run: what is evaluated, as `RunName` says.
        gpu: whether each process has a GPU; None: as the run's config says.

    Raises:
        UserError: there is no GPU for this process.
    """
    from mhe_dist.distributed.device import prepare_rank, rank_device
    from mhe_dist.distributed.topology import Topology, connect
    from mhe_dist.engine.settings import set_float_kernels

    if gpu is None:
        gpu = read_trained_config(run).scale.gpu
    set_float_kernels("float32")
    if "RANK" not in os.environ:
        return Topology(device=rank_device(gpu))
    prepare_rank(gpu)
    return connect(device=rank_device(gpu))


@dataclass(frozen=True)
class EvaluatedBackbone:
    """A backbone that is evaluated, and who does the work.

    Attributes:
        backbone: of the run's checkpoint.
        topology: the ranks.
        embed: embeds images, here or by the workers.
        workers: who compares.
        folder: which all of them reach, for what they share; empty: they are this process.
    """

    backbone: TrainedBackbone
    topology: Topology
    embed: Embed
    workers: Workers
    folder: str

    @property
    def image_size(self) -> int:
        """Of the images in pixels."""
        return self.backbone.config.data.image_size

    @staticmethod
    @contextmanager
    def open(
        run: str,
        gpu: bool | None,
        workers: int | None = None,
        address: str = "",
        folder: str = "",
        mlflow: bool = False,
    ) -> Iterator[EvaluatedBackbone]:
        """Join the ranks, or choose workers, for the length of a `with` block.

        Args:
            run, gpu: see `join_ranks`.
            workers, address: see `choose_workers`; one worker without an address is this process.
                Left out: one, or with an address as many as there is room for.
            folder: for what the workers share; left out: a temporary one of this machine, or of
                the run where they are on other nodes.
            mlflow: see `refuse_unknown_mlflow`.

        Raises:
            UserError: torchrun has started this process, and workers are asked for, too; or see
                `refuse_unknown_mlflow`.
        """
        from pipelines.storage.worker_pool import HERE

        if workers is None:
            workers = 0 if address else 1
        if workers == 1 and not address:
            topology = join_ranks(run, gpu)
            backbone = load_trained_backbone(run, topology=topology)
            refuse_unknown_mlflow(backbone, topology, mlflow)
            yield EvaluatedBackbone(backbone, topology, backbone.embed, HERE, folder)
            return
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "--workers and --address start workers: type the command alone, not under torchrun"
            )
        from pipelines.embedding.worker_embed import WorkerEmbed

        gpu = read_trained_config(run).scale.gpu if gpu is None else gpu
        topology = join_ranks(run, False)
        backbone = load_trained_backbone(run, topology=topology)
        refuse_unknown_mlflow(backbone, topology, mlflow)
        with (
            choose_workers(workers, gpu, address) as chosen,
            _shared_folder(folder, backbone, address) as shared,
        ):
            embed = WorkerEmbed(backbone, chosen, gpu)
            yield EvaluatedBackbone(backbone, topology, embed, chosen, shared)


@contextmanager
def _shared_folder(folder: str, backbone: TrainedBackbone, address: str) -> Iterator[str]:
    """A folder that the workers reach; one that is not named is removed at the end.

    Raises:
        UserError: the workers are on other nodes, and the run is in a store.
    """
    if folder:
        yield folder
        return
    if address and not is_local_url(backbone.path):
        raise UserError(
            f"{backbone.path}: is in a store, and the nodes of --address need a folder for what "
            "they compare: name a run in a folder that all nodes mount"
        )
    parent = Path(backbone.path).absolute() if address else None
    with tempfile.TemporaryDirectory(prefix=".compared-", dir=parent) as made:
        yield made


def refuse_unknown_mlflow(backbone: TrainedBackbone, topology: Topology, wanted: bool) -> None:
    """Refuse to begin an evaluation whose figures could not be added to the run in MLflow.

    The first rank looks: it is the one that adds them.

    Args:
        backbone: what is evaluated.
        topology: the ranks.
        wanted: whether the figures are to be added.

    Raises:
        UserError: no MLflow server is known here, and the run is where no database can be.
    """
    from mhe_dist.tracking.factory import mlflow_uri

    if not (wanted and topology.is_first and is_in_mlflow(backbone)):
        return
    try:
        mlflow_uri(config_at(backbone.config, backbone.path))
    except UserError as error:
        raise UserError(
            f"the figures of {backbone.path} cannot be added to its run in MLflow ({error}): name "
            "the server by MLFLOW_TRACKING_URI, or add --no-mlflow"
        ) from error


def is_in_mlflow(backbone: TrainedBackbone) -> bool:
    """Whether a run has a record in MLflow."""
    return bool(backbone.run_id and backbone.config.tracking.mlflow)


def classes_of(backbone: TrainedBackbone) -> int:
    """C, the classes of the run that a backbone is of.

    Raises:
        UserError: its checkpoint does not tell.
    """
    count = backbone.trained_on.get("classes")
    if count is None:
        raise UserError(f"{backbone.checkpoint} was written before checkpoints told their classes")
    return int(count)


@dataclass(frozen=True)
class EvaluatedHead:
    """A run whose head is evaluated on other images of its classes.

    Attributes:
        backbone: of the run's checkpoint.
        classes: C of the run.
        index: of the images.
        topology: the ranks.
    """

    backbone: TrainedBackbone
    classes: int
    index: ShardIndex
    topology: Topology

    @staticmethod
    def open(run: str, shards: str, gpu: bool | None, mlflow: bool) -> EvaluatedHead:
        """Join the ranks, and load the backbone and the index of the images.

        Args:
            run, gpu: see `join_ranks`.
            shards: the images.
            mlflow: see `refuse_unknown_mlflow`.
        """
        from pipelines.shards.index import ShardIndex

        topology = join_ranks(run, gpu)
        backbone = load_trained_backbone(run, topology=topology)
        refuse_unknown_mlflow(backbone, topology, mlflow)
        return EvaluatedHead(backbone, classes_of(backbone), ShardIndex.load(shards), topology)

    def training_labels(self) -> TrainingLabels | None:
        """How often the run met each class; None where it cannot be read, and beside rank 0.

        The first rank computes the figures.
        """
        from pipelines.evaluate.classification import read_training_labels

        if not self.topology.is_first:
            return None
        config = self.backbone.config
        return read_training_labels(config.data, config.run.seed)

    @contextmanager
    def predicting(self) -> Iterator[Head]:
        """The head, and a spinner while it is used."""
        from pipelines.runs.warm_start import find_checkpoint, trained_head

        what = f"predicting the classes of {self.index.samples:,} images of {self.index.folder}"
        checkpoint = find_checkpoint(self.backbone.checkpoint)
        with spinner(self.topology, what), trained_head(checkpoint, self.topology) as head:
            yield head


def spinner(topology: Topology, what: str) -> AbstractContextManager[Any]:
    """A spinner on the first rank's terminal."""
    return console.status(what) if topology.is_first else nullcontext()


def say_left_out(paths: Sequence[str]) -> None:
    """Name images that could not be read, the first ones of very many."""
    for path in paths[:MAX_NAMED]:
        console.say(f"[yellow]left out:[/] {escape(path)}")
    if len(paths) > MAX_NAMED:
        console.say(f"[yellow]and {len(paths) - MAX_NAMED:,} more[/]")


def save_results(
    backbone: TrainedBackbone,
    name: str,
    results: Any,
    curves: Curves,
    title: str,
    metrics: Metrics,
) -> None:
    """Write results beside the run, log them to MLflow if there are metrics, and print the paths.

    What to type next is printed, too.

    Args:
        backbone: what was evaluated.
        name: of the evaluation.
        results: any value that JSON can hold.
        curves: ROC curves for a plot; none: no plot.
        title: of the plot.
        metrics: for MLflow; empty: nothing is logged.
    """
    from pipelines.report.evaluation import save_evaluation

    record = {"checkpoint": backbone.checkpoint, "step": backbone.step, "results": results}
    files = save_evaluation(backbone.path, name, record, curves, title)
    console.say("Written: " + ", ".join(escape(file) for file in files))
    if metrics and backbone.run_id and is_in_mlflow(backbone):
        named = {f"{name}/{key}": value for key, value in metrics.items()}
        _log_results(backbone, backbone.run_id, named, files)
    console.list_next(
        [
            ("see it", ["mhe", "report", backbone.path]),
            ("export it", ["mhe", "export", backbone.checkpoint]),
        ]
    )


def _log_results(backbone: TrainedBackbone, run_id: str, named: Metrics, files: list[str]) -> None:
    from mhe_dist.tracking.factory import follow_moved_artifacts, mlflow_uri
    from pipelines.report.evaluation import log_evaluation

    try:
        config = config_at(backbone.config, backbone.path)
        follow_moved_artifacts(config)
        uri = mlflow_uri(config)
        log_evaluation(uri, run_id, backbone.step, named, files)
    except (RunError, UserError) as error:  # the work is done
        console.say(f"[yellow]warning:[/] {escape(str(error))}; the files above have them")
