"""Lists of classes, and names of classes, as people and editors write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.mixture.class_list import find_other_name, names_of, read_classes
from pipelines.shards.index import ShardIndex
from pipelines.shards.tables import decode_row, encode_row, write_table
from tests.support.data.shard_sets import write_set

NAMES = ["a\\b", "a\tb", "a\nb", "a\\tb", "\\", "é", "x y", "z"]  # of the classes of `write_set`


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    index = write_set(f"{tmp_path}/set")
    rows = ([str(number), "1", name] for number, name in enumerate(NAMES))
    write_table(f"{index.folder}/classes.tsv", (["class", "samples", "name"], rows))
    return index


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_a_row_is_read_as_it_was_written(cells: list[str]) -> None:
    assert decode_row(encode_row(cells).decode().removesuffix("\n")) == cells


def test_names_are_those_of_the_source(index: ShardIndex, tmp_path: Path) -> None:
    assert names_of(index.folder, range(8)) == dict(enumerate(NAMES))
    assert find_other_name(index.folder, index.folder) is None
    lines = (Path(index.folder) / "classes.tsv").read_text().splitlines()
    some = tmp_path / "some.tsv"
    some.write_text("\n".join(["name", *(line.split("\t")[2] for line in lines[1:5])]))
    assert read_classes(str(some), index).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["class\n3\n1\n", "name\nx y\na\\\\b\n"])
@pytest.mark.parametrize("ending", ["", "\n", "\r\n\n"])
def test_what_editors_add_is_no_class(
    index: ShardIndex, tmp_path: Path, text: str, ending: str
) -> None:
    """A byte order mark, carriage returns, empty lines at the end."""
    listed = tmp_path / "list.tsv"
    listed.write_bytes(b"\xef\xbb\xbf" + (text.replace("\n", "\r\n") + ending).encode())
    expected = [1, 3] if text.startswith("class") else [0, 6]
    assert read_classes(str(listed), index).tolist() == expected
