"""A data set in a mixture: which of its images a pass over it has, and how they are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

import numpy as np

from mhe_dist.seeds import generator
from pipelines.data.mixture.drawn import PassDraw
from pipelines.data.order import Ints
from pipelines.data.sample import BadSampleError
from pipelines.shards.image_format import IMAGE_EXTENSIONS
from pipelines.shards.index import IndexEntry, ShardIndex
from pipelines.shards.label_set import LabelSet

_HALF_WORD: Final = 32
_POOL = 1 << 23  # images of whole classes that are drawn from together, about
_PART: Final = 1 << 20  # labels of a label set that are read together


@dataclass(frozen=True)
class MixedDataset:
    """A data set in a mixture.

    Attributes:
        index: of the data set.
        labels: its label set, with at most one class for each sample; None: the index has them.
        first_class: its first class in the mixture.
        classes: int64, ids of the chosen classes, sorted; None: all.
        per_class: most images of each class in a pass; 0: no limit.
        key: of the config's block that names it, `data` or `data.mix.N`.
    """

    index: ShardIndex
    labels: LabelSet | None
    first_class: int
    classes: Ints | None
    per_class: int
    key: str

    @property
    def is_whole(self) -> bool:
        """Whether a pass over it has all of its images."""
        is_labelled = self.labels is None or self.labels.labelled == self.labels.samples
        return is_labelled and self.classes is None and not self.per_class

    @property
    def num_classes(self) -> int:
        """How many classes it has in the mixture."""
        return self._all_classes if self.classes is None else len(self.classes)

    @property
    def _all_classes(self) -> int:
        return self.index.num_classes if self.labels is None else self.labels.num_classes

    @cached_property
    def pass_samples(self) -> int:
        """How many images a pass has."""
        if self.is_whole:
            return self.index.samples
        counts = self._class_counts[1]
        return int((np.minimum(counts, self.per_class) if self.per_class else counts).sum())

    def draw(self, rng: np.random.Generator) -> Ints:
        """The images of a pass: int64 numbers through the data set, in no order.

        In memory of the images that are drawn, and of a few million others.
        """
        if self.is_whole:
            return np.arange(self.index.samples)
        drawn = [np.empty(0, np.int64)]
        for numbers, counts in self._pools():
            chosen = draw_at_most(counts, self.per_class, rng) if self.per_class else slice(None)
            drawn.append(numbers[chosen])
        return np.concatenate(drawn)

    def entry(self, shard: int, position: int) -> IndexEntry:
        """Label and image of a sample, see `ShardIndex.entry`.

        Raises:
            BadSampleError: it has no label, or one out of range, where the next set's classes may
                begin.
        """
        label = self._label(shard, position)
        if not 0 <= label < self._all_classes:
            raise BadSampleError(f"label {label} is not in [0, {self._all_classes})")
        if self.classes is not None:
            label = int(np.searchsorted(self.classes, label))
        return IndexEntry(self.first_class + label, self.index.image_extensions or IMAGE_EXTENSIONS)

    def labels_of(self, numbers: Ints) -> Ints | None:
        """Labels in the mixture of samples by their numbers through the data set, int64.

        None: see `ShardIndex.labels_of`. A sample that has no entry has any label.
        """
        source = self.index if self.labels is None else self.labels
        labels = source.labels_of(numbers)
        if labels is not None and self.classes is not None:
            labels = np.searchsorted(self.classes, labels)
        return None if labels is None else labels + self.first_class

    def _label(self, shard: int, position: int) -> int:
        if self.labels is None:
            label = self.index.shards[shard].label(position)
            assert label is not None, "_require_labels has checked this"
            return label
        number = int(self.index.starts[shard]) + position
        ids = self.labels.lists(number, number + 1).class_ids
        if len(ids) != 1:
            raise BadSampleError(f"{self.labels.folder} gives it {len(ids)} classes")
        return int(ids[0])

    def _pools(self) -> Iterator[tuple[Ints, Ints]]:
        """Numbers of the images of the chosen classes, class by class, and how many each has.

        A few classes at a time, about `_POOL` images, so that all labels are read several times.
        """
        classes, counts = self._class_counts
        pools = (np.cumsum(counts) - counts) // _POOL
        for pool in np.unique(pools).tolist():
            here = pools == pool
            yield self._gather(classes[here], int(counts[here].sum())), counts[here]

    def _gather(self, classes: Ints, images: int) -> Ints:
        """Numbers of the images of some classes, which are sorted; class by class.

        Args:
            classes: they follow one another among those that have images.
            images: how many there are.
        """
        numbers, labels = np.empty(images, np.int64), np.empty(images, np.int64)
        start = 0
        for first, part in self._parts():
            # Between the first and the last one are labels of these classes, or of none chosen.
            found = np.flatnonzero((part >= classes[0]) & (part <= classes[-1]))
            if self.classes is not None:
                near = part[found]
                found = found[classes[np.searchsorted(classes, near)] == near]
            stop = start + len(found)
            numbers[start:stop], labels[start:stop] = found + first, part[found]
            start = stop
        assert start == images, "it is the number that was counted"
        return numbers[np.argsort(labels, kind="stable")]

    @cached_property
    def _class_counts(self) -> tuple[Ints, Ints]:
        """The chosen classes that have images, int64, sorted, and how many each has.

        A label out of range is a class here; its images are bad samples.
        """
        total, others = np.zeros(self._all_classes, np.int64), [np.empty(0, np.int64)]
        for _, labels in self._parts():
            inside = (labels >= 0) & (labels < len(total))
            np.add.at(total, labels[inside], 1)
            others.append(labels[~inside])
        outside, sizes = np.unique(np.concatenate(others), return_counts=True)
        if self.labels is not None:  # there, a label out of range stands for none
            outside, sizes = outside[:0], sizes[:0]
        classes = np.flatnonzero(total)
        below = outside < 0
        classes, counts = (
            np.concatenate([other[below], known, other[~below]]).astype(np.int64)
            for other, known in ((outside, classes), (sizes, total[classes]))
        )
        if self.classes is not None:
            chosen = np.isin(classes, self.classes)
            classes, counts = classes[chosen], counts[chosen]
        return classes, counts

    def _parts(self) -> Iterator[tuple[int, Ints]]:
        """The labels of all images, int64, part by part, each with the number of its first."""
        if self.labels is not None:
            for start in range(0, self.labels.samples, _PART):
                stop = min(start + _PART, self.labels.samples)
                yield start, self.labels.single_labels(start, stop)
            return
        for number, shard in enumerate(self.index.shards):
            labels = shard.labels
            assert labels is not None, "_require_labels has checked this"
            yield int(self.index.starts[number]), labels


@dataclass(frozen=True)
class DatasetPass:
    """One pass over a data set in every epoch.

    Attributes:
        source: the data set.
        fraction: of the images of a whole pass, in (0, 1].
        number: of the pass in its mixture; keys its draws, together with the seed.
        seed: of the run.
    """

    source: MixedDataset
    fraction: float
    number: int
    seed: int

    @property
    def samples(self) -> int:
        """How many images the pass has in every epoch."""
        return round(self.fraction * self.source.pass_samples)

    def draw(self, epoch: int) -> PassDraw:
        """Its images in an epoch, drawn when they are asked for.

        A draw reads all labels, some 0.3 s for a million images, unless the set is taken whole.
        """
        is_whole = self.source.is_whole and self.fraction == 1
        numbers = None if is_whole else partial(self._numbers, epoch)
        return PassDraw(self.source.index.starts, self.samples, numbers)

    def _numbers(self, epoch: int) -> Ints:
        numbers = self.source.draw(generator(self.seed, "view/classes", self.number, epoch))
        if len(numbers) > self.samples:
            rng = generator(self.seed, "view/share", self.number, epoch)
            numbers = numbers[draw_at_most([len(numbers)], self.samples, rng)]
        numbers.sort()
        return numbers


def draw_at_most(counts: Sequence[int] | Ints, limit: int, rng: np.random.Generator) -> Ints:
    """Draw at most `limit` members of each group, any as likely as any other.

    Args:
        counts: sizes of the groups, whose members follow one another.
        limit: most members of a group.
        rng: one number is drawn for each member.

    Returns:
        int64, numbers of the drawn members; group by group, and in no order within one.
    """
    counts = np.asarray(counts, np.int64)
    groups = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    noise = rng.bit_generator.random_raw(len(groups)) >> np.uint64(_HALF_WORD)
    shuffled = np.argsort(groups << np.uint64(_HALF_WORD) | noise, kind="stable")
    rank = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)
    return shuffled[rank < limit]
