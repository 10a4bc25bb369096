"""Which of its classes a sample shows in an epoch, where it has more than a run takes."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import derive
from pipelines.data.order import Ints
from pipelines.shards.label_set import NO_LABEL, LabelLists

_Words = npt.NDArray[np.uint64]
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_A: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B: Final = np.uint64(0x94D049BB133111EB)


def choose_labels(lists: LabelLists, limit: int, numbers: Ints, seed: int, epoch: int) -> Ints:
    """At most `limit` classes of each sample, any of its classes as likely as any other.

    The choice for a sample is a pure function of (seed, epoch, its number, its classes).

    Args:
        lists: the samples' classes; one that stands in a list twice counts once.
        limit: K.
        numbers: int64 `[n]`, which key the choice.
        seed: of the run.
        epoch: number of the epoch.

    Returns:
        int64 `[n, K]`: the chosen classes of each sample, ascending, then `NO_LABEL`.
    """
    owners, ids = distinct_labels(lists)
    if len(ids) and np.bincount(owners).max() > limit:
        noise = _noise(derive(seed, "labels of a sample", epoch), numbers[owners], ids)
        order = np.lexsort((noise, owners))
        kept = np.sort(order[_ranks(owners) < limit])
        owners, ids = owners[kept], ids[kept]
    table = np.full((len(numbers), limit), NO_LABEL, np.int64)
    table[owners, _ranks(owners)] = ids
    return table


def distinct_labels(lists: LabelLists) -> tuple[Ints, Ints]:
    """Sample and class of each entry, by sample and then by class, each pair once.

    Returns:
        int64 `[t]`, the sample's position in `lists`; int64 `[t]`, the class.
    """
    owners = np.repeat(np.arange(len(lists.ends)), lists.counts)
    order = np.lexsort((lists.class_ids, owners))
    owners, ids = owners[order], lists.class_ids[order]
    again = (np.diff(owners, prepend=-1) == 0) & (np.diff(ids, prepend=-1) == 0)
    return owners[~again], ids[~again]


def _ranks(owners: Ints) -> Ints:
    """Position of each entry among those of its sample; the entries of a sample are adjacent."""
    counts = np.bincount(owners)
    return np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)


def _noise(key: int, numbers: Ints, ids: Ints) -> _Words:
    """A keyed 64-bit hash of pairs: rounds of SplitMix64 (Steele, Lea, Flood 2014).

    Plain arithmetic, so that no version of NumPy draws otherwise; the products wrap around.
    """
    words = np.full(len(numbers), key, np.uint64)
    for values in (numbers, ids):
        words = words + _STEP ^ values.astype(np.uint64)
        words = (words ^ (words >> np.uint64(30))) * _MIX_A
        words = (words ^ (words >> np.uint64(27))) * _MIX_B
        words ^= words >> np.uint64(31)
    return words
