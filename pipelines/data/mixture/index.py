"""The index of a mixture: several data sets as one, and what opens it for a run.

A *mixture* is an index that lists the shards of all its data sets, those of a data set once for
each *pass* that an epoch makes over it. The samples of a pass are drawn anew for each epoch: the
images of the chosen classes, at most so many of each class, and finally a fraction of them. Their
number never changes, so the order (`data/order.py`) stays arithmetic, and so does a resume.

The data sets have disjoint classes: the classes of a data set follow those of the data set before
it. With a list of classes, they are the listed ones in the order of their ids. A label set holds
each sample's label, or else the index does; a sample without one is in no epoch. A label set may
give a sample several; an epoch then shows at most K of them, drawn anew for each epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import abspath
from typing import Final

import numpy as np

from mhe_dist.config.data import DataConfig, MixConfig
from mhe_dist.errors import UserError
from pipelines.data.mixture.class_list import read_classes
from pipelines.data.mixture.dataset import DatasetPass, MixedDataset
from pipelines.data.mixture.drawn import DrawnSamples, draw_samples
from pipelines.data.order import Ints
from pipelines.shards.columns import default_cache_dir
from pipelines.shards.index import UNLABELLED, IndexEntry, ShardIndex
from pipelines.shards.label_set import NO_LABEL, LabelSet
from pipelines.shards.shard import Shard
from pipelines.shards.shard_list import LazyShards
from pipelines.storage.urls import is_absolute_url

_JSON_PART: Final = 1 << 12  # numbers


@dataclass(frozen=True)
class Mixture(ShardIndex):
    """A data set made of passes over data sets; `num_classes` counts those of the mixture.

    Attributes:
        passes: their shards follow one another in `shards`.
        labels_per_sample: K, most labels of a sample in an epoch.
        draws_dir: folder of this node for the draws of epochs.
    """

    passes: tuple[DatasetPass, ...] = ()
    labels_per_sample: int = field(default=1, kw_only=True)
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

    @property
    def is_local(self) -> bool:
        """See `ShardIndex.is_local`."""
        return all(part.source.index.is_local for part in self.passes)

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

    @property
    def has_label_columns(self) -> bool:
        """See `ShardIndex.has_label_columns`."""
        sources = [part.source for part in self.passes]
        return all(each.labels is not None or each.index.has_label_columns for each in sources)

    @property
    def label_shape(self) -> tuple[int, ...]:
        """See `ShardIndex.label_shape`."""
        return () if self.labels_per_sample == 1 else (self.labels_per_sample,)

    @cached_property
    def draws_labels(self) -> bool:
        """See `ShardIndex.draws_labels`."""
        return any(part.source.max_labels > 1 for part in self.passes)

    def labels_in_epoch(self, numbers: Ints, epoch: int) -> Ints | None:
        """See `ShardIndex.labels_in_epoch`; not None if labels are drawn."""
        if not self.draws_labels:
            return self.labels_of(numbers)
        firsts = self.starts[self._first_shards]
        owners = np.searchsorted(firsts, numbers, side="right") - 1
        table = np.full((len(numbers), self.labels_per_sample), NO_LABEL, np.int64)
        for owner in np.unique(owners).tolist():
            here = np.flatnonzero(owners == owner)
            part, inside = self.passes[owner], numbers[here] - firsts[owner]
            if part.source.max_labels > 1:
                table[here] = part.source.drawn_labels(
                    inside, self.labels_per_sample, numbers[here], part.seed, epoch
                )
            else:
                table[here, 0] = part.source.single_labels(inside)
        return table.reshape(len(numbers), *self.label_shape)

    def count_images(self) -> Ints:
        """Images of each class, int64 `[C]`; those of a data set count once, whatever it weighs."""
        sources = {part.source.first_class: part.source for part in self.passes}
        return np.concatenate([source.count_images() for source in sources.values()])

    @cached_property
    def digest(self) -> str:
        """`sha256:` of all that decides what is in an epoch, except the seed."""
        found = hashlib.sha256()
        for number, part in enumerate(self.passes):
            source = part.source
            labels = [] if source.labels is None else [source.labels.digest]
            before = json.dumps([source.index.digest, source.per_class])[:-1]
            after = json.dumps([part.fraction, *labels])[1:]
            found.update(f"{', ' if number else '['}{before}, ".encode())
            for text in ["null"] if source.classes is None else _json_parts(source.classes):
                found.update(text.encode())
            found.update(f", {after}".encode())
        found.update(b"]")
        return "sha256:" + found.hexdigest()

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
    largest = max(part.source.max_labels for part in passes)
    draws_dir = f"{data.remote.cache_dir}/draws" if data.remote.cache_dir else ""
    return Mixture(
        *(data.shards, first_class, shards, {}, tuple(passes)),
        labels_per_sample=min(largest, max(1, data.labels_per_sample)),
        draws_dir=draws_dir or default_cache_dir("draws"),
    )


def _json_parts(numbers: Ints) -> Iterator[str]:
    """A list of numbers as `json.dumps` writes it, part by part: there may be 10^8 classes."""
    yield "["
    for start in range(0, len(numbers), _JSON_PART):
        text = json.dumps(numbers[start : start + _JSON_PART].tolist())
        yield f"{', ' if start else ''}{text[1:-1]}"
    yield "]"


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
        url = index.url(position)
        # A relative one would be taken for one in the folder of the first data set.
        return replace(index.shards[position], url=url if is_absolute_url(url) else abspath(url))


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
        UserError: it is not one of this data set, or gives a sample several classes where the run
            takes one.
    """
    labels = LabelSet.load(url, _column_cache(data))
    labels.require_index(index)
    labels.map_columns()
    largest = labels.max_labels
    if largest > 1 and not data.labels_per_sample:
        raise UserError(
            f"{key}={url}: it gives a sample up to {largest} classes; set "
            f"data.labels_per_sample={largest} to train on all of them (1: on one, drawn anew in "
            "each epoch), or give a label set with at most one (`mhe data labels show` counts them)"
        )
    if largest > 1 and data.images_per_class:
        raise UserError(
            f"data.images_per_class={data.images_per_class} counts the images of each class, but "
            f"{key}={url} gives an image up to {largest} classes; leave data.images_per_class out"
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
