"""A label set from a table that gives other classes to classes, in place of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.errors import UserError
from pipelines.data.mixture.class_list import names_of
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import Ints, LabelLists, LabelSet, write_label_set
from pipelines.shards.tables import CLASSES_FILE, decode_cell
from pipelines.sources.label_table.rows import TableLayout, read_rows

_WRITTEN_TOGETHER: Final = 1 << 20  # samples


class ClassImport(NamedTuple):
    """A label set that was made, and what found no place in it.

    Attributes:
        labels: the label set.
        unknown: rows that name no class of the data set.
        missing: classes of the data set that no row names.
        dropped: classes of the table that the label set `like` does not have.
    """

    labels: LabelSet
    unknown: int
    missing: int
    dropped: int


def import_class_labels(
    tables: Sequence[str], index: ShardIndex, target: str, layout: TableLayout, like: str = ""
) -> ClassImport:
    """Give each sample the classes that a table gives to its class.

    Memory: the table, and what is known of each class of the data set.

    Args:
        tables: CSV, TSV or Parquet files; `layout.key` holds names of classes, as in the data set's
            `classes.tsv`.
        index: the data set.
        target: folder or URL of the label set; it must not exist.
        layout: the columns.
        like: a label set whose class ids and names are taken; empty: the table's, in their order.

    Raises:
        UserError: a file cannot be read, the data set's classes have no names, or no row names one.
    """
    names = names_of(index.folder, range(index.num_classes))
    if not names:
        raise UserError(
            f"{index.folder}: its classes have no names ({CLASSES_FILE} is missing); give the "
            "samples classes by their keys: mhe data labels from-table"
        )
    given, unknown = _read_table(tables, layout, {name: n for n, name in names.items()})
    if not given:
        raise UserError(f"{', '.join(tables)}: no row names a class of {index.folder}")
    texts = (
        _names_like(like) if like else sorted({text for each in given.values() for text in each})
    )
    ids = {text: number for number, text in enumerate(texts)}
    lists = [
        sorted({ids[text] for text in given.get(number, ()) if text in ids})
        for number in range(index.num_classes)
    ]
    by_class = LabelLists(
        np.cumsum([len(each) for each in lists], dtype=np.int64),
        np.array([number for each in lists for number in each], np.int64),
    )
    made = write_label_set(
        target,
        index,
        len(texts),
        lambda: _lists_of_samples(index, by_class),
        texts,
        {"tables": list(tables), **({"like": like} if like else {})},
    )
    dropped = {text for each in given.values() for text in each} - ids.keys()
    return ClassImport(made, unknown, len(names) - len(given), len(dropped))


def _read_table(
    tables: Sequence[str], layout: TableLayout, numbers: dict[str, int]
) -> tuple[dict[int, list[str]], int]:
    """The texts that the rows give to each class, and how many rows name none."""
    given: dict[int, list[str]] = {}
    unknown = 0
    for rows in read_rows(tables, layout, "--name"):
        # Names as the source calls them, or copied from `classes.tsv`.
        owners = [
            numbers.get(name, numbers.get(decode_cell(name), -1)) for name in map(str, rows.samples)
        ]
        unknown += owners.count(-1)
        for owner in owners:
            if owner >= 0:
                given.setdefault(owner, [])
        texts = rows.classes.tolist() if hasattr(rows.classes, "tolist") else list(rows.classes)
        for row, text in zip(rows.item_rows.tolist(), texts, strict=True):
            if owners[row] >= 0:
                given[owners[row]].append(str(text))
    return given, unknown


def _names_like(url: str) -> list[str]:
    """The names of a label set's classes, in order."""
    labels = LabelSet.load(url)
    names = names_of(labels.folder, range(labels.num_classes))
    if len(names) != labels.num_classes:
        raise UserError(f"{url}: {CLASSES_FILE} does not name its {labels.num_classes:,} classes")
    return [names[number] for number in range(labels.num_classes)]


def _lists_of_samples(index: ShardIndex, by_class: LabelLists) -> Iterator[LabelLists]:
    """The lists of all samples, part by part."""
    counts = by_class.counts
    for start in range(0, index.samples, _WRITTEN_TOGETHER):
        stop = min(start + _WRITTEN_TOGETHER, index.samples)
        owners = index.labels_of(np.arange(start, stop))
        if owners is None:
            raise UserError(
                f"{index.folder}: its index does not tell labels; mhe data index makes one that "
                "does"
            )
        sizes = np.where(owners < 0, 0, counts[owners])
        yield LabelLists(np.cumsum(sizes), _take(by_class, owners, sizes))


def _take(by_class: LabelLists, owners: Ints, sizes: Ints) -> Ints:
    """The lists of classes `owners`, one after the other."""
    stops = np.cumsum(sizes)
    begins = by_class.ends[owners] - by_class.counts[owners]
    offsets = np.arange(int(sizes.sum())) - np.repeat(stops - sizes, sizes)
    taken: Ints = by_class.class_ids[np.repeat(begins, sizes) + offsets]
    return taken
