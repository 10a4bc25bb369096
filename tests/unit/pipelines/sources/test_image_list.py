"""`.lst` files: any line is read, or refused with a reason."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.image_list import parse_list_line


@given(st.text(alphabet="0123456789.e+-\t/ab", max_size=30))
def test_any_line_is_read_or_refused(line: str) -> None:
    try:
        label, path = parse_list_line(line)
    except ValueError:
        return
    assert label >= 0
    assert path in line.split("\t")
