"""What a clustering is worth: sizes of the classes, and how they agree with true labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.clustering.assign import ClassSearch, Labels
from pipelines.clustering.kmeans import find_nearest
from pipelines.clustering.members import Members
from pipelines.clustering.rows import Ints, Rows, UnitRows, release_pages
from pipelines.shards.similarities import decode_similarities

_IMAGES: Final = 1 << 20  # whose labels are counted together
_PROBED: Final = 512  # images that are compared with every centre
_CENTRES: Final = 1 << 15  # centres that they are compared with at a time

Floats = npt.NDArray[np.float64]
ReadLabels = Callable[[Ints], Ints]
"""Numbers of images to their true labels, int64; -1: none."""


class Agreement(NamedTuple):
    """How classes agree with true labels, over the images that have both.

    Attributes:
        purity: share of the images whose label is the commonest one of their class.
        nmi: mutual information, divided by the mean of both entropies, 0 to 1.
        labels: true labels that occur.
        images: how many were compared.
    """

    purity: float
    nmi: float
    labels: int
    images: int


def measure_agreement(members: Members, read_labels: ReadLabels) -> Agreement:
    """Compare classes with labels; images are read class after class, about a million together.

    Args:
        members: of each class, by the nearest one of each image.
        read_labels: see `ReadLabels`.
    """
    images = common = 0
    joint = per_class = 0.0  # sums of n log n
    totals: dict[int, int] = {}
    for owner, labels in _labelled_groups(members, read_labels):
        pairs, sizes = np.unique(np.stack([owner, labels]), axis=1, return_counts=True)
        begins = np.flatnonzero(np.diff(pairs[0], prepend=-1))
        if not len(begins):
            continue
        images += int(sizes.sum())
        common += int(np.maximum.reduceat(sizes, begins).sum())
        joint += _n_log_n(sizes)
        per_class += _n_log_n(np.add.reduceat(sizes, begins))
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
            totals[int(label)] = totals.get(int(label), 0) + int(count)
    if not images:
        return Agreement(0.0, 0.0, 0, 0)
    per_label = _n_log_n(np.array(list(totals.values())))
    return Agreement(
        common / images, _nmi(images, joint, per_class, per_label), len(totals), images
    )


def _nmi(images: int, joint: float, per_class: float, per_label: float) -> float:
    """From sums of n log n: H = log N - sum / N."""
    whole = np.log(images)
    of_class, of_label = whole - per_class / images, whole - per_label / images
    mutual = of_class + of_label - (whole - joint / images)
    mean = (of_class + of_label) / 2
    return float(np.clip(mutual / mean, 0, 1)) if mean > 1e-12 else 1.0


def _n_log_n(counts: Ints) -> float:
    return float((counts * np.log(np.maximum(counts, 1))).sum())


def _labelled_groups(members: Members, read_labels: ReadLabels) -> Iterator[tuple[Ints, Ints]]:
    """Class and label of images that have both, some whole classes together."""
    group = members.starts // _IMAGES
    begins = np.flatnonzero(np.diff(group, prepend=-1)).tolist()
    for first, stop in zip(begins, [*begins[1:], len(members.counts)], strict=True):
        owner = np.repeat(np.arange(first, stop), members.counts[first:stop])
        labels = read_labels(members.between(first, stop))
        yield owner[labels >= 0], labels[labels >= 0]


def measure_recall(rows: UnitRows, search: ClassSearch, centres: Rows, seed: int) -> float:
    """Share of some images whose nearest class is found, of all classes.

    Args:
        rows: all images.
        search: finds classes in the cells nearest to an image.
        centres: float32 `[C, D]`, of all classes.
        seed: of the choice of images.
    """
    count = min(_PROBED, rows.count)
    drawn = sample_without_replacement(rows.count, count, generator(seed, "cluster/recall"))
    images = rows.gather(drawn)
    images = images[images.any(axis=1)]
    if not len(images):
        return 1.0
    found, _ = search.find(images, 1)
    best = np.full(len(images), -np.inf, np.float32)
    for start in range(0, len(centres), _CENTRES):
        part = np.array(centres[start : start + _CENTRES])
        release_pages(centres)
        best = np.maximum(best, find_nearest(images, part, 1)[0][:, 0])
    return float((found[:, 0] >= best - 1e-6).mean())


def mean_similarities(nearest: Labels, counts: Ints) -> Floats:
    """float64 `[C]`: the mean cosine to the centre of the images that a class is the nearest of.

    Args:
        nearest: both `[N]`, of each image.
        counts: int64 `[C]`, how many images these are.
    """
    sums = np.zeros(len(counts))
    for start in range(0, len(nearest.classes), _IMAGES):
        classes = np.asarray(nearest.classes[start : start + _IMAGES])
        cosines = decode_similarities(nearest.similarities[start : start + _IMAGES])
        sums += np.bincount(classes[classes >= 0], cosines[classes >= 0], len(counts))
    means: Floats = sums / np.maximum(counts, 1)
    return means


def choose_classes(
    counts: Ints, similarities: Floats, shown: int, seed: int
) -> dict[str, list[int]]:
    """Classes to look at: drawn at random, the largest, the loosest; at most `shown` of each.

    Args:
        counts: int64 `[C]`, images that each class is the nearest of.
        similarities: float64 `[C]`, their mean cosine to the centre.
        shown: how many of each.
        seed: of the draw.
    """
    filled = np.flatnonzero(counts)
    several = np.flatnonzero(counts > 1)
    rng = generator(seed, "cluster/shown")
    drawn = sample_without_replacement(len(filled), min(shown, len(filled)), rng)
    return {
        "random": filled[drawn].tolist(),
        "largest": filled[np.argsort(-counts[filled], kind="stable")][:shown].tolist(),
        "loosest": several[np.argsort(similarities[several], kind="stable")][:shown].tolist(),
    }
