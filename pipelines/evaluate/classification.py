"""Closed-set classification: other images of the classes that a run was trained on.

This is the test of the paper (arXiv 2412.10182): the head's scores predict the class of an image,
where `heldout.py` compares images of classes that no step has met.
"""

from __future__ import annotations

import logging
import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist.config.data import DataConfig
from mhe_dist.distributed.collectives import broadcast_from_first
from mhe_dist.distributed.failures import failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from mhe_dist.heads.base import Head
from mhe_dist.heads.multilevel.cascade import MultiHeadCascade
from pipelines.data.mixture.class_list import find_other_name
from pipelines.data.mixture.index import Mixture, open_training_index
from pipelines.embedding.embeddings import Embed, ShardImages, map_images
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet

Ints = npt.NDArray[np.int64]

TOP: Final = (1, 5)
# Training images of a class, from and below: Liu et al., "Large-Scale Long-Tailed Recognition in an
# Open World" (arXiv 1904.05160), section 4.
SHOTS: Final = {
    "few_shot": (0, 20),
    "medium_shot": (20, 101),
    "many_shot": (101, math.inf),
}
_COUNTED_TOGETHER: Final = 1 << 24  # labels
_NAMED: Final = 10  # classes

log = logging.getLogger(__name__)


def evaluate_classification(
    embed: Embed,
    head: Head,
    index: ShardIndex,
    num_classes: int,
    topology: Topology,
    image_size: int,
    training_counts: Ints | None = None,
    exhaustive: bool = False,
) -> dict[str, float]:
    """Predict the class of every image of a set; all ranks must call, and all get the figures.

    `top1` and `top5` are the shares of the samples whose class is the best, or among the five best,
    of all classes; with `training_counts` also `few_shot/top1` and so on, for each of `SHOTS` that
    has samples. `samples` counts what was predicted, `unknown` what was left out, since its class
    is none of the run's. `beam_recall` (MHC) is the share of samples for which the beam's best
    class is the best of all.

    Scores are computed for a block of B = 128 images of each rank and a chunk of classes at a time.
    Beside the head's own rows, memory does not grow with the number of classes: a chunk of mhs,
    full and partial_fc takes 64 MiB, or what one unit of L classes takes if that is more,
    `4 L (D + B W)` bytes. An exhaustive search does not keep to this: it takes about 50 bytes for
    each class, and C scores in time.

    Args:
        embed: see `embeddings.Embed`.
        head: of the same run, on these ranks.
        index: of the set, with the class ids of the training set.
        num_classes: C of the run.
        topology, image_size: see `embeddings.map_images`.
        training_counts: `[C]`, see `count_images`.
        exhaustive: whether `beam_recall` is wanted.

    Raises:
        UserError: no sample is of a class of the run.
    """
    images = ShardImages(index)

    def _predict(pixels: Tensor) -> Tensor:
        embeddings = embed(pixels)
        classes = head.predict(embeddings, max(TOP)).classes
        if not (exhaustive and isinstance(head, MultiHeadCascade)):
            return classes
        return torch.cat([classes, head.predict_exhaustively(embeddings, 1).classes], dim=1)

    predicted = map_images(_predict, images, topology, image_size)
    labels = images.join_labels(topology)
    figures: dict[str, float] = {}
    with failing_together(topology):
        if predicted is not None:
            known = (labels >= 0) & (labels < num_classes)
            if not known.any():
                raise UserError(
                    f"{index.folder}: no image is of one of the {num_classes:,} classes of the run"
                )
            figures = _figures(predicted[known], labels[known], training_counts)
            figures["unknown"] = _name_unknown(labels[~known], index.folder, num_classes)
    return broadcast_from_first(figures, topology)


def classification_figure_names() -> list[str]:
    """What `evaluate_classification` may call its figures, but for `beam_recall`."""
    shares = [*(f"top{k}" for k in TOP), "samples"]
    return [*shares, "unknown", *(f"{name}/{key}" for name in SHOTS for key in shares)]


def _name_unknown(labels: Ints, folder: str, num_classes: int) -> float:
    """Say which classes are none of the run's, if there are any; the number of their images."""
    if len(labels):
        found = np.unique(labels)
        named = ", ".join(map(str, found[:_NAMED].tolist()))
        more = " ..." if len(found) > _NAMED else ""
        log.warning(
            "%s: %d images of %d classes that the run does not have are left out (it has ids below "
            "%d): class %s%s",
            *(folder, len(labels), len(found), num_classes, named, more),
        )
    return float(len(labels))


def _figures(predicted: Ints, labels: Ints, counts: Ints | None) -> dict[str, float]:
    """See `evaluate_classification`.

    Args:
        predicted: `[N, 5]`, best first; a sixth column is the best of an exhaustive search.
        labels: `[N]`.
        counts: training images of each class.
    """
    right = predicted[:, : max(TOP)] == labels[:, None]
    figures = _shares(right)
    if predicted.shape[1] > max(TOP):
        figures["beam_recall"] = float((predicted[:, 0] == predicted[:, -1]).mean())
    if counts is not None:
        shots = counts[labels]
        for name, (least, below) in SHOTS.items():
            chosen = (shots >= least) & (shots < below)
            if chosen.any():
                part = _shares(right[chosen])
                figures |= {f"{name}/{key}": value for key, value in part.items()}
    return figures


def _shares(right: npt.NDArray[np.bool_]) -> dict[str, float]:
    shares = {f"top{k}": float(right[:, :k].any(axis=1).mean()) for k in TOP}
    return shares | {"samples": float(len(right))}


class TrainingLabels(NamedTuple):
    """How often a training set shows each class.

    Attributes:
        counts: images of each class, int64 `[C]`.
        images: images of an epoch.
    """

    counts: Ints
    images: int

    @staticmethod
    def of(index: ShardIndex) -> TrainingLabels | None:
        """Those of a training set; None if it is not labelled."""
        counts = count_images(index)
        return None if counts is None else TrainingLabels(counts, index.samples)


def read_training_labels(data: DataConfig, seed: int) -> TrainingLabels | None:
    """Those of the training set of a run; None, too, where it is not there any more."""
    try:
        return TrainingLabels.of(open_training_index(data, seed))
    except (UserError, RunError, OSError):
        return None


def count_images(index: ShardIndex) -> Ints | None:
    """Images of each class, int64 `[C]`, by the columns of an index; None: it has none."""
    if isinstance(index, Mixture):
        return index.count_images()
    counts = np.zeros(index.num_classes, np.int64)
    for start in range(0, index.samples, _COUNTED_TOGETHER):
        stop = min(start + _COUNTED_TOGETHER, index.samples)
        labels = index.labels_of(np.arange(start, stop))
        if labels is None:
            return None
        counts += np.bincount(labels[labels >= 0], minlength=index.num_classes)
    return counts


def refuse_other_classes(evaluated: ShardIndex | LabelSet, data: DataConfig) -> None:
    """Refuse a set, or a label set, whose class ids mean other classes than those of a run.

    Names can be compared where both have a `classes.tsv`.

    Raises:
        UserError: the run has numbered its classes anew; or names a class that differs.
    """
    if data.mix or data.classes:
        key = "data.mix" if data.mix else f"data.classes={data.classes}"
        raise UserError(
            f"{evaluated.folder}: the run chose and renumbered its classes ({key}), so that the "
            "ids of this set mean others; leave out evaluate.classification and evaluate.labels, "
            "and compare images: evaluate.shards, mhe evaluate heldout"
        )
    trained = data.labels or data.shards
    if found := find_other_name(evaluated.folder, trained):
        number, here, there = found
        raise UserError(
            f"{evaluated.folder}: class {number} is {here!r}, in the training set "
            f"{trained} it is {there!r}. Class ids must mean the same: mhe data folder "
            "--heldout-images N makes two such sets; make label sets with the same class names"
        )
