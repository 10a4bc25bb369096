"""Several labels per image: how well a head ranks the classes that a label set gives to images."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mhe_dist.config.data import DataConfig
from mhe_dist.distributed.collectives import broadcast_from_first
from mhe_dist.distributed.failures import failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.base import Head
from pipelines.data.mixture.label_choice import distinct_labels
from pipelines.embedding.embeddings import Embed, ShardImages, map_images
from pipelines.evaluate.classification import SHOTS, TrainingLabels, refuse_other_classes
from pipelines.evaluate.metrics.label_ranking import (
    KS,
    RANKED,
    Floats,
    Ints,
    find_labels,
    propensities,
    rank_figures,
)
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelLists, LabelSet


def open_evaluated_labels(
    url: str, index: ShardIndex, data: DataConfig, num_classes: int
) -> LabelSet:
    """A label set whose classes are those of a run.

    Raises:
        UserError: it is of another data set, has no label, or its class ids mean other classes.
    """
    labels = LabelSet.load(url)
    labels.require_index(index)
    refuse_other_classes(labels, data)
    if labels.num_classes > num_classes:
        raise UserError(f"{url}: it has {labels.num_classes:,} classes, the run {num_classes:,}")
    if not labels.labelled:
        raise UserError(f"{url}: it gives no image a class")
    labels.map_columns()
    return labels


def evaluate_labels(
    embed: Embed,
    head: Head,
    index: ShardIndex,
    labels: LabelSet,
    topology: Topology,
    image_size: int,
    training: TrainingLabels | None = None,
) -> dict[str, float]:
    """Rank all classes for every image of a set; all ranks must call, and all get the figures.

    Those of `rank_figures`, over the images that have a label (`samples`); with `training` also
    PSP, and for each of `SHOTS` with labels `few_shot/recall@k`: the share of these labels, over
    all images together, that are among the k best classes; `few_shot/labels` counts them. And
    `frequent/p@k` and so on, what the most frequent classes of the training reach if they are taken
    for the best of every image.

    Memory is that of `evaluate_classification`: scores are computed in chunks of the classes.

    Args:
        embed: see `embeddings.Embed`.
        head: of the same run, on these ranks.
        index: of the set.
        labels: of that set, see `open_evaluated_labels`.
        topology, image_size: see `embeddings.map_images`.
        training: of the run.

    Raises:
        UserError: the label set is damaged.
    """

    def _predict(pixels: Tensor) -> Tensor:
        return head.predict(embed(pixels), max(KS)).classes

    predicted = map_images(_predict, ShardImages(index), topology, image_size)
    figures: dict[str, float] = {}
    with failing_together(topology):
        if predicted is not None:
            lists = labels.lists(0, labels.samples)
            weights = None if training is None else 1 / propensities(*training)
            figures = rank_figures(predicted, lists, weights)
            figures["samples"] = float(labels.labelled)
            if training is not None:
                figures |= _shot_recalls(predicted, lists, training.counts)
                figures |= _frequent_figures(lists, training.counts, weights)
    return broadcast_from_first(figures, topology)


def label_figure_names() -> list[str]:
    """What `evaluate_labels` may call its figures."""
    ranked = [f"{name}@{k}" for name in RANKED for k in KS]
    shots = [*(f"recall@{k}" for k in KS), "labels"]
    return [
        *ranked,
        "samples",
        *(f"{name}/{key}" for name in SHOTS for key in shots),
        *(f"frequent/{key}" for key in ranked),
    ]


def _frequent_figures(lists: LabelLists, counts: Ints, weights: Floats | None) -> dict[str, float]:
    """What a guess that looks at no image reaches; see `evaluate_labels`."""
    guess = np.full(max(KS), -1, np.int64)
    frequent = np.argsort(-counts, kind="stable")[: max(KS)]
    guess[: len(frequent)] = frequent
    found = rank_figures(np.tile(guess, (len(lists.ends), 1)), lists, weights)
    return {f"frequent/{name}": value for name, value in found.items()}


def _shot_recalls(predicted: Ints, lists: LabelLists, counts: Ints) -> dict[str, float]:
    """See `evaluate_labels`."""
    _, ranks = find_labels(predicted, lists)
    shots = counts[distinct_labels(lists)[1]]
    figures: dict[str, float] = {}
    for name, (least, below) in SHOTS.items():
        chosen = ranks[(shots >= least) & (shots < below)]
        if len(chosen):
            figures |= {f"{name}/recall@{k}": float(np.mean(chosen < k)) for k in KS}
            figures[f"{name}/labels"] = float(len(chosen))
    return figures
