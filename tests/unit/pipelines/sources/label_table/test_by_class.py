"""A table gives the classes of a data set other classes, and each sample has those of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import cli
from mhe_dist.errors import UserError
from pipelines.data.mixture.class_list import names_of
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_report import read_class_names
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.sources.label_table.by_class import import_class_labels
from pipelines.sources.label_table.rows import TableLayout
from tests.support.data.label_sets import lists_of
from tools import components

LAYOUT = TableLayout(key="name", label="parts", separator=" ")


def write(folder: Path, names: list[str], classes: list[int]) -> ShardIndex:
    with ShardWriter(str(folder), "part") as writer:
        for start in range(0, len(classes), 3):
            writer.write(
                Sample(f"{start + n:03d}", {"jpg": b"x", "cls": str(each).encode()})
                for n, each in enumerate(classes[start : start + 3])
            )
        writer.finish(len(names))
    rows = "".join(f"{number}\t1\t{name}\n" for number, name in enumerate(names))
    (folder / "classes.tsv").write_text("class\tsamples\tname\n" + rows)
    return ShardIndex.load(str(folder))


def test_each_sample_has_what_the_table_gives_to_its_class(tmp_path: Path) -> None:
    index = write(tmp_path / "set", ["a", "b", "c", "d"], [2, 0, 1, 1, 3, 0, 2])
    table = tmp_path / "parts.tsv"
    table.write_text("name\tparts\na\ty x y\nb\tz\nc\t\nother\tx\nb\tx\n")
    target = str(tmp_path / "labels")
    made = import_class_labels([str(table)], index, target, LAYOUT)
    assert read_class_names(made.labels) == ["x", "y", "z"]
    assert lists_of(made.labels) == [[], [0, 1], [0, 2], [0, 2], [], [0, 1], []]
    assert (made.unknown, made.missing, made.dropped) == (1, 1, 0)

    other = write(tmp_path / "other", ["q", "a"], [1, 0])
    table.write_text("name\tparts\na\tx new z\nq\tnew\n")
    again = import_class_labels([str(table)], other, str(tmp_path / "again"), LAYOUT, target)
    assert read_class_names(again.labels) == ["x", "y", "z"]
    assert lists_of(again.labels) == [[0, 2], []]
    assert (again.unknown, again.missing, again.dropped) == (0, 0, 1)


def test_a_whole_number_is_one_class_however_it_is_written(tmp_path: Path) -> None:
    index = write(tmp_path / "set", ["a", "b", "c"], [0, 1, 2])
    (tmp_path / "t.csv").write_text("name,parts\na,3.0\nb,3\nc,3. 4.5\n")
    made = import_class_labels([f"{tmp_path}/t.csv"], index, f"{tmp_path}/out", LAYOUT)
    assert read_class_names(made.labels) == ["3", "4.5"]
    assert lists_of(made.labels) == [[0], [0], [0, 1]]


def test_names_are_escaped_in_tables_alone(tmp_path: Path) -> None:
    names = ["a\\b", "a\tb", "plain"]
    index = write(tmp_path / "set", ["a\\\\b", "a\\tb", "plain"], [0, 1, 2])
    table = tmp_path / "parts.csv"
    table.write_text('name,parts\na\\b,p\\q\n"a\tb","t\tu"\nplain,r\n')
    layout = LAYOUT._replace(separator="")
    made = import_class_labels([str(table)], index, str(tmp_path / "one"), layout)
    assert (made.unknown, made.missing) == (0, 0)
    assert names_of(made.labels.folder, range(3)) == {0: "p\\q", 1: "r", 2: "t\tu"}
    like = import_class_labels(
        [str(table)], index, str(tmp_path / "two"), layout, made.labels.folder
    )
    assert like.dropped == 0
    assert names_of(like.labels.folder, range(3)) == names_of(made.labels.folder, range(3))
    assert list(names_of(index.folder, range(3)).values()) == names
    # Names that were copied from `classes.tsv` name the same classes.
    table.write_text("name,parts\na\\\\b,x\na\\tb,x\n")
    assert import_class_labels([str(table)], index, str(tmp_path / "3"), layout).unknown == 0


def test_a_table_of_other_classes_and_a_set_without_names_are_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "set", ["a"], [0, 0])
    table = tmp_path / "parts.csv"
    table.write_text("name,parts\nz,x\n")
    with pytest.raises(UserError, match="no row names a class"):
        import_class_labels([str(table)], index, str(tmp_path / "labels"), LAYOUT)
    with pytest.raises(UserError, match="no column 'nam'; --name names one of 'name', 'parts'"):
        wrong = LAYOUT._replace(key="nam")
        import_class_labels([str(table)], index, str(tmp_path / "labels"), wrong)
    (tmp_path / "set" / "classes.tsv").unlink()
    with pytest.raises(UserError, match="its classes have no names"):
        import_class_labels([str(table)], index, str(tmp_path / "labels"), LAYOUT)


def test_components_of_classes_that_look_the_same_are_joined(tmp_path: Path) -> None:
    rows = "0\t9\tU+6797\n1\t9\tU+0041 U+6728\n2\t9\tU+0042\n"
    (tmp_path / "classes.tsv").write_text("class\tsamples\tname\n" + rows)
    parts = {"林": ["木", "木"], "木": ["一", "丨"]}.get
    found = list(components.rows([str(tmp_path), str(tmp_path)], parts))
    assert found == [("U+6797", "木"), ("U+0041 U+6728", "一 丨")]


def test_the_verb_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = write(tmp_path / "set", ["a", "b"], [0, 1])
    table, target = tmp_path / "parts.tsv", str(tmp_path / "labels")
    table.write_text("name\tparts\na\tx y\n")
    options = ["--label", "parts", "--separator", " ", "--shards", index.folder, "--out", target]
    assert cli.run(["data", "labels", "from-classes", str(table), *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 samples have classes, of 2, up to 2 of them each" in shown
    assert "1 classes are named by no row" in shown
