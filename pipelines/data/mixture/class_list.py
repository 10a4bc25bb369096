"""Lists of classes: which of a data set's classes a run takes."""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile

import fsspec
import numpy as np

from mhe_dist.errors import UserError
from pipelines.data.order import Ints
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet
from pipelines.shards.tables import CLASSES_FILE


def read_classes(url: str, labelled: ShardIndex | LabelSet) -> Ints:
    """The class ids that a list names, int64, sorted.

    A list is a table (tab-separated) whose header has a column `class`, ids, or else `name`, names
    as in `classes.tsv` beside the shards, or in the label set; so some lines of that file, with its
    first, are a list.

    Args:
        url: of the list.
        labelled: what says which classes there are: the data set, or a label set of it.

    Raises:
        UserError: there is no such file, or it is no list of different classes of this data set.
    """
    table = _table(url)
    key = next((name for name in ("class", "name") if name in table[0]), None)
    if key is None:
        raise UserError(
            f"{url}:1: a list of classes begins with a line `class` (ids follow) or `name` "
            f"(names as in {CLASSES_FILE}), or has these as columns; here are "
            f"{', '.join(table[0]) or 'none'}"
        )
    ids = _ids_of_names(labelled.folder) if key == "name" else None
    seen: dict[int, int] = {}
    for line, row in enumerate(table[1:], 2):
        text = dict(zip(table[0], row, strict=False)).get(key, "")
        number = int(text) if ids is None and text.isdecimal() else (ids or {}).get(text, -1)
        if not 0 <= number < labelled.num_classes:
            raise UserError(
                f"{url}:{line}: {text!r} is no {key} of {labelled.folder}, which has "
                f"{labelled.num_classes:,} classes"
            )
        if number in seen:
            raise UserError(f"{url}:{line}: {text!r} stands in line {seen[number]} already")
        seen[number] = line
    if not seen:
        raise UserError(f"{url}: no class is listed")
    return np.sort(np.fromiter(seen, np.int64))


def names_of(folder: str, wanted: Collection[int]) -> dict[int, str]:
    """Names of those classes of a `classes.tsv` that are wanted; empty: there is no such file.

    The file is read line by line, as far as the last class that is wanted: its classes are in
    order. Only what is returned is in memory.
    """
    last, names = max(wanted, default=-1), {}
    try:
        with fsspec.open(f"{folder}/{CLASSES_FILE}", "rt", encoding="utf-8", newline="") as stream:
            rows = (line.rstrip("\r\n").split("\t") for line in stream)
            header: list[str] = next(rows, [])
            class_at, name_at = header.index("class"), header.index("name")
            for row in takewhile(lambda row: int(row[class_at]) <= last, rows):
                if (number := int(row[class_at])) in wanted:
                    names[number] = row[name_at]
    except (OSError, ValueError, IndexError):
        return {}
    return names


def _ids_of_names(folder: str) -> dict[str, int]:
    table = _table(f"{folder}/{CLASSES_FILE}")
    columns = [table[0].index(name) for name in ("name", "class")]
    return {row[columns[0]]: int(row[columns[1]]) for row in table[1:]}


def _table(url: str) -> list[list[str]]:
    try:
        with fsspec.open(url, "rt", encoding="utf-8", newline="") as stream:
            lines = stream.read().split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: cannot be read ({error})") from error
    if len(lines) > 1 and not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r").split("\t") for line in lines]
