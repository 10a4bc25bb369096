"""Label sets: for each sample of a data set none, one or several classes, beside its tars.

A label set is a folder (any fsspec URL) with `labels.json`, two columns (`columns.py`) that hold a
list of class ids for each sample, and `classes.tsv`, the classes' names and sizes. A third column
may say how similar a sample is to each of its classes. It belongs to one data set, whose digest it
records. `labels.json` is written last: a folder without one is no
label set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from mhe_dist.redact import masked
from pipelines.shards.columns import Column, ColumnEntry, smallest_dtype, write_column
from pipelines.shards.index import ShardIndex
from pipelines.shards.manifest import read_manifest
from pipelines.shards.tables import CLASSES_FILE, Table, write_table
from pipelines.storage.staging import Staging
from pipelines.storage.urls import atomic_write, is_local_url, url_exists

Ints = npt.NDArray[np.int64]

LABELS_FILE: Final = "labels.json"
FORMAT: Final = "mhe-labels-1"
ENDS: Final = "ends"
CLASS_IDS: Final = "class_ids"
SIMILARITIES: Final = "similarities"
NO_LABEL: Final = -1  # where a single label stands for a sample that has none
_OWNER: Final = "label set"


class LabelLists(NamedTuple):
    """The class ids of consecutive samples.

    Attributes:
        ends: int64 `[n]`, where each sample's list ends in `class_ids`.
        class_ids: int64 `[ends[-1]]`, list after list; the order in a list is the maker's.
    """

    ends: Ints
    class_ids: Ints

    @property
    def counts(self) -> Ints:
        """int64 `[n]`: how many classes each sample has."""
        return np.diff(self.ends, prepend=0)

    def of(self, position: int) -> Ints:
        """The class ids of one of the samples."""
        start = int(self.ends[position - 1]) if position else 0
        return self.class_ids[start : int(self.ends[position])]


@dataclass(frozen=True)
class LabelSet:
    """The labels of one data set; samples are numbered as in its index.

    Attributes:
        folder: URL of the folder that holds `labels.json`.
        num_classes: C; every class id is in `[0, C)`.
        index_digest: of the data set that it belongs to (`ShardIndex.digest`).
        labelled: how many samples have a class; the others are left out of a training.
        max_labels: the largest number of classes that a sample has.
        ends: column `[samples]`: where each sample's list ends in `class_ids`.
        class_ids: column of all lists, one after the other.
        meta: what it was made from, and how.
        similarities: column beside `class_ids`, as `similarities.py` writes cosines; None: the
            maker had none.
    """

    folder: str
    num_classes: int
    index_digest: str
    labelled: int
    max_labels: int
    ends: Column
    class_ids: Column
    meta: dict[str, Any] = field(default_factory=dict)
    similarities: Column | None = None

    @property
    def samples(self) -> int:
        """N: samples of the data set, with and without a class."""
        return self.ends.entry.length

    @cached_property
    def digest(self) -> str:
        """`sha256:` of its data set, its class count and its lists; not of names or `folder`."""
        columns = [self.ends.entry.checksum, self.class_ids.entry.checksum]
        content = json.dumps([self.index_digest, self.num_classes, *columns])
        return "sha256:" + hashlib.sha256(content.encode()).hexdigest()

    @property
    def columns(self) -> list[Column]:
        """Its columns."""
        found = [self.ends, self.class_ids]
        return found if self.similarities is None else [*found, self.similarities]

    def map_columns(self) -> None:
        """Open the columns now; those of a store are fetched first.

        Raises:
            UserError, RunError: see `Column.values`.
        """
        for column in self.columns:
            column.values  # noqa: B018, it is opened by this

    def lists(self, start: int, stop: int) -> LabelLists:
        """The class ids of the samples `[start, stop)`.

        Raises:
            UserError: the columns are damaged there.
        """
        first = int(self.ends.values[start - 1]) if start else 0
        ends = self.ends.values[start:stop].astype(np.int64)
        last = int(ends[-1]) if len(ends) else first
        if last > self.class_ids.entry.length or (np.diff(ends, prepend=first) < 0).any():
            raise self.ends.damaged("a list ends before it begins, or behind the last one")
        return LabelLists(ends - first, self.class_ids.values[first:last].astype(np.int64))

    def single_labels(self, start: int, stop: int) -> Ints:
        """int64 `[stop - start]`: the only class of each of these samples; `NO_LABEL`: it has none.

        Raises:
            ValueError: a sample has several.
        """
        lists = self.lists(start, stop)
        counts = lists.counts
        if counts.max(initial=0) > 1:
            sample = start + int(np.argmax(counts > 1))
            raise ValueError(f"{self.folder}: sample {sample} has {int(counts.max())} classes")
        labels = np.full(stop - start, NO_LABEL, np.int64)
        labels[counts > 0] = lists.class_ids
        return labels

    def lists_of(self, numbers: Ints) -> LabelLists:
        """The class ids of samples by their numbers, in that order.

        Raises:
            UserError: the columns are damaged there.
        """
        ends = self.ends.values
        begins = np.where(numbers > 0, ends[np.maximum(numbers, 1) - 1], 0).astype(np.int64)
        counts = ends[numbers].astype(np.int64) - begins
        if (counts < 0).any() or (begins + counts > self.class_ids.entry.length).any():
            raise self.ends.damaged("a list ends before it begins, or behind the last one")
        stops = np.cumsum(counts)
        positions = np.repeat(begins - (stops - counts), counts) + np.arange(counts.sum())
        return LabelLists(stops, self.class_ids.values[positions].astype(np.int64))

    def labels_of(self, numbers: Ints) -> Ints:
        """int64 `[n]`: the only class of each of these samples; `NO_LABEL`: none, or several."""
        ends = self.ends.values
        begins = np.where(numbers > 0, ends[np.maximum(numbers, 1) - 1], 0).astype(np.int64)
        counts = ends[numbers].astype(np.int64) - begins
        labels = np.full(len(numbers), NO_LABEL, np.int64)
        labels[counts == 1] = self.class_ids.values[begins[counts == 1]]
        return labels

    def require_index(self, index: ShardIndex) -> None:
        """Refuse another data set than the one that these labels were made for.

        Raises:
            UserError: names both digests.
        """
        if index.digest != self.index_digest:
            raise UserError(
                f"{self.folder}: these labels were made for the data set with digest "
                f"{self.index_digest} ({self.meta.get('index', 'its place is not recorded')}), but "
                f"{index.folder} has {index.digest}; give that data set, or make labels for this "
                "one with `mhe data labels from-table`"
            )
        if index.samples != self.samples:
            raise self.ends.damaged(f"{self.samples} lists for {index.samples} samples")

    @classmethod
    def load(cls, url: str, cache_dir: str = "") -> LabelSet:
        """Read the label set of a folder (or its `labels.json`, if `url` names it).

        Local columns are mapped now. Those of a store are fetched when they are used first.

        Args:
            url: of the folder.
            cache_dir: folder of this node for columns of a store; empty: `default_cache_dir`.

        Raises:
            UserError: there is none, or it is not a label set, or a column is missing or damaged.
        """
        folder = url.removesuffix(LABELS_FILE).rstrip("/")
        content = read_manifest(
            folder,
            LABELS_FILE,
            (FORMAT,),
            missing=lambda: (
                f"no label set here ({LABELS_FILE} is missing); `mhe data labels from-table` "
                "makes one"
            ),
            foreign=f"not a label set of format {FORMAT}",
            again="make the label set again",
        )
        try:
            found = cls._parse(folder, content, cache_dir)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(
                f"{folder}/{LABELS_FILE}: damaged ({error!r}); make the label set again"
            ) from None
        if is_local_url(folder):
            found.map_columns()
        return found

    @classmethod
    def _parse(cls, folder: str, content: dict[str, Any], cache_dir: str) -> LabelSet:
        columns = {
            name: Column(folder, ColumnEntry(**content["columns"][name]), cache_dir, _OWNER)
            for name in (ENDS, CLASS_IDS, SIMILARITIES)
            if name in (ENDS, CLASS_IDS) or name in content["columns"]
        }
        ends, class_ids = columns[ENDS], columns[CLASS_IDS]
        similarities = columns.get(SIMILARITIES)
        if similarities is not None and similarities.entry.length != class_ids.entry.length:
            raise ValueError(f"{similarities.entry.length} similarities")
        num_classes, labelled, max_labels = counts = [
            int(content[name]) for name in ("num_classes", "labelled", "max_labels")
        ]
        if (
            min(counts) < 0
            or labelled > ends.entry.length
            or not isinstance(content["index_digest"], str)
        ):
            raise ValueError(f"no counts of a label set: {counts}")
        digest, meta = content["index_digest"], dict(content["meta"])
        sizes = num_classes, digest, labelled, max_labels
        return cls(folder, *sizes, ends, class_ids, meta, similarities)


def label_set_exists(url: str) -> bool:
    """Whether a folder holds a label set; raises as `url_exists`."""
    return url_exists(f"{url.removesuffix(LABELS_FILE).rstrip('/')}/{LABELS_FILE}")


class _Totals(NamedTuple):
    """What is in lists together; `per_class` is int64 `[C]`, the samples of each class."""

    samples: int
    labelled: int
    max_labels: int
    items: int
    per_class: Ints


Similarities = Callable[[], Iterable[npt.NDArray[np.uint16]]]
"""Called once: for the items of all lists, part by part, cosines as `similarities.py` has them."""


def write_label_set(
    target: str,
    index: ShardIndex,
    num_classes: int,
    chunks: Callable[[], Iterable[LabelLists]],
    names: Iterable[str] | None = None,
    meta: dict[str, Any] | None = None,
    tables: Mapping[str, Table] | None = None,
) -> LabelSet:
    """Write a label set; it appears under its name whole, or not at all.

    Args:
        target: path or URL of its folder, which must not exist.
        index, num_classes, chunks, names, meta, tables: see `write_label_files`.

    Raises:
        UserError: there is something at `target` already.
        ValueError: see `write_label_files`.
    """
    staging = Staging(target)
    try:
        write_label_files(staging.folder, index, num_classes, chunks, names, meta, tables)
        staging.publish()
    except BaseException:
        staging.abort()
        raise
    return LabelSet.load(target)


def write_label_files(
    folder: str,
    index: ShardIndex,
    num_classes: int,
    chunks: Callable[[], Iterable[LabelLists]],
    names: Iterable[str] | None = None,
    meta: dict[str, Any] | None = None,
    tables: Mapping[str, Table] | None = None,
    similarities: Similarities | None = None,
) -> None:
    """Write the files of a label set into a folder that its maker gives its name later.

    Args:
        folder: path or URL.
        index: the data set.
        num_classes: C.
        chunks: called three times; each time the lists of all samples, in order, part by part.
        names: of the C classes, in order; None: their numbers.
        meta: JSON-able, what it was made from; secrets in it, as of URLs, are not written.
        tables: further files beside it, by name.
        similarities: of the samples to their classes; None: not known.

    Raises:
        ValueError: the lists are not those of so many samples, or a class id is not in `[0, C)`.
    """
    totals = _count(chunks(), num_classes)
    if totals.samples != index.samples:
        raise ValueError(f"{folder}: {totals.samples} lists for {index.samples} samples")
    columns = _write_columns(folder, chunks, totals, num_classes)
    if similarities is not None:
        url = f"{folder}/{SIMILARITIES}.npy"
        columns[SIMILARITIES] = write_column(url, "uint16", totals.items, similarities())
    rows = (
        (str(number), str(count), name)
        for number, (count, name) in enumerate(
            zip(totals.per_class.tolist(), names or map(str, range(num_classes)), strict=True)
        )
    )
    classes: Table = (["class", "samples", "name"], rows)
    for name, table in {CLASSES_FILE: classes, **(tables or {})}.items():
        write_table(f"{folder}/{name}", table)
    about = {
        "format": FORMAT,
        "num_classes": num_classes,
        "samples": totals.samples,
        "labelled": totals.labelled,
        "max_labels": totals.max_labels,
        "index_digest": index.digest,
        "meta": masked({"index": index.folder} | (meta or {})),
        "columns": {name: asdict(entry) for name, entry in columns.items()},
    }
    text = json.dumps(about, indent=1, ensure_ascii=False)
    with atomic_write(f"{folder}/{LABELS_FILE}") as stream:
        stream.write(text.encode(errors="backslashreplace") + b"\n")


def _count(chunks: Iterable[LabelLists], num_classes: int) -> _Totals:
    samples = labelled = max_labels = items = 0
    per_class = np.zeros(num_classes, np.int64)
    for lists in chunks:
        ids, counts = lists.class_ids, lists.counts
        if len(ids) and (ids.min() < 0 or ids.max() >= num_classes):
            raise ValueError(f"a class id is not in [0, {num_classes})")
        samples, items = samples + len(counts), items + len(ids)
        labelled += int((counts > 0).sum())
        max_labels = max(max_labels, int(counts.max(initial=0)))
        distinct, sizes = np.unique(ids, return_counts=True)
        per_class[distinct] += sizes
    return _Totals(samples, labelled, max_labels, items, per_class)


def _write_columns(
    folder: str, chunks: Callable[[], Iterable[LabelLists]], totals: _Totals, num_classes: int
) -> dict[str, ColumnEntry]:
    dtypes = smallest_dtype(0, totals.items), smallest_dtype(0, max(0, num_classes - 1))
    return {
        ENDS: write_column(f"{folder}/{ENDS}.npy", dtypes[0], totals.samples, _ends(chunks())),
        CLASS_IDS: write_column(
            f"{folder}/{CLASS_IDS}.npy",
            dtypes[1],
            totals.items,
            (lists.class_ids for lists in chunks()),
        ),
    }


def _ends(chunks: Iterable[LabelLists]) -> Iterator[Ints]:
    first = 0
    for lists in chunks:
        yield lists.ends + first
        first += len(lists.class_ids)
