"""CSV tables: what a spreadsheet would run is marked, and every text comes back as it was."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.storage.csv_table import as_cell, encode_rows, plain_text, read_rows


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-a", "@SUM(A1)", "\t=1", "'=1"])
def test_a_text_that_a_spreadsheet_would_run_is_marked(text: str) -> None:
    assert as_cell(text) == f"'{text}"
    assert plain_text(as_cell(text)) == text


@pytest.mark.parametrize("value", [-1, -0.25, "-0.250000", "+1e-05", "7", "a=b", "'a", ""])
def test_numbers_and_other_texts_stay(value: object) -> None:
    assert as_cell(value) == str(value)
    assert plain_text(str(value)) == str(value)


@given(st.lists(st.text("'=+-@;,\t\n\"1ae. "), min_size=1))
def test_every_text_comes_back(texts: list[str]) -> None:
    written = encode_rows([["name", "number"], *([text, 1] for text in texts)])
    rows = read_rows("t.csv", io.BytesIO(written), ["name"], "")
    assert [row["name"] for _, row in rows] == texts


def test_a_carriage_return_ends_no_row() -> None:
    assert encode_rows([["a\r=1", "b"]]) == b'"a\n=1",b\n'


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_and_the_mark_of_spreadsheets_are_understood(delimiter: str) -> None:
    text = "\ufeff" + delimiter.join(("a", "b")) + "\r\n" + delimiter.join(("1", "'=2")) + "\r\n"
    assert list(read_rows("t.csv", io.BytesIO(text.encode()), ["b"], "")) == [(2, {"b": "=2"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n1\n", "t.csv: has no column 'b' among a; it needs b"),
        (b"", "t.csv: has no column 'b' among none"),
        (b"b\n\xff\n", "t.csv: is no CSV file in UTF-8"),
        (b"b\n" + b"x" * 200_000, "t.csv line 1: field larger"),
    ],
)
def test_what_is_no_such_table_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_rows("t.csv", io.BytesIO(content), ["b"], "it needs b"))
