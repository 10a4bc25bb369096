"""Evaluation while a run trains: held-out shards, verification sets, the training classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mhe_dist.config.data import DataConfig
from mhe_dist.config.schema import EvaluateConfig
from mhe_dist.distributed.collectives import broadcast_from_first
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from mhe_dist.heads.base import Head
from pipelines.embedding.embeddings import Embed, raise_together
from pipelines.evaluate.classification import (
    count_images,
    evaluate_classification,
    refuse_other_classes,
)
from pipelines.evaluate.heldout import Evaluation, evaluate_heldout, refuse_unusable_set
from pipelines.evaluate.pair_sets import read_bin_sets, verify_pair_sets
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
    def training_counts(self) -> npt.NDArray[np.int64] | None:
        """Images of each class, counted once; see `classification.count_images`."""
        return count_images(self.index)


def has_evaluation(settings: EvaluateConfig) -> bool:
    """Whether the config asks for an evaluation."""
    return bool(settings.shards or settings.verification or settings.classification)


def refuse_unusable_sets(
    settings: EvaluateConfig, data: DataConfig, seed: int, topology: Topology
) -> None:
    """Say before a run what would make its evaluations fail; all ranks must call.

    The ranks share the images of the `.bin` sets, each of which is decoded once.

    Args:
        settings, seed, topology: see `evaluate_in_training`.
        data: of the run.

    Raises:
        UserError, RunError: a set cannot be used; on all ranks.
    """
    failure: Exception | None = None
    try:
        if settings.shards and topology.is_first:
            refuse_unusable_set(settings, seed)
        if settings.classification and topology.is_first:
            refuse_other_classes(ShardIndex.load(settings.classification), data)
        for each in read_bin_sets(settings.verification):
            for number in range(topology.rank, each.images.count, topology.world_size):
                each.images.read(number, number + 1, data.image_size)
    except (UserError, RunError, OSError) as error:
        failure = error
    raise_together(failure, topology)


def evaluate_in_training(
    embed: Embed,
    settings: EvaluateConfig,
    image_size: int,
    seed: int,
    topology: Topology,
    head: TrainedHead | None = None,
    with_pictures: bool = False,
) -> Evaluation:
    """Evaluate on everything that the config names; all ranks must call, and all get the metrics.

    In addition to the metrics of `evaluate_heldout` there are `lfw/accuracy` and so on for each
    `.bin` set, and `classification/top1` and so on (`evaluate_classification`). All ranks embed.
    Rank 0 computes the figures alone while the others wait; this takes milliseconds, because the
    bootstrap is left out (`mhe evaluate verification` computes it).

    Args:
        embed: see `embeddings.Embed`.
        settings: `evaluate` of the config.
        image_size: of the images in pixels.
        seed: of the drawn pairs of the held-out shards.
        topology: the ranks.
        head: of the run; needed for `settings.classification` alone.
        with_pictures: see `evaluate_heldout`.

    Raises:
        UserError: a set cannot be used.
    """
    evaluation = Evaluation({}, {})
    if settings.shards:
        evaluation = evaluate_heldout(embed, settings, image_size, seed, topology, with_pictures)
    metrics = dict(evaluation.metrics)
    if settings.verification:
        sets = read_bin_sets(settings.verification)
        results = verify_pair_sets(embed, sets, topology, image_size, with_intervals=False)
        found = {name: value for each in results for name, value in each.named_metrics().items()}
        metrics |= broadcast_from_first(found, topology)
    if settings.classification and head is not None:
        index = ShardIndex.load(settings.classification)
        counts = head.training_counts if topology.is_first else None
        classes = head.index.num_classes
        figures = evaluate_classification(
            embed, head.head, index, classes, topology, image_size, counts
        )
        metrics |= {f"classification/{name}": value for name, value in figures.items()}
    return evaluation._replace(metrics=metrics)
