"""The `.lst` files of mxnet and InsightFace: image files and their labels.

There are two dialects, told apart line by line: `number, label, path` (mxnet's im2rec; more labels
may stand before the path) and `aligned, path, label` (InsightFace). Fields are separated by tabs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Final

from pipelines.sources.image_table import ListedRow
from pipelines.storage.buffered_file import open_buffered

_NUMBER: Final = re.compile(r"[+-]?\d{1,18}(\.\d*)?([eE][+-]?\d+)?")
_MAX_CLASSES: Final = 1 << 62


def read_list_file(lst: str) -> Iterator[ListedRow]:
    """The rows of an `.lst` file; one that cannot be read has its problem in place of a path.

    Args:
        lst: path or URL of the file.
    """
    with (
        open_buffered(lst) as stream,
        io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="\n") as lines,
    ):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            location = f"{lst} line {number}"
            try:
                label, path = parse_list_line(line.rstrip("\r\n"))
            except ValueError as error:
                yield ListedRow(location, problem=str(error))
            else:
                yield ListedRow(location, path, str(label))


def parse_list_line(line: str) -> tuple[int, str]:
    """Label and path of a line in either dialect.

    Raises:
        ValueError: it is of neither, or its label is no class.
    """
    fields = line.split("\t")
    if len(fields) >= 3 and _NUMBER.fullmatch(fields[0]):
        second, last = (bool(_NUMBER.fullmatch(field)) for field in (fields[1], fields[-1]))
        if second and not last:
            return _label(fields[1]), fields[-1]
        if not second and _NUMBER.fullmatch(fields[2]) and fields[0] in ("0", "1"):
            return _label(fields[2]), fields[1]
    raise ValueError(
        f"{line[:60]!r} is neither number, label, path nor aligned, path, label (with tabs)"
    )


def _label(text: str) -> int:
    """A class; whole numbers are read exactly, however large."""
    value = Decimal(text)
    if not 0 <= value < _MAX_CLASSES or value != int(value):
        raise ValueError(f"label {text} is no class")
    return int(value)
