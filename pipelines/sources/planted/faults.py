"""Which faults are planted where. Pure, and keyed: no draw depends on the order of the samples.

A class or an image is chosen by a hash of the seed, of the kind of fault and of its own name, the
lowest first. So the same data set, dealt to other shards, gets the same faults.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_SMALLEST_SPLIT: Final = 4  # images of a class that becomes two


@dataclass(frozen=True)
class FaultRates:
    """How much is planted of each kind, as shares.

    Attributes:
        split: of the classes become two, half of their images each.
        merged: of the classes become one with another of them.
        relabelled: of the images get another class, drawn at random.
        foreign: further images that show no class, as a share of the images.
        leaked: of the held-out images are copied into the training set.
    """

    split: float = 0.05
    merged: float = 0.05
    relabelled: float = 0.10
    foreign: float = 0.02
    leaked: float = 0.01


class PlannedClasses(NamedTuple):
    """What becomes of the C true classes.

    Attributes:
        split: int64 `[s]`, true classes that become two.
        merged: int64 `[m, 2]`, pairs of true classes that become one.
        first: int64 `[C]`, the planted class of each true one.
        second: int64 `[C]`, the planted class of its other half; -1: it is not split.
        num_classes: P, planted classes.
    """

    split: Ints
    merged: Ints
    first: Ints
    second: Ints
    num_classes: int

    def names(self, true: Sequence[str]) -> list[str]:
        """Names of the planted classes; two halves have names of their own."""
        found = [""] * self.num_classes
        for name, first, second in zip(
            true, self.first.tolist(), self.second.tolist(), strict=True
        ):
            found[first] = found[first] or name
            if second >= 0:
                found[second] = f"{name} (2)"
        return found


class PlannedFaults(NamedTuple):
    """All faults.

    Attributes:
        classes: see `PlannedClasses`.
        labels: int64 `[N]`, the planted class of each image of the data set.
        honest: int64 `[N]`, the class that it would have had if it were not relabelled.
        relabelled: int64 `[r]`, images whose class is wrong, ascending.
        leaked: int64 `[l]`, held-out images that are copied, in their order in the new shards.
        leaked_labels, foreign_labels: int64 `[l]`, `[f]`, the planted classes of the new images.
    """

    classes: PlannedClasses
    labels: Ints
    honest: Ints
    relabelled: Ints
    leaked: Ints
    leaked_labels: Ints
    foreign_labels: Ints


def plan_faults(
    labels: Ints,
    keys: Sequence[str],
    num_classes: int,
    heldout_keys: Sequence[str],
    foreign: Sequence[str],
    seed: int,
    rates: FaultRates,
) -> PlannedFaults:
    """Choose where every fault lies.

    Args:
        labels: int64 `[N]`, true class of each image.
        keys: `[N]`, its name.
        num_classes: C.
        heldout_keys: names of the held-out images.
        foreign: names of the foreign images; all of them are planted.
        seed: of all draws.
        rates: how much.

    Raises:
        UserError: there are too few classes for the rates.
    """
    classes = _plan_classes(labels, num_classes, seed, rates)
    draws = hash_names(seed, "images", keys)
    honest = _split_images(labels, draws, classes)
    relabelled = np.sort(_lowest(hash_names(seed, "relabelled", keys), rates.relabelled))
    planted = honest.copy()
    wrong = [keys[number] for number in relabelled.tolist()]
    siblings = _siblings(classes)[honest[relabelled]]
    planted[relabelled] = _other_classes(
        seed, wrong, honest[relabelled], siblings, classes.num_classes
    )
    leaked = _lowest(hash_names(seed, "leaked", heldout_keys), rates.leaked)
    copied = [heldout_keys[number] for number in leaked.tolist()]
    return PlannedFaults(
        classes=classes,
        labels=planted,
        honest=honest,
        relabelled=relabelled,
        leaked=leaked,
        leaked_labels=_any_class(seed, "leaked class", copied, classes.num_classes),
        foreign_labels=_any_class(seed, "foreign class", foreign, classes.num_classes),
    )


def hash_names(seed: int, purpose: str, names: Sequence[str]) -> Hashes:
    """uint64 `[n]`: a draw for each name, a pure function of the three."""
    prefix = f"{seed}/planted/{purpose}/"
    digests = (
        hashlib.blake2b((prefix + name).encode(errors="surrogateescape"), digest_size=8).digest()
        for name in names
    )
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _lowest(draws: Hashes, share: float) -> Ints:
    """Numbers of the given share of the draws, the lowest first."""
    count = round(share * len(draws))
    return np.argsort(draws, kind="stable")[:count].astype(np.int64)


def _plan_classes(labels: Ints, num_classes: int, seed: int, rates: FaultRates) -> PlannedClasses:
    numbers = [str(number) for number in range(num_classes)]
    sizes = np.bincount(labels, minlength=num_classes)
    order = np.argsort(hash_names(seed, "split", numbers), kind="stable")
    split = order[sizes[order] >= _SMALLEST_SPLIT][: round(rates.split * num_classes)]
    order = np.argsort(hash_names(seed, "merged", numbers), kind="stable")
    order = order[~np.isin(order, split) & (sizes[order] > 0)]
    pairs = round(rates.merged * num_classes / 2)
    if len(split) < round(rates.split * num_classes) or len(order) < 2 * pairs:
        raise UserError(
            f"{num_classes:,} classes: too few to split {rates.split:.0%} of them (each needs "
            f"{_SMALLEST_SPLIT} images) and to merge {rates.merged:.0%}; plant fewer faults"
        )
    merged = np.sort(order[: 2 * pairs].reshape(pairs, 2), axis=1)
    stays = np.ones(num_classes, bool)
    stays[merged[:, 1]] = False
    first = np.cumsum(stays) - 1
    first[merged[:, 1]] = first[merged[:, 0]]
    second = np.full(num_classes, -1)
    second[np.sort(split)] = stays.sum() + np.arange(len(split))
    count = int(stays.sum()) + len(split)
    return PlannedClasses(np.sort(split), merged, first, second, count)


def _split_images(labels: Ints, draws: Hashes, classes: PlannedClasses) -> Ints:
    """int64 `[N]`: planted classes; of a class that is split, every second image by its draw."""
    order = np.lexsort((draws, labels))
    sizes = np.bincount(labels)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moves = (ranks % 2 == 1) & (classes.second[labels] >= 0)
    return np.where(moves, classes.second[labels], classes.first[labels])


def _siblings(classes: PlannedClasses) -> Ints:
    """int64 `[P]`: the other half of each planted class; itself, if it has none."""
    found = np.arange(classes.num_classes)
    found[classes.first[classes.split]] = classes.second[classes.split]
    found[classes.second[classes.split]] = classes.first[classes.split]
    return found


def _other_classes(seed: int, names: Sequence[str], own: Ints, sibling: Ints, count: int) -> Ints:
    """int64 `[n]`: a planted class for each image that shows another true class."""
    if count < 3:
        raise UserError(f"{count} classes: too few to give an image a wrong one; at least 3")
    halves = sibling != own
    drawn = hash_names(seed, "wrong class", names) % (count - 1 - halves).astype(np.uint64)
    found = drawn.astype(np.int64)
    found += found >= np.minimum(own, sibling)
    return found + (halves & (found >= np.maximum(own, sibling)))


def _any_class(seed: int, purpose: str, names: Sequence[str], count: int) -> Ints:
    return (hash_names(seed, purpose, names) % np.uint64(count)).astype(np.int64)
