"""Evaluation while a run trains: held-out shards, verification sets, the training classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mhe_dist.config.data import DataConfig
from mhe_dist.config.schema import EvaluateConfig
from mhe_dist.distributed.collectives import broadcast_from_first
from mhe_dist.distributed.failures import failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import Head
from pipelines.embedding.embeddings import Embed
from pipelines.evaluate.classification import (
    TrainingLabels,
    classification_figure_names,
    evaluate_classification,
    refuse_other_classes,
)
from pipelines.evaluate.heldout import (
    Evaluation,
    evaluate_heldout,
    heldout_figure_names,
    refuse_unusable_set,
)
from pipelines.evaluate.label_prediction import (
    evaluate_labels,
    label_figure_names,
    open_evaluated_labels,
)
from pipelines.evaluate.pair_sets import pair_figure_names, read_bin_sets, verify_pair_sets
from pipelines.shards.index import ShardIndex


@dataclass(frozen=True)
class TrainedHead:
    """The head of a run, and what its figures are told apart by.

    Attributes:
        head: on these ranks.
        index: what it trains on.
    """

    head: Head
    index: ShardIndex

    @cached_property
    def training_labels(self) -> TrainingLabels | None:
        """Images of each class, counted once; None: the index does not tell them."""
        return TrainingLabels.of(self.index)


def refuse_unusable_sets(
    settings: EvaluateConfig,
    data: DataConfig,
    seed: int,
    topology: Topology,
    num_classes: int,
) -> None:
    """Say before a run what would make its evaluations fail; all ranks must call.

    The ranks share the images of the `.bin` sets, each of which is decoded once.

    Args:
        settings, seed, topology: see `evaluate_in_training`.
        data: of the run.
        num_classes: C of the run.

    Raises:
        UserError, RunError: a set cannot be used; on all ranks.
    """
    with failing_together(topology):
        if settings.shards and topology.is_first:
            refuse_unusable_set(settings, seed)
        if settings.classification and topology.is_first:
            refuse_other_classes(ShardIndex.load(settings.classification), data)
        if settings.labels and topology.is_first:
            index = ShardIndex.load(settings.labels)
            open_evaluated_labels(settings.label_set, index, data, num_classes)
        for each in read_bin_sets(settings.verification):
            for number in range(topology.rank, each.images.count, topology.world_size):
                each.images.read(number, number + 1, data.image_size)


def figure_names(settings: EvaluateConfig) -> list[str]:
    """What `evaluate_in_training` may call its metrics; large FARs of large sets are left out."""
    names = heldout_figure_names(settings) if settings.shards else []
    names += pair_figure_names(settings.verification)
    if settings.classification:
        names += [f"classification/{name}" for name in classification_figure_names()]
    if settings.labels:
        names += [f"labels/{name}" for name in label_figure_names()]
    return names


def evaluate_in_training(
    embed: Embed,
    settings: EvaluateConfig,
    data: DataConfig,
    seed: int,
    topology: Topology,
    head: TrainedHead | None = None,
    with_pictures: bool = False,
) -> Evaluation:
    """Evaluate on everything that the config names; all ranks must call, and all get the metrics.

    In addition to the metrics of `evaluate_heldout` there are `lfw/accuracy` and so on for each
    `.bin` set, `classification/top1` and so on (`evaluate_classification`), and `labels/p@1` and so
    on (`evaluate_labels`). All ranks embed. Rank 0 computes the figures alone while the others
    wait; this takes milliseconds, because the bootstrap is left out (`mhe evaluate verification`
    computes it).

    Args:
        embed: see `embeddings.Embed`.
        settings: `evaluate` of the config.
        data: of the run.
        seed: of the drawn pairs of the held-out shards.
        topology: the ranks.
        head: of the run; needed for `settings.classification` and `settings.labels` alone.
        with_pictures: see `evaluate_heldout`.

    Raises:
        UserError, RunError: a set cannot be used, or read by some rank; on all ranks.
    """
    evaluation = Evaluation({}, {})
    if settings.shards:
        evaluation = evaluate_heldout(
            embed, settings, data.image_size, seed, topology, with_pictures
        )
    metrics = dict(evaluation.metrics)
    if settings.verification:
        with failing_together(topology):
            sets = read_bin_sets(settings.verification)
        results = verify_pair_sets(embed, sets, topology, data.image_size, with_intervals=False)
        found = {name: value for each in results for name, value in each.named_metrics().items()}
        metrics |= broadcast_from_first(found, topology)
    if head is not None:
        metrics |= _evaluate_head(embed, settings, data, topology, head)
    return evaluation._replace(metrics=metrics)


def _evaluate_head(
    embed: Embed,
    settings: EvaluateConfig,
    data: DataConfig,
    topology: Topology,
    trained: TrainedHead,
) -> dict[str, float]:
    """What the head says of other images of its classes; see `evaluate_in_training`."""
    head, classes, size = trained.head, trained.index.num_classes, data.image_size
    metrics: dict[str, float] = {}
    if not (settings.classification or settings.labels):
        return metrics
    with failing_together(topology):  # the first rank computes the figures
        training = trained.training_labels if topology.is_first else None
    if settings.classification:
        with failing_together(topology):
            index = ShardIndex.load(settings.classification)
        counts = None if training is None else training.counts
        figures = evaluate_classification(embed, head, index, classes, topology, size, counts)
        metrics |= {f"classification/{name}": value for name, value in figures.items()}
    if settings.labels:
        with failing_together(topology):
            index = ShardIndex.load(settings.labels)
            labels = open_evaluated_labels(settings.label_set, index, data, classes)
        figures = evaluate_labels(embed, head, index, labels, topology, size, training)
        metrics |= {f"labels/{name}": value for name, value in figures.items()}
    return metrics
