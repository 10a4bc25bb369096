"""What a run trains on: several data sets as one, some of their classes, some images of a class.

A *mixture* is an index that lists the shards of all its data sets, those of a data set once for
each *pass* that an epoch makes over it. The samples of a pass are drawn anew for each epoch: the
images of the chosen classes, at most so many of each class, and finally a fraction of them. Their
number never changes, so the order (`order.py`) stays arithmetic, and so does a resume.

The data sets have disjoint classes: the classes of a data set follow those of the data set before
it. With a list of classes, they are the listed ones in the order of their ids. A label set holds
each sample's label, or else the index does; a sample without one is in no epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Final

import numpy as np

from mhe_dist.config.data import DataConfig, MixConfig
from mhe_dist.errors import UserError
from mhe_dist.seeds import generator
from pipelines.data.class_list import read_classes
from pipelines.data.drawn import DrawnSamples, PassDraw, draw_samples
from pipelines.data.order import Ints
from pipelines.data.sample import BadSampleError
from pipelines.shards.columns import default_cache_dir
from pipelines.shards.image_format import IMAGE_EXTENSIONS
from pipelines.shards.index import UNLABELLED, IndexEntry, ShardIndex
from pipelines.shards.label_set import LabelSet
from pipelines.shards.shard import Shard
from pipelines.shards.shard_list import LazyShards

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


@dataclass(frozen=True)
class Mixture(ShardIndex):
    """A data set made of passes over data sets; `num_classes` counts those of the mixture.

    Attributes:
        passes: their shards follow one another in `shards`.
        draws_dir: folder of this node for the draws of epochs.
    """

    passes: tuple[DatasetPass, ...] = ()
    draws_dir: str = field(default="", kw_only=True, compare=False)

    @cached_property
    def epoch_samples(self) -> int:
        """How many samples every epoch has."""
        return sum(part.samples for part in self.passes)

    def draw(self, epoch: int) -> DrawnSamples:
        """The samples of an epoch, drawn once per node.

        Raises:
            UserError: the node has no room for them.
        """
        content = [self.digest, self.passes[0].seed, epoch]
        return draw_samples([part.draw(epoch) for part in self.passes], content, self.draws_dir)

    def entry(self, shard: int, position: int) -> IndexEntry:
        """See `ShardIndex.entry`; here our own shards have an entry as well."""
        number = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        source = self.passes[number].source
        return source.entry(shard - int(self._first_shards[number]), position)

    def labels_of(self, numbers: Ints) -> Ints | None:
        """See `ShardIndex.labels_of`."""
        firsts = self.starts[self._first_shards]
        owners = np.searchsorted(firsts, numbers, side="right") - 1
        labels = np.empty(len(numbers), np.int64)
        for owner in np.unique(owners).tolist():
            here = owners == owner
            found = self.passes[owner].source.labels_of(numbers[here] - firsts[owner])
            if found is None:
                return None
            labels[here] = found
        return labels

    @cached_property
    def digest(self) -> str:
        """`sha256:` of all that decides what is in an epoch, except the seed."""
        content = []
        for part in self.passes:
            source = part.source
            classes = None if source.classes is None else source.classes.tolist()
            labels = [] if source.labels is None else [source.labels.digest]
            content.append([source.index.digest, source.per_class, classes, part.fraction, *labels])
        return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def _first_shards(self) -> Ints:
        return np.cumsum([0, *(len(p.source.index.shards) for p in self.passes)], dtype=np.int64)[
            :-1
        ]


def open_training_index(data: DataConfig, seed: int) -> ShardIndex:
    """The index of what a run trains on: that of `data.shards`, or a mixture.

    Raises:
        UserError: a set or a list cannot be read, they do not fit, or no image is left.
    """
    if not needs_mixture(data):
        return _refuse_unlabelled(_open_index(data.shards, data))
    passes: list[DatasetPass] = []
    first_class = 0
    given = MixConfig(shards=data.shards, labels=data.labels, classes=data.classes)
    for key, item in [("data", given), *((f"data.mix.{n}", i) for n, i in enumerate(data.mix))]:
        index = _open_index(item.shards, data)
        labels = _open_labels(f"{key}.labels", item.labels, index, data) if item.labels else None
        classes = read_classes(item.classes, labels or index) if item.classes else None
        if labels is None:
            _require_labels(_refuse_unlabelled(index))
        source = MixedDataset(index, labels, first_class, classes, data.images_per_class, key)
        fractions = [min(1.0, item.weight - whole) for whole in range(math.ceil(item.weight))]
        made = [
            DatasetPass(source, fraction, len(passes) + n, seed)
            for n, fraction in enumerate(fractions)
        ]
        if not any(part.samples for part in made):
            raise UserError(
                f"{item.shards}: no image of it would be in an epoch, with weight="
                f"{item.weight:g}, labels={item.labels!r} and classes={item.classes!r}; take the "
                "set out of data.mix, or choose more of it"
            )
        passes += made
        first_class += source.num_classes
    shards = _PassShards([part.source.index for part in passes])
    draws_dir = f"{data.remote.cache_dir}/draws" if data.remote.cache_dir else ""
    return Mixture(
        *(data.shards, first_class, shards, {}, tuple(passes)),
        draws_dir=draws_dir or default_cache_dir("draws"),
    )


class _PassShards(LazyShards):
    """The shards of several indexes, one after the other, with their whole URLs."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._indexes = indexes
        self._samples = np.concatenate([index.sizes for index in indexes])
        self._firsts = np.cumsum([0, *(len(index.shards) for index in indexes)])
        if any(index.is_packed for index in indexes):
            self.kept = len(self._samples)  # those have tables that take time to unpack

    @property
    def samples(self) -> Ints:
        """See `LazyShards.samples`."""
        return self._samples

    def make(self, number: int) -> Shard:
        """See `LazyShards.make`."""
        owner = int(np.searchsorted(self._firsts, number, side="right")) - 1
        index, position = self._indexes[owner], number - int(self._firsts[owner])
        return replace(index.shards[position], url=index.url(position))


def label_digests(index: ShardIndex) -> dict[str, str]:
    """The digest of each label set that a run trains on, by the key of the config that names it."""
    passes = index.passes if isinstance(index, Mixture) else ()
    return {
        f"{part.source.key}.labels": part.source.labels.digest
        for part in passes
        if part.source.labels is not None
    }


def _open_index(url: str, data: DataConfig) -> ShardIndex:
    """The index of a data set, its columns open: damaged ones end a run at its start."""
    index = ShardIndex.load(url, _column_cache(data))
    index.map_columns()
    return index


def _refuse_unlabelled(index: ShardIndex) -> ShardIndex:
    if index.meta.get(UNLABELLED):
        raise UserError(
            f"{index.folder}: its images are in no class (mhe data folder --no-classes); it can be "
            "embedded and clustered, not trained on, unless a label set gives it classes "
            "(data.labels)"
        )
    return index


def _column_cache(data: DataConfig) -> str:
    """Where columns of a store lie on this node: below the cache of whole shards, if there is one.

    Empty: in `default_cache_dir`.
    """
    return f"{data.remote.cache_dir}/columns" if data.remote.cache_dir else ""


def _open_labels(key: str, url: str, index: ShardIndex, data: DataConfig) -> LabelSet:
    """A label set of a data set, its columns open.

    Raises:
        UserError: it is not one of this data set, or gives a sample several classes.
    """
    labels = LabelSet.load(url, _column_cache(data))
    labels.require_index(index)
    labels.map_columns()
    if labels.max_labels > 1:
        raise UserError(
            f"{key}={url}: it gives a sample up to {labels.max_labels} classes, and a head learns "
            "one class per image; give a label set with at most one (`mhe data labels show` "
            "counts them)"
        )
    return labels


def _require_labels(index: ShardIndex) -> None:
    # Those of an index with columns have all of them the same ones.
    shards = index.shards if index.is_packed else index.shards[:1]
    for number, shard in enumerate(shards):
        if not shard.has_labels:
            raise UserError(
                f"{index.url(number)}: the index does not hold its labels, which data.classes, "
                "data.images_per_class and data.mix need; `mhe data index` makes one that does"
            )


def needs_mixture(data: DataConfig) -> bool:
    """Whether a run trains on anything else than all of `data.shards`."""
    return bool(data.mix or data.labels or data.classes or data.images_per_class)


def samples_per_epoch(index: ShardIndex) -> int:
    """How many samples an epoch has."""
    return index.epoch_samples if isinstance(index, Mixture) else index.samples


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
