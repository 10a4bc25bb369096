"""Sets of image pairs, verified 1:1: InsightFace's `.bin` files, and pairs that a table names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.evaluate.embeddings import Embed, Images, embed_images, normalised
from pipelines.evaluate.metrics.bootstrap import Interval, interval
from pipelines.evaluate.metrics.pair_sampling import Pairs, squared_distances
from pipelines.evaluate.metrics.roc import far_name
from pipelines.evaluate.metrics.verification import (
    FOLDS,
    Bools,
    Floats,
    accuracy,
    curve,
    fold_slices,
    tar_at_far,
)
from pipelines.evaluate.sets.image_files import read_pairs
from pipelines.evaluate.sets.insightface_bin import read_bin

FARS: Final = (1e-2, 1e-3)


class PairSet(NamedTuple):
    """Images, and which of them are compared.

    Attributes:
        name: what the set is called in results.
        images: all of its images.
        pairs: numbers of images.
    """

    name: str
    images: Images
    pairs: Pairs


@dataclass(frozen=True)
class Verified:
    """What the ten-fold protocol found on a set (docs/formats.md section 2).

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

    def flat(self) -> dict[str, float]:
        """Every figure under a name of its own, as trackers want it."""
        figures = {f"{self.name}/{key}": value for key, value in self.metrics.items()}
        for key, (low, high) in self.intervals.items():
            figures |= {f"{self.name}/{key}_low": low, f"{self.name}/{key}_high": high}
        return figures

    def plain(self) -> dict[str, Any]:
        """The figures as JSON holds them, without the curve."""
        return {"pairs": self.pairs, **self.metrics} | {
            f"{key}_interval": list(value) for key, value in self.intervals.items()
        }


def load_bins(paths: Sequence[str]) -> list[PairSet]:
    """Read `.bin` files; each is named by its file.

    Raises:
        UserError: see `verification_bin.read_bin` and `refuse_unbalanced`; or two files have one
            name.
    """
    sets = []
    for path in paths:
        found = read_bin(path)
        first = np.arange(0, found.count, 2)
        pairs = Pairs(first, first + 1, found.same)
        refuse_unbalanced(path, pairs)
        sets.append(PairSet(PurePosixPath(path).stem, found, pairs))
    names = [each.name for each in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two verification sets are called {twice[0]}: rename one of the files")
    return sets


def load_table(table: str, root: str) -> PairSet:
    """Pairs of a CSV file (`image_files.read_pairs`), named by the file.

    Raises:
        UserError: see `read_pairs` and `refuse_unbalanced`.
    """
    files, first, second, same = read_pairs(table, root)
    pairs = Pairs(first, second, same)
    refuse_unbalanced(table, pairs)
    return PairSet(PurePosixPath(table).stem, files, pairs)


def verify(
    embed: Embed,
    sets: Sequence[PairSet],
    topology: Topology,
    side: int,
    flip: bool = True,
    with_intervals: bool = True,
) -> list[Verified]:
    """Embed and score the sets, one after the other; all ranks must call.

    Args:
        embed: see `embeddings.Embed`.
        sets: the same on all ranks.
        topology: the ranks; the result does not depend on their number.
        side: of the images in pixels.
        flip: add the embedding of the mirrored image, as the protocol does.
        with_intervals: bootstrap too, which takes seconds of rank 0.

    Returns:
        a result for each set on rank 0; nothing elsewhere.
    """
    results = []
    for each in sets:
        rows = embed_images(embed, each.images, topology, side, flip)
        if rows is not None:
            distances = squared_distances(normalised(rows), each.pairs)
            results.append(score(each.name, distances, each.pairs.same, with_intervals))
    return results


def score(name: str, distances: Floats, same: Bools, with_intervals: bool = True) -> Verified:
    """The figures of a set from the squared distances of its pairs, `[P]`; see `verify`."""
    folds = accuracy(distances, same)
    metrics = {"accuracy": folds.mean, "accuracy_std": folds.std}
    metrics["threshold"] = float(folds.thresholds.mean())
    metrics |= {far_name(far): tar_at_far(distances, same, far).tar for far in FARS}
    intervals = {}
    if with_intervals:
        intervals = {"accuracy": interval(_accuracy, distances, same)}
        for far in FARS:
            intervals[far_name(far)] = interval(partial(_tar, far=far), distances, same)
    return Verified(name, len(same), metrics, intervals, curve(distances, same))


def refuse_unbalanced(name: str, pairs: Pairs) -> None:
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
    return accuracy(distances, same).mean


def _tar(distances: Floats, same: Bools, far: float) -> float:
    return tar_at_far(distances, same, far).tar
