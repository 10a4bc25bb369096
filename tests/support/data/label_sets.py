"""Label sets for tests, from plain lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelLists, LabelSet, write_label_set

PART = 7  # samples that are written together


def as_lists(lists: Sequence[Sequence[int]]) -> LabelLists:
    flat = [number for each in lists for number in each]
    ends = np.cumsum([len(each) for each in lists], dtype=np.int64)
    return LabelLists(ends, np.array(flat, np.int64))


def lists_of(labels: LabelSet) -> list[list[int]]:
    """The class ids of each sample."""
    found = labels.lists(0, labels.samples)
    return [found.of(number).tolist() for number in range(labels.samples)]


def write_labels(
    target: str,
    index: ShardIndex,
    lists: Sequence[Sequence[int]],
    num_classes: int,
    names: Sequence[str] | None = None,
) -> LabelSet:
    """A label set with these class ids for each sample."""
    starts = range(0, max(1, len(lists)), PART)
    return write_label_set(
        target,
        index,
        num_classes,
        lambda: (as_lists(lists[start : start + PART]) for start in starts),
        names,
    )
