"""Tables of images and their classes: CSV or Parquet with the columns `path` and `class`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from mhe_dist.errors import UserError
from pipelines.storage.buffered_file import open_buffered

PATH, CLASS = "path", "class"
_PARQUET: Final = b"PAR1"
_BATCH: Final = 1 << 12  # rows


class ListedRow(NamedTuple):
    """A row of a list: where it stands, a path, what its class is called; or what is wrong."""

    location: str
    path: str = ""
    label: str = ""
    problem: str = ""


def read_image_table(table: str) -> Iterator[ListedRow]:
    """The rows of a table, in order; other columns are not looked at.

    Classes may be texts or whole numbers.

    Args:
        table: path or URL of a Parquet file, or of a CSV file (UTF-8; commas, semicolons or tabs).

    Raises:
        UserError: no such file, it is neither, or a column is missing.
    """
    with open_buffered(table) as stream:
        is_parquet = stream.peek(len(_PARQUET)).startswith(_PARQUET)
        rows = _parquet_rows(table, stream) if is_parquet else _csv_rows(table, stream)
        for location, path, label in rows:
            if not path or not label:
                yield ListedRow(location, problem=f"no {CLASS if path else PATH} in this row")
            else:
                yield ListedRow(location, path, label)


def _csv_rows(table: str, stream: io.BufferedReader[Any]) -> Iterator[tuple[str, str, str]]:
    with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        try:
            header = text.readline()
            text.seek(0)
            rows = csv.DictReader(text, delimiter=max(",;\t", key=header.count))
            _require_columns(table, rows.fieldnames or ())
            for row in rows:
                yield f"{table} line {rows.line_num}", row[PATH] or "", row[CLASS] or ""
        except UnicodeDecodeError as error:
            raise UserError(f"{table}: neither Parquet nor CSV in UTF-8 ({error})") from error
        except csv.Error as error:
            raise UserError(f"{table} line {rows.line_num}: {error}") from error


def _parquet_rows(table: str, stream: io.BufferedReader[Any]) -> Iterator[tuple[str, str, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream)
        _require_columns(table, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(_BATCH, columns=[PATH, CLASS]):
            columns = (batch.column(name).to_pylist() for name in (PATH, CLASS))
            for path, label in zip(*columns, strict=True):
                number += 1
                texts = ["" if value is None else str(value) for value in (path, label)]
                yield f"{table} row {number}", texts[0], texts[1]
    except pa.ArrowException as error:
        raise UserError(f"{table}: not a Parquet file that can be read ({error})") from error


def _require_columns(table: str, found: object) -> None:
    names = [str(name) for name in found]  # type: ignore[attr-defined]
    if missing := [name for name in (PATH, CLASS) if name not in names]:
        raise UserError(
            f"{table}: has no column {missing[0]!r} among {', '.join(names) or 'none'}; it needs "
            f"{PATH} (below --root) and {CLASS}"
        )
