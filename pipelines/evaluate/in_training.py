"""Evaluation while a run trains: held-out shards, verification sets, or both."""

from __future__ import annotations

from mhe_dist.config.schema import EvaluateConfig
from mhe_dist.distributed.collectives import broadcast_from_first
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from pipelines.evaluate.embeddings import Embed, raise_together
from pipelines.evaluate.heldout import Evaluation, evaluate_heldout, refuse_unusable_set
from pipelines.evaluate.pair_sets import read_bin_sets, verify_pair_sets


def has_evaluation(settings: EvaluateConfig) -> bool:
    """Whether the config asks for an evaluation."""
    return bool(settings.shards or settings.verification)


def refuse_unusable_sets(
    settings: EvaluateConfig, image_size: int, seed: int, topology: Topology
) -> None:
    """Say before a run what would make its evaluations fail; all ranks must call.

    The ranks share the images of the `.bin` sets, each of which is decoded once.

    Args:
        settings, image_size, seed, topology: see `evaluate_in_training`.

    Raises:
        UserError, RunError: a set cannot be used; on all ranks.
    """
    failure: Exception | None = None
    try:
        if settings.shards and topology.is_first:
            refuse_unusable_set(settings, seed)
        for each in read_bin_sets(settings.verification):
            for number in range(topology.rank, each.images.count, topology.world_size):
                each.images.read(number, number + 1, image_size)
    except (UserError, RunError, OSError) as error:
        failure = error
    raise_together(failure, topology)


def evaluate_in_training(
    embed: Embed, settings: EvaluateConfig, image_size: int, seed: int, topology: Topology
) -> Evaluation:
    """Evaluate on everything that the config names; all ranks must call, and all get the metrics.

    In addition to the metrics of `evaluate_heldout` there are `lfw/accuracy` and so on for each
    `.bin` set. All ranks embed. Rank 0 computes the figures alone while the others wait; this takes
    milliseconds, because the bootstrap is left out (`mhe evaluate verification` computes it).

    Args:
        embed: see `embeddings.Embed`.
        settings: `evaluate` of the config.
        image_size: of the images in pixels.
        seed: of the drawn pairs of the held-out shards.
        topology: the ranks.

    Raises:
        UserError: a set cannot be used.
    """
    evaluation = Evaluation({}, {})
    if settings.shards:
        evaluation = evaluate_heldout(embed, settings, image_size, seed, topology)
    if not settings.verification:
        return evaluation
    sets = read_bin_sets(settings.verification)
    results = verify_pair_sets(embed, sets, topology, image_size, with_intervals=False)
    metrics = {name: value for each in results for name, value in each.named_metrics().items()}
    metrics = broadcast_from_first(metrics, topology)
    return evaluation._replace(metrics=evaluation.metrics | metrics)
