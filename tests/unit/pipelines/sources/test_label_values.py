"""Labels of tars as class ids: numbers and texts, kept in little room, are those of a plain map."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.webdataset import Values, compact_values, number_classes

NUMBERS = st.integers(0, 12).map(str)
ODD = st.sampled_from(["007", "7", "cat", "1_0", "٣", "999999999999999999", "9999999999999999999"])


def compacted(tars: list[list[str]]) -> list[Values]:
    known: dict[str, str] = {}
    return [compact_values(tar, known) for tar in tars]


@given(st.lists(st.lists(NUMBERS | ODD, unique=True, max_size=6), max_size=5))
def test_class_ids_are_those_of_a_plain_map(tars: list[list[str]]) -> None:
    found = number_classes(compacted(tars), 0)
    texts = {text for tar in tars for text in tar}
    pairs = {
        (text, int(number))
        for tar, ids in zip(tars, found.by_tar, strict=True)
        for text, number in zip(tar, ids, strict=True)
    }
    assert {number for _, number in pairs} == set(range(found.num_classes))
    assert len(pairs) == len(texts) == found.num_classes
    if found.names:
        assert all(found.names[number] == text for text, number in pairs)
    else:
        assert all(int(text) == number for text, number in pairs)


@pytest.mark.parametrize(
    ("tars", "names"),
    [
        ([["10", "9"], ["9", "100"]], ["9", "10", "100"]),
        ([["010", "9"], ["100"]], ["9", "010", "100"]),
        ([["7"], ["007"]], ["007", "7"]),
        ([["2", "0"], ["1"]], []),
        ([["02", "0"], ["1"]], []),
        ([], []),
    ],
)
def test_names_are_in_order(tars: list[list[str]], names: list[str]) -> None:
    found = number_classes(compacted(tars), 0)
    assert list(found.names) == names


def test_numbers_stay_if_the_number_of_classes_is_given() -> None:
    found = number_classes(compacted([["5", "3"], ["03"], []]), 9)
    assert [ids.tolist() for ids in found.by_tar] == [[5, 3], [3], []]
    assert (list(found.names), found.num_classes) == ([], 9)


def test_numbers_take_eight_bytes_and_a_text_is_kept_once() -> None:
    known: dict[str, str] = {}
    numbers = compact_values(["0", "999999999999999999"], known)
    assert isinstance(numbers, np.ndarray) and numbers.dtype == np.int64 and not known
    one, other = (compact_values(["".join(["c", "at"]), "7"], known) for _ in range(2))
    assert one[0] is other[0]
