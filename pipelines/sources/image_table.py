"""Tables of images and their classes: CSV or Parquet with the columns `path` and `class`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from mhe_dist.errors import UserError
from pipelines.storage.buffered_file import open_buffered
from pipelines.storage.csv_table import class_text, read_rows, require_columns

PATH, CLASS = "path", "class"
_PARQUET: Final = b"PAR1"
_BATCH: Final = 1 << 12  # rows
_CURE: Final = f"it needs {PATH} (below --root) and {CLASS}"


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
                yield ListedRow(location, path, class_text(label))


def _csv_rows(table: str, stream: io.BufferedReader[Any]) -> Iterator[tuple[str, str, str]]:
    for line, row in read_rows(table, stream, (PATH, CLASS), _CURE):
        yield f"{table} line {line}", row[PATH], row[CLASS]


def _parquet_rows(table: str, stream: io.BufferedReader[Any]) -> Iterator[tuple[str, str, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream)
        require_columns(table, file.schema_arrow.names, (PATH, CLASS), _CURE)
        number = 0
        for batch in file.iter_batches(_BATCH, columns=[PATH, CLASS]):
            columns = (batch.column(name).to_pylist() for name in (PATH, CLASS))
            for path, label in zip(*columns, strict=True):
                number += 1
                texts = ["" if value is None else str(value) for value in (path, label)]
                yield f"{table} row {number}", texts[0], texts[1]
    except pa.ArrowException as error:
        raise UserError(f"{table}: not a Parquet file that can be read ({error})") from error
