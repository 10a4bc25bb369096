"""Lists of classes: which of a data set's classes a run takes."""

from __future__ import annotations

import io
from array import array
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import repeat, takewhile

import numpy as np

from mhe_dist.config.data import DataConfig
from mhe_dist.errors import UserError
from pipelines.data.order import Ints
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet
from pipelines.shards.tables import CLASSES_FILE, decode_row
from pipelines.storage.buffered_file import open_buffered


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
    rows = _rows(url)
    header = next(rows, [""])
    key = next((name for name in ("class", "name") if name in header), None)
    if key is None:
        raise UserError(
            f"{url}:1: a list of classes begins with a line `class` (ids follow) or `name` "
            f"(names as in {CLASSES_FILE}), or has these as columns; here are "
            f"{', '.join(header) or 'none'}"
        )
    at = header.index(key)
    cells = (row[at] if at < len(row) else "" for row in rows)
    ids = _ids(url, cells, labelled) if key == "class" else _ids_of_names(url, cells, labelled)
    if not len(ids):
        raise UserError(f"{url}: no class is listed")
    return np.sort(ids)


def _ids(url: str, cells: Iterable[str], labelled: ShardIndex | LabelSet) -> Ints:
    """Class ids as they are listed, int64; 8 bytes each are in memory."""
    found, end = array("q"), labelled.num_classes
    for line, text in enumerate(cells, 2):
        if not (text.isdecimal() and int(text) < end):
            raise _no_class(url, line, text, "class", labelled)
        found.append(int(text))
    ids = np.frombuffer(found, np.int64) if found else np.empty(0, np.int64)
    order = np.argsort(ids, kind="stable")
    again = order[1:][ids[order[1:]] == ids[order[:-1]]]
    if len(again):
        second = int(again.min())
        first = int(np.argmax(ids == ids[second]))
        raise _listed_twice(url, second + 2, str(ids[second]), first + 2)
    return ids


def _ids_of_names(url: str, cells: Iterable[str], labelled: ShardIndex | LabelSet) -> Ints:
    """Class ids of the names that are listed, int64; those of the list alone are in memory."""
    lines: dict[str, int] = {}
    for line, text in enumerate(cells, 2):
        if lines.setdefault(text, line) != line:
            raise _listed_twice(url, line, text, lines[text])
    ids = np.full(len(lines), -1, np.int64)
    for number, name in _names(labelled.folder):
        if (line := lines.get(name, 0)) and number < labelled.num_classes:
            ids[line - 2] = number
    if (ids < 0).any():
        line = int(np.argmax(ids < 0)) + 2
        text = next(name for name, number in lines.items() if number == line)
        raise _no_class(url, line, text, "name", labelled)
    return ids


def _no_class(
    url: str, line: int, text: str, key: str, labelled: ShardIndex | LabelSet
) -> UserError:
    return UserError(
        f"{url}:{line}: {text!r} is no {key} of {labelled.folder}, which has "
        f"{labelled.num_classes:,} classes"
    )


def _listed_twice(url: str, line: int, text: str, first: int) -> UserError:
    return UserError(f"{url}:{line}: {text!r} stands in line {first} already")


def names_of(folder: str, wanted: Collection[int]) -> dict[int, str]:
    """Names of those classes of a `classes.tsv` that are wanted; empty: there is no such file.

    The file is read line by line, as far as the last class that is wanted: its classes are in
    order. Only what is returned is in memory.
    """
    last, names = max(wanted, default=-1), {}
    try:
        for number, name in takewhile(lambda row: row[0] <= last, _names(folder)):
            if number in wanted:
                names[number] = name
    except (UserError, ValueError, IndexError):
        return {}
    return names


def names_in_run(data: DataConfig, wanted: Collection[int]) -> dict[int, str]:
    """Names of those classes of a run that are wanted, by its class ids.

    Empty where they cannot be read here, and for a mixture of sets, whose ids are counted on.

    Args:
        data: of the run; with `data.classes` its ids number the chosen classes.
        wanted: class ids of the run.
    """
    folder = data.labels or data.shards
    if data.mix:
        return {}
    if not data.classes:
        return names_of(folder, wanted)
    with suppress(UserError):
        labelled = LabelSet.load(folder) if data.labels else ShardIndex.load(folder)
        chosen = read_classes(data.classes, labelled)
        ids = {int(chosen[number]): number for number in wanted if 0 <= number < len(chosen)}
        return {ids[source]: name for source, name in names_of(folder, ids).items()}
    return {}


def find_other_name(folder: str, other: str) -> tuple[int, str, str] | None:
    """The first class that two `classes.tsv` call by other names, and both; None: there is none.

    Both files are read side by side, line by line: their classes are in order. A class that one of
    them lacks is no difference, nor is a file that is not there.
    """
    with suppress(UserError, ValueError, IndexError):
        sides = [_names(folder), _names(other)]
        here, there = (next(side, None) for side in sides)
        while here and there:
            lower = min(here[0], there[0])
            if here[0] == there[0] and here[1] != there[1]:
                return lower, here[1], there[1]
            if there[0] == lower:
                there = next(sides[1], None)
            if here[0] == lower:
                here = next(sides[0], None)
    return None


def _names(folder: str) -> Iterator[tuple[int, str]]:
    """Class and name in each line of a `classes.tsv`."""
    rows = _rows(f"{folder}/{CLASSES_FILE}")
    header = next(rows, [])
    class_at, name_at = header.index("class"), header.index("name")
    for row in rows:
        yield int(row[class_at]), row[name_at]


def _rows(url: str) -> Iterator[list[str]]:
    """The cells of each line of a table that somebody may have written by hand.

    Empty lines at its end are none.
    """
    try:
        with open_buffered(url) as stream:
            empty = 0
            for line in io.TextIOWrapper(stream, "utf-8-sig", newline="\n"):  # editors begin so
                if text := line.removesuffix("\n").removesuffix("\r"):
                    yield from repeat([""], empty)
                    empty = 0
                    yield decode_row(text)
                else:
                    empty += 1
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: cannot be read ({error})") from error
