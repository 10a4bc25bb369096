"""CSV tables that people open in spreadsheets: no cell is a formula, every text comes back."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Final

from mhe_dist.errors import UserError

MARKED: Final = r"^'('*[=+\-@\t\r])"  # a text that `as_cell` has marked; what follows is the text
WHOLE: Final = r"^(-?[0-9]{1,18})\.0*$"  # a whole number, of a program that knows floats alone
_DELIMITERS: Final = ",;\t"
_MARKED: Final = re.compile(MARKED)
_WHOLE: Final = re.compile(WHOLE)
_FORMULA: Final = re.compile(r"'*[=+\-@\t\r]")
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def as_cell(value: object) -> str:
    """The cell of a value; a `'` before a text that spreadsheets would run as a formula.

    Names of classes and files come from elsewhere: a folder may be called `=HYPERLINK(...)`.
    """
    text = str(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def plain_text(cell: str) -> str:
    """The text of a cell that `as_cell` made."""
    return _MARKED.sub(r"\1", cell, count=1)


def spell_out(text: str) -> str:
    """Text as UTF-8 can hold it: a byte of a name that is not UTF-8 becomes `\\udcff`."""
    return text.encode(errors="backslashreplace").decode()


def class_text(text: str) -> str:
    """The text of a class: `3` for `3.0`, as pandas writes a column that lacks a number."""
    return _WHOLE.sub(r"\1", text)


def encode_rows(rows: Iterable[Iterable[object]]) -> bytes:
    """Rows as UTF-8, see `spell_out`.

    A carriage return becomes a line feed, as rows end with one.
    """
    text = io.StringIO(newline=None)
    # Cells with what ends a row are quoted: an unquoted carriage return would end it elsewhere.
    csv.writer(text, lineterminator="\r\n").writerows(map(as_cell, row) for row in rows)
    return text.getvalue().encode(errors="backslashreplace")


def delimiter_of(header: str) -> str:
    """What stands between the cells: a comma, a semicolon (where 0,5 is a number) or a tab."""
    return max(_DELIMITERS, key=header.count)


def read_rows(
    table: str, stream: IO[bytes], columns: Sequence[str], cure: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with the number of their last line, and their cells of some columns.

    Args:
        table: path or URL, for messages.
        stream: what it holds, UTF-8.
        columns: that are needed.
        cure: what to do where one is missing.

    Raises:
        UserError: it is no such table.
    """
    # Spreadsheets begin with a byte order mark.
    with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        try:
            header = text.readline()
            text.seek(0)
            rows: Any = csv.DictReader(text, delimiter=delimiter_of(header))
            require_columns(table, rows.fieldnames or (), columns, cure)
            for row in rows:
                yield rows.line_num, {name: plain_text(row[name] or "") for name in columns}
        except UnicodeDecodeError as error:
            raise UserError(
                f"{table}: is no CSV file in UTF-8 ({error}); save it as one"
            ) from error
        except csv.Error as error:
            raise UserError(f"{table} line {rows.line_num}: {error}") from error


def require_columns(table: str, found: Iterable[object], columns: Sequence[str], cure: str) -> None:
    """Raise UserError if a column is missing among those of a table."""
    names = [str(name) for name in found]
    if missing := [name for name in columns if name not in names]:
        raise UserError(
            f"{table}: has no column {missing[0]!r} among {', '.join(names) or 'none'}; {cure}"
        )
