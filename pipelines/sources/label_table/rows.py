"""The rows of a table of samples and classes, batch by batch: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
from fsspec.compression import compr
from fsspec.utils import infer_compression
from pyarrow import parquet

from mhe_dist.errors import UserError
from pipelines.storage.buffered_file import open_buffered
from pipelines.storage.csv_table import MARKED, WHOLE, delimiter_of

Ints = npt.NDArray[np.int64]

_CSV: Final = "csv"
_TSV: Final = "tsv"
_PARQUET: Final = ("parquet", "pq")
_COMPRESSED: Final = ("gz", "bz2", "xz", "zst")
_CSV_BLOCK: Final = 4 << 20  # bytes
_PARQUET_ROWS: Final = 1 << 16


class TableLayout(NamedTuple):
    """Which columns of a table say what.

    Attributes:
        key: of the samples' keys, as in the tars.
        label: of the classes: numbers, texts, or lists of them.
        number: of the samples' numbers through the data set, from 0, in place of `key`; empty:
            there is none.
        shard: of the tar that holds the sample, as `index.json` calls it; empty: keys are unique.
        separator: between the classes of a text; empty: a text is one class.
    """

    key: str = "key"
    label: str = "class"
    number: str = ""
    shard: str = ""
    separator: str = ""

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        sample = [self.number] if self.number else [self.key, *([self.shard] if self.shard else [])]
        return [*sample, self.label]


class TableRows(NamedTuple):
    """Consecutive rows.

    Attributes:
        table: that they stand in.
        first: number of the first one, from 1, through all tables.
        before: rows of the tables before this one.
        samples: name of each row's sample, `[n]`: keys; with a column of shards, `shard\\0key`; or
            numbers, int64.
        item_rows: int64 `[m]`, which row each class stands in, from 0.
        classes: `[m]`, int64 or string.
    """

    table: str
    first: int
    before: int
    samples: list[str] | Ints
    item_rows: Ints
    classes: Any

    def name(self, row: int) -> str:
        """The table and the number in it of a row that is counted through all tables."""
        return f"{self.table}: row {row - self.before}"


def read_rows(
    tables: Sequence[str], layout: TableLayout, key_option: str = "--key"
) -> Iterator[TableRows]:
    """The rows of tables, one after the other.

    Args:
        tables: by path or URL.
        layout: the columns.
        key_option: of the command, that names the column of keys.

    Raises:
        UserError: a table cannot be read, or lacks a column; or a row names no sample, or has a
            class that is neither a number nor a text.
    """
    first = 1
    for table in tables:
        before = first - 1
        for batch in _batches(table, layout, key_option):
            yield _parse(table, batch, layout, first, before)
            first += batch.num_rows


def _batches(table: str, layout: TableLayout, key_option: str) -> Iterator[pa.RecordBatch]:
    kind = _kind(table)
    try:
        with _opened(table) as stream:
            if kind in _PARQUET:
                file = parquet.ParquetFile(stream)
                _require_columns(table, file.schema_arrow.names, layout, key_option)
                yield from file.iter_batches(_PARQUET_ROWS, columns=layout.columns)
                return
            header = _first_line(stream)
            delimiter = "\t" if kind == _TSV else delimiter_of(header)
            names = next(csv.reader(io.StringIO(header), delimiter=delimiter), [])
            _require_columns(table, names, layout, key_option)
        with _opened(table) as stream:
            batches = arrow_csv.open_csv(
                stream,
                arrow_csv.ReadOptions(block_size=_CSV_BLOCK),
                arrow_csv.ParseOptions(delimiter=delimiter),
                # As texts: `0000123` is a key, and no number.
                arrow_csv.ConvertOptions(
                    include_columns=layout.columns,
                    column_types={name: pa.string() for name in layout.columns},
                    strings_can_be_null=False,
                ),
            )
            for batch in batches:
                texts = [pc.replace_substring_regex(each, MARKED, r"\1") for each in batch.columns]
                yield pa.RecordBatch.from_arrays(texts, batch.schema.names)
    except (OSError, ValueError, KeyError) as error:  # Arrow's own errors are among these
        raise UserError(f"{table}: cannot be read ({error})") from error


def _kind(table: str) -> str:
    """How the name ends, without the end of a compressed file."""
    ends = table.lower().rpartition("/")[2].split(".")[1:]
    if len(ends) > 1 and ends[-1] in _COMPRESSED:
        ends.pop()
    if not ends or ends[-1] not in (_CSV, _TSV, *_PARQUET):
        raise UserError(f"{table}: no table; let its name end with .csv, .tsv or .parquet")
    return ends[-1]


@contextmanager
def _opened(table: str) -> Iterator[IO[bytes]]:
    """The bytes of a table, unpacked if its name says that they are compressed."""
    with open_buffered(table) as stream:
        compression = infer_compression(table)
        yield compr[compression](stream, mode="rb") if compression else stream


def _first_line(stream: IO[bytes]) -> str:
    return stream.readline().decode("utf-8-sig").rstrip("\r\n")


def _require_columns(
    table: str, there: Sequence[str], layout: TableLayout, key_option: str
) -> None:
    options = {key_option: layout.key, "--shard": layout.shard, "--label": layout.label}
    if layout.number:
        options = {"--number": layout.number, "--label": layout.label}
    for option, name in options.items():
        if name and name not in there:
            raise UserError(
                f"{table}: there is no column {name!r}; {option} names one of "
                f"{', '.join(map(repr, there)) or 'none'}"
            )


def _parse(
    table: str, batch: pa.RecordBatch, layout: TableLayout, first: int, before: int
) -> TableRows:
    def column(name: str) -> Any:
        return batch.column(layout.columns.index(name))

    try:
        if layout.number:
            samples: list[str] | Ints = _integers(column(layout.number))
        else:
            samples = _texts(column(layout.key))
            if layout.shard:
                pairs = zip(_texts(column(layout.shard)), samples, strict=True)
                samples = ["\0".join(pair) for pair in pairs]
        item_rows, classes = _classes(column(layout.label), layout.separator)
    except (pa.ArrowException, ValueError) as error:
        rows = f"rows {first - before} to {first - before + batch.num_rows - 1}"
        raise UserError(f"{table}: {rows}: {error}") from None
    return TableRows(table, first, before, samples, item_rows, classes)


def _texts(column: Any) -> list[str]:
    """Every row's text; numbers in decimal."""
    if column.null_count:
        raise ValueError("a row names no sample")
    texts: list[str] = pc.cast(column, pa.string()).to_pylist()
    return texts


def _integers(column: Any) -> Ints:
    if column.null_count:
        raise ValueError("a row names no sample")
    if pa.types.is_string(column.type):
        column = _trimmed(column)
    return np.asarray(pc.cast(column, pa.int64()).to_numpy(zero_copy_only=False), np.int64)


def _classes(column: Any, separator: str) -> tuple[Ints, Any]:
    """Row and value of every class; what is empty, or not a number, is none."""
    column = _plain(column)
    if separator and pa.types.is_string(column.type):
        column = pc.split_pattern(column, separator)
    rows = np.arange(len(column))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0)
        rows = np.repeat(rows, lengths.to_numpy(zero_copy_only=False))
        column = _plain(column.flatten())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    if pa.types.is_string(column.type):
        column = _trimmed(column)
        there = pc.and_kleene(pc.is_valid(column), pc.not_equal(column, ""))
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        column, there = pc.cast(column, pa.int64()), pc.is_valid(column)
    else:
        raise ValueError(f"classes are numbers, texts or lists of them, not {column.type}")
    there = pc.fill_null(there, False)
    return rows[there.to_numpy(zero_copy_only=False)], column.filter(there)


def _trimmed(column: Any) -> Any:
    """Texts without spaces around them; `3` for `3.0`, as `class_text` has it."""
    return pc.replace_substring_regex(pc.utf8_trim_whitespace(column), WHOLE, r"\1")


def _plain(column: Any) -> Any:
    """A column without a dictionary, its texts of one type."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return pc.cast(column, pa.string())
    is_text = pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type)
    return pc.cast(column, pa.string()) if is_text else column
