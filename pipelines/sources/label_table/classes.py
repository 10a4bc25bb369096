"""Numbers for the classes of a table: those that it has already, or new ones for its texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mhe_dist.errors import UserError
from pipelines.sources.label_table.rows import TableRows

Ints = npt.NDArray[np.int64]

_NUMBER: Final = r"^(0|[1-9]\d{0,17})$"  # `007` is a text
_NEGATIVE: Final = r"^-\d+$"


class NotNumbersError(Exception):
    """A class is a text; the message names its row."""


class NumberedClasses:
    """Classes that are numbers in the table; they stay if they are `[0, C)`."""

    def __init__(self, num_classes: int) -> None:
        """Begin.

        Args:
            num_classes: C, if numbers below it stay whether all of them occur or not; 0: find out.
        """
        self._num_classes = num_classes
        self._distinct = np.empty(0, np.int64)
        self._new: list[Ints] = []
        self._new_size = 0

    def codes(self, rows: TableRows) -> Ints:
        """int64 `[m]`: for each class of the rows its number in the table.

        Raises:
            NotNumbersError: a class is a text.
            UserError: a number is negative or too large.
        """
        classes = rows.classes
        _refuse(rows, _negative(classes), "is negative; leave a class out by an empty cell")
        if pa.types.is_string(classes.type):
            texts = pc.invert(pc.match_substring_regex(classes, _NUMBER))
            if (wrong := _first(texts)) is not None:
                raise NotNumbersError(_describe(rows, wrong))
            classes = pc.cast(classes, pa.int64())
        numbers = np.asarray(classes.to_numpy(zero_copy_only=False), np.int64)
        if self._num_classes:
            too_large = pc.greater_equal(classes, self._num_classes)
            _refuse(rows, too_large, f"is not in [0, {self._num_classes}), see --num-classes")
        else:
            self._note(np.unique(numbers))
        return numbers

    def _note(self, distinct: Ints) -> None:
        """Remember numbers; they are merged rarely, so that many classes cost little."""
        self._new.append(distinct)
        self._new_size += len(distinct)
        if self._new_size > max(1 << 20, len(self._distinct)):
            self._merge()

    def _merge(self) -> None:
        self._distinct = np.unique(np.concatenate([self._distinct, *self._new]))
        self._new, self._new_size = [], 0

    def finish(self) -> tuple[int, Ints | None, Iterator[str]]:
        """C; the id of each code is its place in the array, or itself if None; the names."""
        self._merge()
        found = self._distinct
        if self._num_classes:
            return self._num_classes, None, map(str, range(self._num_classes))
        if np.array_equal(found, np.arange(len(found))):
            return len(found), None, map(str, range(len(found)))
        return len(found), found, map(str, found.tolist())


class NamedClasses:
    """Classes that are texts; their ids follow the order of the texts."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def codes(self, rows: TableRows) -> Ints:
        """int64 `[m]`: for each class of the rows a number that stands for its text.

        Raises:
            UserError: a text is a negative number.
        """
        _refuse(rows, _negative(rows.classes), "is negative; leave a class out by an empty cell")
        encoded = pc.cast(rows.classes, pa.string()).dictionary_encode()
        known = self._codes
        codes = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
        indices = encoded.indices.to_numpy(zero_copy_only=False)
        return np.array(codes, np.int64)[indices] if len(indices) else np.empty(0, np.int64)

    def finish(self) -> tuple[int, Ints, Iterator[str]]:
        """C; the codes in the order of their ids; the names."""
        names = sorted(self._codes)
        in_order = np.array([self._codes[name] for name in names], np.int64)
        return len(names), in_order, iter(names)


def _negative(classes: Any) -> Any:
    if pa.types.is_string(classes.type):
        return pc.match_substring_regex(classes, _NEGATIVE)
    return pc.less(classes, 0)


def _refuse(rows: TableRows, wrong: Any, reason: str) -> None:
    if (item := _first(wrong)) is not None:
        raise UserError(f"{_describe(rows, item)} {reason}")


def _first(flags: Any) -> int | None:
    """The first item with a flag."""
    found = pc.index(flags, True).as_py()
    return None if found < 0 else int(found)


def _describe(rows: TableRows, item: int) -> str:
    row = rows.first + int(rows.item_rows[item])
    return f"{rows.name(row)}: class {str(rows.classes[item].as_py())[:40]!r}"
