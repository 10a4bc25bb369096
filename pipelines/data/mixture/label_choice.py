"""Which of its classes a sample shows in an epoch, where it has more than a run takes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import GOLDEN, derive, mix64
from pipelines.data.order import Ints
from pipelines.shards.label_set import NO_LABEL, LabelLists


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


def _noise(key: int, numbers: Ints, ids: Ints) -> npt.NDArray[np.uint64]:
    """A keyed 64-bit hash of pairs, by plain arithmetic: no version of NumPy draws otherwise."""
    words = np.full(len(numbers), key, np.uint64)
    for values in (numbers, ids):
        words = mix64(words + GOLDEN ^ values.astype(np.uint64))
    return words
