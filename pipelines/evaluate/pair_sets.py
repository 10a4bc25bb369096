"""Verification 1:1 on sets of image pairs: InsightFace's `.bin` files, and CSV tables of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import Embed, Images, embed_images, normalize_embeddings
from pipelines.evaluate.metrics.bootstrap import Interval, bootstrap_interval
from pipelines.evaluate.metrics.pair_sampling import SamplePairs, squared_distances
from pipelines.evaluate.metrics.roc import tar_name
from pipelines.evaluate.metrics.verification import (
    FOLDS,
    Bools,
    Floats,
    fold_slices,
    roc_curve,
    tar_at_far,
    ten_fold_accuracy,
)
from pipelines.evaluate.sets.insightface_bin import read_verification_bin
from pipelines.evaluate.sets.pair_table import read_pairs

FARS: Final = (1e-2, 1e-3)


class PairSet(NamedTuple):
    """Images, and the pairs of them that are compared.

    Attributes:
        name: of the set in the results.
        images: all of its images.
        pairs: numbers of images.
    """

    name: str
    images: Images
    pairs: SamplePairs


@dataclass(frozen=True)
class PairSetResult:
    """The figures of the ten-fold protocol on a set (docs/formats.md section 2).

    Attributes:
        name: of the set.
        pairs: their number.
        metrics: `accuracy`, `accuracy_std`, `threshold` (mean over the folds, of the squared
            distance), `tar@far=1e-3` and so on.
        intervals: 95 % bootstrap interval of `accuracy` and of each `tar@far`.
        roc: far and tar over all pairs.
    """

    name: str
    pairs: int
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    roc: tuple[Floats, Floats]

    def named_metrics(self) -> dict[str, float]:
        """Every figure under a name of its own, as trackers take it."""
        figures = {f"{self.name}/{key}": value for key, value in self.metrics.items()}
        for key, (low, high) in self.intervals.items():
            figures |= {f"{self.name}/{key}_low": low, f"{self.name}/{key}_high": high}
        return figures

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON can hold them, without the curve."""
        return {"pairs": self.pairs, **self.metrics} | {
            f"{key}_interval": list(value) for key, value in self.intervals.items()
        }


def read_bin_sets(paths: Sequence[str]) -> list[PairSet]:
    """Read `.bin` files; each is named by its file.

    Raises:
        UserError: see `read_verification_bin`, `refuse_unbalanced` and `refuse_equal_names`.
    """
    sets = []
    for path in paths:
        found = read_verification_bin(path)
        first = np.arange(0, found.count, 2)
        pairs = SamplePairs(first, first + 1, found.same)
        refuse_unbalanced(path, pairs)
        sets.append(PairSet(PurePosixPath(path).stem, found, pairs))
    refuse_equal_names(sets)
    return sets


def refuse_equal_names(sets: Sequence[PairSet]) -> None:
    """Raise UserError if the files of two sets have one name: so would their figures."""
    names = [each.name for each in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two verification sets are called {twice[0]}: rename one of the files")


def pair_figure_names(paths: Sequence[str]) -> list[str]:
    """What the metrics of `.bin` files are called, without intervals."""
    keys = ["accuracy", "accuracy_std", "threshold", *map(tar_name, FARS)]
    return [f"{PurePosixPath(path).stem}/{key}" for path in paths for key in keys]


def read_table_set(table: str, root: str) -> PairSet:
    """Read the pairs of a CSV file (`image_files.read_pairs`); the set is named by the file.

    Raises:
        UserError: see `read_pairs` and `refuse_unbalanced`.
    """
    files, first, second, same = read_pairs(table, root)
    pairs = SamplePairs(first, second, same)
    refuse_unbalanced(table, pairs)
    return PairSet(PurePosixPath(table).stem, files, pairs)


def verify_pair_sets(
    embed: Embed,
    sets: Sequence[PairSet],
    topology: Topology,
    image_size: int,
    flip: bool = True,
    with_intervals: bool = True,
) -> list[PairSetResult]:
    """Embed and score the sets, one after the other; all ranks must call.

    Args:
        embed: see `embeddings.Embed`.
        sets: the same on all ranks.
        topology: the ranks; the result does not depend on their number.
        image_size: of the images in pixels.
        flip: add the embedding of the mirrored image, as the protocol does.
        with_intervals: compute bootstrap intervals too, which takes seconds on rank 0.

    Returns:
        A result for each set on rank 0, an empty list elsewhere.
    """
    results = []
    for each in sets:
        rows = embed_images(embed, each.images, topology, image_size, flip)
        if rows is not None:
            distances = squared_distances(normalize_embeddings(rows), each.pairs)
            results.append(score_pairs(each.name, distances, each.pairs.same, with_intervals))
    return results


def score_pairs(
    name: str, distances: Floats, same: Bools, with_intervals: bool = True
) -> PairSetResult:
    """The figures of a set from the squared distances of its pairs, `[P]`."""
    folds = ten_fold_accuracy(distances, same)
    metrics = {"accuracy": folds.mean, "accuracy_std": folds.std}
    metrics["threshold"] = float(folds.thresholds.mean())
    metrics |= {tar_name(far): tar_at_far(distances, same, far).tar for far in FARS}
    intervals = {}
    if with_intervals:
        intervals = {"accuracy": bootstrap_interval(_accuracy, distances, same)}
        for far in FARS:
            intervals[tar_name(far)] = bootstrap_interval(partial(_tar, far=far), distances, same)
    return PairSetResult(name, len(same), metrics, intervals, roc_curve(distances, same))


def refuse_unbalanced(name: str, pairs: SamplePairs) -> None:
    """Refuse pairs that the protocol cannot score.

    Raises:
        UserError: fewer pairs than folds, or a fold with pairs of one kind only.
    """
    for fold, part in enumerate(fold_slices(len(pairs.same)), 1):
        same = pairs.same[part]
        if same.all() or not same.any():
            raise UserError(
                f"{name}: all pairs of fold {fold} of {FOLDS} (consecutive pairs) are "
                f"{'same' if same.any() else 'different'}; mix the order of the pairs"
            )


def _accuracy(distances: Floats, same: Bools) -> float:
    return ten_fold_accuracy(distances, same).mean


def _tar(distances: Floats, same: Bools, far: float) -> float:
    return tar_at_far(distances, same, far).tar
