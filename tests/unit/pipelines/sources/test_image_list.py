"""`.lst` files: any line is read, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.image_list import parse_list_line, read_list_file


@given(st.text(alphabet="0123456789.e+-\t/ab", max_size=30))
def test_any_line_is_read_or_refused(line: str) -> None:
    try:
        label, path = parse_list_line(line)
    except ValueError:
        return
    assert label >= 0
    assert path in line.split("\t")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "a.lst").write_bytes(b"\xef\xbb\xbf0\t3\ta.jpg\n1\t4\tb.jpg\n")
    rows = [(row.path, row.label, row.problem) for row in read_list_file(f"{tmp_path}/a.lst")]
    assert rows == [("a.jpg", "3", ""), ("b.jpg", "4", "")]
