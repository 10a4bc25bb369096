"""What is in a label set, and what changed between two of them; in memory of the classes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.errors import UserError
from pipelines.shards.label_set import Ints, LabelLists, LabelSet
from pipelines.shards.tables import CLASSES_FILE
from pipelines.storage.unusable_path import explain_fault
from pipelines.storage.urls import resolve_url

PART: Final = 1 << 20  # samples that are in memory together


class LabelSummary(NamedTuple):
    """What is in a label set.

    Attributes:
        samples_by_count: int64 `[max_labels + 1]`, how many samples have 0, 1, 2, ... classes.
        per_class: int64 `[C]`, samples of each class.
    """

    samples_by_count: Ints
    per_class: Ints


class ChangedSample(NamedTuple):
    """A sample whose classes differ, by name; its number is that in the data set."""

    number: int
    before: list[str]
    after: list[str]


class LabelChanges(NamedTuple):
    """What changed between two label sets of a data set; the order of a sample's classes is none.

    Attributes:
        same: samples with the same classes.
        changed: samples that have classes in both, and not the same.
        removed: samples that have classes in the first one only.
        added: samples that have classes in the second one only.
        classes: names of the classes of both, those of the first one first.
        lost: int64 `[len(classes)]`, samples that each class lost.
        gained: int64 `[len(classes)]`, samples that each class gained.
        first: some of the samples that differ, the first ones.
    """

    same: int
    changed: int
    removed: int
    added: int
    classes: list[str]
    lost: Ints
    gained: Ints
    first: list[ChangedSample]


def summarize_labels(labels: LabelSet) -> LabelSummary:
    """Count classes by samples, and samples by classes.

    Raises:
        UserError: a column is damaged.
    """
    by_count = np.zeros(labels.max_labels + 1, np.int64)
    per_class = np.zeros(labels.num_classes, np.int64)
    for _, lists in _parts(labels):
        counts, ids = lists.counts, lists.class_ids
        if counts.max(initial=0) > labels.max_labels or ids.max(initial=-1) >= labels.num_classes:
            raise labels.class_ids.damaged("its values are not those of a label set")
        by_count += np.bincount(counts, minlength=len(by_count))
        distinct, sizes = np.unique(ids, return_counts=True)
        per_class[distinct] += sizes
    return LabelSummary(by_count, per_class)


def compare_labels(before: LabelSet, after: LabelSet, shown: int = 10) -> LabelChanges:
    """Compare two label sets of a data set; classes are the same if they have the same name.

    Args:
        before, after: the label sets.
        shown: how many samples that differ are named.

    Raises:
        UserError: they belong to different data sets.
    """
    if before.index_digest != after.index_digest:
        raise UserError(
            f"{before.folder} and {after.folder} belong to different data sets "
            f"({before.index_digest} and {after.index_digest}): there is nothing to compare"
        )
    names, renumbered = _shared_classes(before, after)
    found = _Comparison(names)
    for (start, one), (_, other) in zip(_parts(before), _parts(after), strict=True):
        found.add(start, one, other._replace(class_ids=renumbered[other.class_ids]), shown)
    return found.result()


class _Comparison:
    """What was found so far."""

    def __init__(self, names: list[str]) -> None:
        self._names, self._first = names, list[ChangedSample]()
        self._same = self._changed = self._removed = self._added = 0
        self._lost = np.zeros(len(names), np.int64)
        self._gained = np.zeros(len(names), np.int64)

    def add(self, start: int, one: LabelLists, other: LabelLists, shown: int) -> None:
        """Compare the lists of consecutive samples."""
        total = max(1, len(self._names))
        pairs = [
            np.unique(np.repeat(np.arange(len(lists.ends)), lists.counts) * total + lists.class_ids)
            for lists in (one, other)
        ]
        lost = np.setdiff1d(pairs[0], pairs[1], assume_unique=True)
        gained = np.setdiff1d(pairs[1], pairs[0], assume_unique=True)
        for counts, changes in ((self._lost, lost), (self._gained, gained)):
            distinct, sizes = np.unique(changes % total, return_counts=True)
            counts[distinct] += sizes
        differing = np.union1d(lost // total, gained // total)
        has_one, has_other = one.counts[differing] > 0, other.counts[differing] > 0
        self._same += len(one.ends) - len(differing)
        self._changed += int((has_one & has_other).sum())
        self._removed += int((~has_other).sum())
        self._added += int((~has_one).sum())
        for position in differing[: shown - len(self._first)].tolist():
            lists = [[self._names[n] for n in part.of(position)] for part in (one, other)]
            self._first.append(ChangedSample(start + position, *lists))

    def result(self) -> LabelChanges:
        """See `LabelChanges`."""
        counts = (self._same, self._changed, self._removed, self._added)
        return LabelChanges(*counts, self._names, self._lost, self._gained, self._first)


def _shared_classes(before: LabelSet, after: LabelSet) -> tuple[list[str], Ints]:
    """Names of the classes of both, and int64 `[C of after]`: the number of each among them."""
    number = {name: position for position, name in enumerate(read_class_names(before))}
    renumbered = [number.setdefault(name, len(number)) for name in read_class_names(after)]
    return list(number), np.array(renumbered, np.int64)


def read_class_names(labels: LabelSet) -> list[str]:
    """The names of all classes of a label set, in order, as `classes.tsv` writes them.

    Raises:
        UserError: the table is missing, or is not that of these classes.
    """
    filesystem, path = resolve_url(f"{labels.folder}/{CLASSES_FILE}")
    try:
        lines = filesystem.cat_file(path).decode().split("\n")[1:-1]
    except (OSError, ValueError) as error:
        path = f"{labels.folder}/{CLASSES_FILE}"
        raise UserError(f"{path}: cannot be read: {explain_fault(error)}") from error
    names = [line.split("\t")[-1] for line in lines]
    if len(names) != labels.num_classes or len(set(names)) != len(names):
        raise UserError(
            f"{labels.folder}/{CLASSES_FILE}: not the table of its {labels.num_classes:,} classes; "
            "make the label set again"
        )
    return names


def largest(counts: Sequence[int] | Ints, limit: int) -> list[int]:
    """Positions of the largest counts above 0, the largest first, at most `limit` of them."""
    counts = np.asarray(counts)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [int(position) for position in order if counts[position] > 0]


def _parts(labels: LabelSet) -> Iterator[tuple[int, LabelLists]]:
    for start in range(0, labels.samples, PART):
        yield start, labels.lists(start, min(start + PART, labels.samples))
