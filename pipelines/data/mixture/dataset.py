"""A data set in a mixture: which of its images a pass over it has, and how they are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator
from pipelines.data.mixture.drawn import PassDraw
from pipelines.data.mixture.label_choice import choose_labels, distinct_labels
from pipelines.data.order import Ints
from pipelines.data.sample import BadSampleError
from pipelines.shards.image_format import IMAGE_EXTENSIONS
from pipelines.shards.index import IndexEntry, ShardIndex
from pipelines.shards.label_set import LabelLists, LabelSet

_HALF_WORD: Final = 32
_POOL = 1 << 23  # images of whole classes that are drawn from together, about, at the least
_MOST_POOLS: Final = 16  # so often all labels are read
_PART: Final = 1 << 20  # labels that are read together


@dataclass(frozen=True)
class MixedDataset:
    """A data set in a mixture.

    Attributes:
        index: of the data set.
        labels: its label set; None: the index has one class for each sample.
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
    def max_labels(self) -> int:
        """The largest number of classes that an image has."""
        return 1 if self.labels is None else max(1, self.labels.max_labels)

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
        if self.max_labels > 1:
            return sum(map(len, self._labelled()))
        if self.per_class:
            return int(np.minimum(self._count_classes()[1], self.per_class).sum())
        return self._count_chosen()

    def count_images(self) -> Ints:
        """Images of each of its classes in the mixture, int64 `[num_classes]`.

        An image with several labels counts once for each of them, those too that a pass leaves out
        by `per_class`.
        """
        if self.max_labels > 1:
            counts = np.zeros(self.num_classes, np.int64)
            for _, lists in self._lists():
                counts += np.bincount(distinct_labels(lists)[1], minlength=self.num_classes)
            return counts
        classes, counts = self._count_classes()
        inside = (classes >= 0) & (classes < self._all_classes)
        return np.bincount(
            self._positions(classes[inside]), counts[inside], self.num_classes
        ).astype(np.int64)

    def draw(self, rng: np.random.Generator) -> Ints:
        """The images of a pass: int64 numbers through the data set, in no order.

        In memory of the images that are drawn, and of a few million others.
        """
        if self.is_whole:
            return np.arange(self.index.samples)
        if self.max_labels > 1:
            return np.concatenate([np.empty(0, np.int64), *self._labelled()])
        drawn, end = np.empty(self.pass_samples, np.int64), 0
        for numbers, counts in self._pools():
            chosen = draw_at_most(counts, self.per_class, rng) if self.per_class else slice(None)
            found = numbers[chosen]
            drawn[end : end + len(found)] = found
            end += len(found)
        return drawn

    def entry(self, shard: int, position: int) -> IndexEntry:
        """Label and image of a sample, see `ShardIndex.entry`; of several labels the first one.

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
        return None if labels is None else self._renumbered(labels)

    def single_labels(self, numbers: Ints) -> Ints:
        """The same, also where the labels are in tables in memory."""
        labels = self.labels_of(numbers)
        return self._renumbered(self._labels_of_tables(numbers)) if labels is None else labels

    def drawn_labels(self, numbers: Ints, limit: int, keys: Ints, seed: int, epoch: int) -> Ints:
        """At most `limit` labels in the mixture of images of a label set, int64 `[n, limit]`.

        Args:
            numbers: of the images through the data set.
            limit, keys, seed, epoch: see `choose_labels`; `keys` are its `numbers`.
        """
        assert self.labels is not None, "an index has one label for each sample"
        table = choose_labels(self._chosen(self.labels.lists_of(numbers)), limit, keys, seed, epoch)
        return np.where(table < 0, table, table + self.first_class)

    def _renumbered(self, labels: Ints) -> Ints:
        """Labels in the mixture."""
        return self._positions(labels) + self.first_class

    def _positions(self, labels: Ints) -> Ints:
        """Positions of labels among the chosen classes."""
        return labels if self.classes is None else np.searchsorted(self.classes, labels)

    def _labels_of_tables(self, numbers: Ints) -> Ints:
        labels, starts = np.empty(len(numbers), np.int64), self.index.starts
        shards = np.searchsorted(starts, numbers, side="right") - 1
        for shard in np.unique(shards).tolist():
            here, table = shards == shard, self.index.shards[shard].labels
            assert table is not None, "_require_labels has checked this"
            labels[here] = table[numbers[here] - starts[shard]]
        return labels

    def _label(self, shard: int, position: int) -> int:
        if self.labels is None:
            label = self.index.shards[shard].label(position)
            assert label is not None, "_require_labels has checked this"
            return label
        number = int(self.index.starts[shard]) + position
        ids = self.labels.lists(number, number + 1).class_ids
        if self.max_labels > 1:
            ids = ids[self._is_chosen(ids)]
        if not len(ids):
            raise BadSampleError(f"{self.labels.folder} gives it 0 classes")
        return int(ids[0])

    def _chosen(self, lists: LabelLists) -> LabelLists:
        """Without labels of classes that were not chosen; the others in their new numbers."""
        if self.classes is None:
            return lists
        kept = self._is_chosen(lists.class_ids)
        before = np.append(0, np.cumsum(kept))
        return LabelLists(before[lists.ends], self._positions(lists.class_ids[kept]))

    def _is_chosen(self, class_ids: Ints) -> npt.NDArray[np.bool_]:
        """Which of some classes are chosen; for a few, `np.isin` would read all that are."""
        if self.classes is None or not len(self.classes):
            return np.full(len(class_ids), self.classes is None)
        near = np.searchsorted(self.classes, class_ids)
        return self.classes[np.minimum(near, len(self.classes) - 1)] == class_ids

    def _labelled(self) -> Iterator[Ints]:
        """Numbers of the images in any of the chosen classes, sorted, part by part."""
        for start, lists in self._lists():
            yield np.flatnonzero(lists.counts) + start

    def _lists(self) -> Iterator[tuple[int, LabelLists]]:
        """The chosen labels of all images, part by part, each with the number of its first."""
        assert self.labels is not None, "an index has one label for each sample"
        for start in range(0, self.labels.samples, _PART):
            stop = min(start + _PART, self.labels.samples)
            yield start, self._chosen(self.labels.lists(start, stop))

    def _pools(self) -> Iterator[tuple[Ints, Ints]]:
        """Numbers of the images of the chosen classes, class by class, and how many each has.

        A few classes at a time, about `_POOL` images or a sixteenth of all, so that all labels are
        read several times.
        """
        classes, counts = self._count_classes()
        ends = np.cumsum(counts)
        images = int(ends[-1]) if len(ends) else 0
        size = max(_POOL, -(-images // _MOST_POOLS))
        # A class belongs to the pool in which its first image is.
        cuts = np.searchsorted(ends - counts, np.arange(0, images + size, size))
        del ends
        for start, stop in itertools.pairwise(cuts.tolist()):
            if stop > start:
                here = counts[start:stop]
                yield self._gather(classes[start:stop], int(here.sum())), here

    def _gather(self, classes: Ints, images: int) -> Ints:
        """Numbers of the images of some classes, which are sorted; class by class.

        Args:
            classes: they follow one another among those that have images.
            images: how many there are.
        """
        numbers, labels = np.empty(images, np.int64), np.empty(images, np.int64)
        start, lowest, highest = 0, int(classes[0]), int(classes[-1])
        for first, part in self._parts():
            # Between the first and the last one are labels of these classes, or of none chosen.
            found = np.flatnonzero((part >= lowest) & (part <= highest))
            if self.classes is not None:
                near = part[found]
                found = found[classes[np.searchsorted(classes, near)] == near]
            stop = start + len(found)
            numbers[start:stop], labels[start:stop] = found + first, part[found]
            start = stop
        assert start == images, "it is the number that was counted"
        bits = self.index.samples.bit_length()
        if (int(classes[-1]) - int(classes[0])) >> (63 - bits):  # tars may give any number
            labels = np.searchsorted(classes, labels)
        else:
            labels -= classes[0]
        labels <<= bits
        labels |= numbers  # one word each, which sorts a good deal quicker than its place in a list
        labels.sort()
        labels &= (1 << bits) - 1
        return labels

    def _count_chosen(self) -> int:
        """Images of the chosen classes, in memory of a byte for each class."""
        is_chosen = np.zeros(self._all_classes, bool)
        is_chosen[slice(None) if self.classes is None else self.classes] = True
        count = 0
        for _, labels in self._parts():
            inside = labels[(labels >= 0) & (labels < len(is_chosen))]
            count += np.count_nonzero(is_chosen[inside])
        return count

    def _count_classes(self) -> tuple[Ints, Ints]:
        """The chosen classes that have images, int64, sorted, and how many each has.

        A label out of range is a class here; its images are bad samples. Nobody keeps them: every
        rank has the data set, and there may be as many classes as a process has room for.
        """
        total, others = np.zeros(self._all_classes, np.int64), [np.empty(0, np.int64)]
        for _, labels in self._parts():
            inside = (labels >= 0) & (labels < len(total))
            np.add.at(total, labels[inside], 1)
            if self.labels is None:  # in a label set, a label out of range stands for none
                others.append(labels[~inside].astype(np.int64))
        outside, sizes = np.unique(np.concatenate(others), return_counts=True)
        classes = np.flatnonzero(total)
        below = outside < 0
        classes, counts = (
            np.concatenate([other[below], known, other[~below]]).astype(np.int64)
            for other, known in ((outside, classes), (sizes, total[classes]))
        )
        if self.classes is not None:
            chosen = self._is_chosen(classes)
            classes, counts = classes[chosen], counts[chosen]
        return classes, counts

    def _parts(self) -> Iterator[tuple[int, npt.NDArray[np.integer]]]:
        """The labels of all images as stored, part by part, each with the number of its first."""
        if self.labels is not None:
            for start in range(0, self.labels.samples, _PART):
                stop = min(start + _PART, self.labels.samples)
                yield start, self.labels.single_labels(start, stop)
            return
        column = self.index.label_column
        if column is not None:
            for start in range(0, len(column), _PART):
                yield start, column[start : start + _PART]
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
        int64, numbers of the drawn members, ascending.
    """
    counts = np.asarray(counts, np.int64)
    kept = np.minimum(counts, limit)
    if not kept.any():
        return np.empty(0, np.int64)
    ends = np.cumsum(counts)
    keys = np.repeat(np.arange(len(counts), dtype=np.uint64) << np.uint64(_HALF_WORD), counts)
    keys |= rng.bit_generator.random_raw(len(keys)) >> np.uint64(_HALF_WORD)
    largest = np.sort(keys)[
        ends - counts + kept - 1
    ]  # of what is kept; sorting keys alone is quick
    drawn = np.flatnonzero(keys <= np.repeat(largest, counts))
    if len(drawn) == kept.sum():
        return drawn
    # The largest one stands twice in a group: the earlier member is kept.
    shuffled = np.argsort(keys, kind="stable")
    rank = np.arange(len(keys)) - np.repeat(ends - counts, counts)
    return np.sort(shuffled[rank < limit])
