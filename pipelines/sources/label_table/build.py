"""A label set from tables: rows meet samples by hashes of their names, bucket by bucket.

Memory holds one bucket of about a million samples and rows at a time, and what does not grow with
the samples: a count for each class, and the texts of classes that are texts. The rest lies in
temporary files, about 50 bytes for each sample and row.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Final, NamedTuple

import numpy as np

from mhe_dist.errors import UserError
from pipelines.shards.index import Fault, ShardIndex
from pipelines.shards.label_set import LabelLists, LabelSet, write_label_set
from pipelines.shards.tables import skipped_table
from pipelines.sources.label_table.classes import NamedClasses, NotNumbersError, NumberedClasses
from pipelines.sources.label_table.keys import HASH, KeyTask, hash_keys, hash_texts, read_keys
from pipelines.sources.label_table.rows import Ints, TableLayout, TableRows, read_rows
from pipelines.sources.label_table.spill import Records, SpillFiles
from pipelines.storage.staging import require_absent_or_resumable
from pipelines.storage.worker_pool import Progress, map_unordered, no_progress

BUCKET = 1 << 20  # samples that are in memory together
NAMED: Final = 1000  # faults of a kind that are kept by name
_NO_CLASS: Final = -1  # the code of a row that leaves its sample out
_SAMPLE: Final = np.dtype([*HASH.descr, ("number", "<i8")])
_ROW: Final = np.dtype([*HASH.descr, ("row", "<i8"), ("code", "<i8")])
_FOUND: Final = np.dtype([("number", "<i8"), ("code", "<i8")])


class LabelOptions(NamedTuple):
    """How a label set is made.

    Attributes:
        layout: of the tables.
        num_classes: C, if the classes are numbers below it; 0: find out.
        max_bad: largest share of rows that may name no sample.
        processes: how many read tars at the same time.
    """

    layout: TableLayout = TableLayout()
    num_classes: int = 0
    max_bad: float = 0.01
    processes: int = 1


class LabelImport(NamedTuple):
    """A label set that was made, and what did not fit.

    Attributes:
        labels: the label set.
        rows: of the tables.
        unknown: rows that name no sample of the data set.
        missing: samples that no row names.
        emptied: samples that are named, by rows without a class alone.
        repeated: classes that a sample was given again.
        named: the first unknown rows and missing samples.
    """

    labels: LabelSet
    rows: int
    unknown: int
    missing: int
    emptied: int
    repeated: int
    named: list[Fault]


def import_labels(
    tables: Sequence[str],
    index: ShardIndex,
    out: str,
    options: LabelOptions = LabelOptions(),  # noqa: B008, it cannot change
    progress: Progress = no_progress,
) -> LabelImport:
    """Write a label set of a data set from tables of samples and classes.

    A sample has the classes of all rows that name it, in their order, each once. Samples without a
    row, or with empty classes alone, have none.

    Args:
        tables: by path or URL.
        index: the data set.
        out: folder or URL of the label set, which must not exist.
        options: see there.
        progress: called with the tars whose keys were read, and their number.

    Raises:
        UserError: a table or a tar cannot be read, too many rows name no sample, or the temporary
            files do not fit on the disk.
    """
    require_absent_or_resumable(out)
    with TemporaryDirectory(prefix="mhe-labels-") as folder:
        join = _Join(list(tables), index, options, Path(folder))
        try:
            return join.run(out, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{out}: no room for it, or for temporary files of about 50 bytes for each sample "
                f"and row in {gettempdir()} ({error}); name another folder with TMPDIR"
            ) from error


class _Join:
    """Rows and samples on their way to each other."""

    def __init__(
        self, tables: list[str], index: ShardIndex, options: LabelOptions, folder: Path
    ) -> None:
        self._tables, self._index, self._options = tables, index, options
        self._layout, self._folder = options.layout, folder
        self._bits = max(0, (max(1, index.samples) - 1) // BUCKET).bit_length()
        self._samples = SpillFiles(folder, "samples", _SAMPLE)
        self._rows = SpillFiles(folder, "rows", _ROW)
        self._found = SpillFiles(folder, "found", _FOUND)
        self._parts = -(-index.samples // BUCKET)
        self._row_count = self._unknown = self._missing = self._emptied = self._repeated = 0
        self._unknown_rows = np.empty(0, np.int64)  # the first ones
        self._missing_samples: list[int] = []

    def run(self, out: str, progress: Progress) -> LabelImport:
        """See `import_labels`."""
        classes = self._read_tables()
        if not self._layout.number:
            self._read_keys(progress)
            for bucket in range(1 << self._bits):
                self._join_bucket(bucket)
        self._refuse_many_unknown()
        num_classes, in_order, names = classes.finish()
        for part in range(self._parts):
            self._write_part(part, in_order)
        if self._missing + self._emptied == self._index.samples:
            raise UserError(f"{self._tables[0]}: no sample of {self._index.folder} gets a class")
        named = self._name_unknown() + self._name_missing()
        meta = {
            "tables": self._tables,
            "layout": self._layout._asdict(),
            "rows": self._row_count,
        }
        labels = write_label_set(
            out, self._index, num_classes, self._lists, names, meta, skipped_table(named)
        )
        counts = (self._unknown, self._missing, self._emptied, self._repeated)
        return LabelImport(labels, self._row_count, *counts, named)

    def _read_tables(self) -> NumberedClasses | NamedClasses:
        """Spill the rows of all tables, with codes that stand for their classes."""
        try:
            classes: NumberedClasses | NamedClasses = NumberedClasses(self._options.num_classes)
            self._spill_rows(classes.codes)
        except NotNumbersError as error:
            if self._options.num_classes:
                raise UserError(f"{error} is no number, which --num-classes asks for") from None
            for each in self._folder.iterdir():
                each.unlink()
            self._row_count = self._unknown = 0
            self._unknown_rows = np.empty(0, np.int64)
            classes = NamedClasses()
            self._spill_rows(classes.codes)
        return classes

    def _spill_rows(self, codes_of: Callable[[TableRows], Ints]) -> None:
        for rows in read_rows(self._tables, self._layout):
            codes = codes_of(rows)
            count = len(rows.samples)
            # A row without a class says that its sample is known, and left out.
            empty = np.flatnonzero(np.bincount(rows.item_rows, minlength=count) == 0)
            positions = np.concatenate([rows.item_rows, empty])
            codes = np.concatenate([codes, np.full(len(empty), _NO_CLASS)])
            if isinstance(rows.samples, list):
                records = np.empty(len(positions), _ROW)
                hashes = hash_texts(rows.samples)[positions]
                records["high"], records["low"] = hashes["high"], hashes["low"]
                records["row"], records["code"] = positions + rows.first, codes
                self._rows.add(records, self._bucket(records))
            else:
                numbers = rows.samples[positions]
                known = (numbers >= 0) & (numbers < self._index.samples)
                self._add_found(numbers[known], codes[known])
                self._add_unknown(positions[~known] + rows.first)
            self._row_count += count

    def _bucket(self, records: Records) -> Any:
        if not self._bits:
            return np.zeros(len(records), np.int64)
        return (records["high"] >> np.uint64(64 - self._bits)).astype(np.int64)

    def _add_found(self, numbers: Ints, codes: Ints) -> None:
        records = np.empty(len(numbers), _FOUND)
        records["number"], records["code"] = numbers, codes
        self._found.add(records, numbers // BUCKET)

    def _add_unknown(self, rows: Ints) -> None:
        distinct = np.unique(rows)
        self._unknown += len(distinct)
        self._unknown_rows = np.sort(np.concatenate([self._unknown_rows, distinct]))[:NAMED]

    def _read_keys(self, progress: Progress) -> None:
        """Spill the hashed names of all samples."""
        index, total = self._index, len(self._index.shards)
        tasks = (
            (
                number,
                KeyTask(
                    ShardIndex(index.folder, index.num_classes, [shard]), bool(self._layout.shard)
                ),
            )
            for number, shard in enumerate(index.shards)
        )
        progress(0, total)
        found = map_unordered(hash_keys, tasks, self._options.processes)
        for done, (number, hashed) in enumerate(found, 1):
            hashes = np.frombuffer(hashed, HASH)
            records = np.empty(len(hashes), _SAMPLE)
            records["high"], records["low"] = hashes["high"], hashes["low"]
            records["number"] = np.arange(len(hashes)) + index.starts[number]
            self._samples.add(records, self._bucket(records))
            progress(done, total)

    def _join_bucket(self, bucket: int) -> None:
        """Find the sample of each row of a bucket."""
        samples, rows = self._samples.take(bucket), self._rows.take(bucket)
        high = np.concatenate([samples["high"], rows["high"]])
        low = np.concatenate([samples["low"], rows["low"]])
        order = np.lexsort((low, high))
        is_new = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
        groups = np.zeros(len(order), np.int64)
        groups[order[1:]] = np.cumsum(is_new)  # equal for equal names
        of_samples, of_rows = groups[: len(samples)], groups[len(samples) :]
        self._refuse_ambiguous(samples, of_samples, of_rows)
        number_of = np.full(len(order), -1)
        number_of[of_samples] = samples["number"]
        numbers = number_of[of_rows]
        known = numbers >= 0
        self._add_found(numbers[known], rows["code"][known])
        self._add_unknown(rows["row"][~known])

    def _refuse_ambiguous(self, samples: Records, of_samples: Ints, of_rows: Ints) -> None:
        """Refuse a row that names two samples."""
        sizes = np.bincount(of_samples)
        wanted = of_rows[of_rows < len(sizes)]
        twice = wanted[sizes[wanted] > 1]
        if len(twice):
            one, other = samples["number"][of_samples == twice[0]][:2].tolist()
            shard, position = self._index.locate(one)
            (key,) = read_keys(self._index, shard, position, position + 1)
            raise UserError(
                f"{self._index.folder}: two samples have the key {key!r}: {self._name(one)} and "
                f"{self._name(other)}; give a column with the tar's name in index.json as well "
                "(--shard), or one with the number of the sample in the data set (--number)"
            )

    def _refuse_many_unknown(self) -> None:
        if self._unknown > self._options.max_bad * self._row_count:
            first = "; ".join(": ".join(fault) for fault in self._name_unknown()[:3])
            raise UserError(
                f"{self._unknown:,} of {self._row_count:,} rows name no sample of "
                f"{self._index.folder}, more than --max-bad {self._options.max_bad:g} allows; the "
                f"first: {first}; is this the table of another data set?"
            )

    def _write_part(self, part: int, in_order: Ints | None) -> None:
        """Keep the lists of a million samples, in a file."""
        start = part * BUCKET
        count = min(BUCKET, self._index.samples - start)
        found = self._found.take(part)
        numbers, codes = found["number"] - start, found["code"]
        is_named = np.zeros(count, bool)
        is_named[numbers] = True
        kept = _first_of_each(numbers, codes)
        self._repeated += int((codes != _NO_CLASS).sum()) - len(kept)
        kept = kept[np.argsort(numbers[kept], kind="stable")]
        sizes = np.bincount(numbers[kept], minlength=count)
        ids = codes[kept] if in_order is None else _places(in_order)(codes[kept])
        missing = np.flatnonzero(~is_named)
        self._missing += len(missing)
        self._emptied += int((is_named & (sizes == 0)).sum())
        self._missing_samples += (missing[: NAMED - len(self._missing_samples)] + start).tolist()
        np.savez(self._folder / f"lists-{part:06d}.npz", ends=np.cumsum(sizes), class_ids=ids)

    def _lists(self) -> Iterator[LabelLists]:
        for part in range(self._parts):
            with np.load(self._folder / f"lists-{part:06d}.npz") as kept:
                yield LabelLists(kept["ends"], kept["class_ids"])

    def _name(self, number: int) -> str:
        return self._index.sample_name(*self._index.locate(number))

    def _name_missing(self) -> list[Fault]:
        return [Fault(self._name(number), "no row names it") for number in self._missing_samples]

    def _name_unknown(self) -> list[Fault]:
        """The first rows that name no sample; the tables are read again up to them."""
        wanted, faults = self._unknown_rows, list[Fault]()
        if not len(wanted):
            return faults
        for rows in read_rows(self._tables, self._layout):
            last = rows.first + len(rows.samples)
            here = wanted[(wanted >= rows.first) & (wanted < last)]
            for row in here.tolist():
                name = str(rows.samples[row - rows.first]).replace("\0", ": ")
                faults.append(Fault(rows.name(row), f"{name[:200]} is no sample of the data set"))
            if last > wanted[-1]:
                break
        return faults


def _first_of_each(numbers: Ints, codes: Ints) -> Ints:
    """Where each pair of sample and class stands first, in order; rows without a class do not."""
    order = np.lexsort((codes, numbers))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(numbers[order]) != 0) | (np.diff(codes[order]) != 0)
    first = order[is_new]
    return np.sort(first[codes[first] != _NO_CLASS])


def _places(in_order: Ints) -> Callable[[Ints], Ints]:
    """A function from values to their places in an array of different values."""
    sorter = np.argsort(in_order, kind="stable")
    return lambda values: sorter[np.searchsorted(in_order, values, sorter=sorter)]
