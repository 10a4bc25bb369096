"""What is kept from training to measure with: whole classes, or some images of every class.

The choice follows from names alone, by their hashes. It stays the same on any machine and, for
what was there before, when a folder grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError

_FEWEST_CLASSES = 2  # that must be left to train on


class HeldoutSplit(NamedTuple):
    """How much is held out; one of them is not 0.

    Attributes:
        classes: whole classes, of those with two images or more.
        images: of each class that has more than that.
    """

    classes: int = 0
    images: int = 0


def hold_out(
    paths: Sequence[str],
    names: Sequence[str],
    classes: npt.NDArray[np.int64],
    split: HeldoutSplit,
) -> npt.NDArray[np.bool_]:
    """Choose what is held out: bool `[N]`.

    Args:
        paths: of the N images.
        names: of the C classes.
        classes: int64 `[N]`, the class of each image.
        split: how much.

    Raises:
        UserError: there is less than that.
    """
    counts = np.bincount(classes, minlength=len(names))
    if split.classes:
        eligible = np.flatnonzero(counts >= 2).tolist()
        if split.classes > min(len(eligible), len(names) - _FEWEST_CLASSES):
            raise UserError(
                f"--heldout-classes {split.classes}: there are {len(names):,} classes, "
                f"{len(eligible):,} of them with two images or more, and {_FEWEST_CLASSES} must be "
                "left to train on; hold out fewer"
            )
        chosen = sorted(eligible, key=lambda number: _hash(names[number]))[: split.classes]
        return np.isin(classes, chosen)
    if not (counts > split.images).any():
        raise UserError(
            f"--heldout-images {split.images}: the largest class has {max(counts, default=0):,} "
            "images, and one must be left to train on; hold out fewer"
        )
    hashes = np.fromiter((_hash(path) for path in paths), "S32", len(paths))
    by_class = np.lexsort((hashes, classes))  # of each class, by its hashes
    rank = np.arange(len(paths)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(paths), bool)
    held[by_class] = (rank < split.images) & np.repeat(counts > split.images, counts)
    return held


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
