"""Label sets: what was written is read, belongs to its data set, and is refused when damaged."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import (
    LabelSet,
    label_set_exists,
    write_label_files,
    write_label_set,
)
from pipelines.shards.shard import Shard
from tests.support.data.label_sets import as_lists, write_labels
from tests.support.data.shard_sets import write_set
from tests.support.servers.stores import Faulty, files, served

LISTS = [[2], [], [0, 1], [3], [1, 0, 3], [], [2], [2]]  # of the eight samples of `write_set`


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return ShardIndex.load(write_set(f"{tmp_path}/set").folder)


@pytest.fixture
def labels(tmp_path: Path, index: ShardIndex) -> LabelSet:
    return write_labels(f"{tmp_path}/labels", index, LISTS, 4, ["a", "b\tc", "d", "e"])


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_every_list_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    num_classes = data.draw(st.sampled_from([1, 9, 70_000]))
    one = st.lists(st.integers(0, num_classes - 1), max_size=3)
    lists = data.draw(st.lists(one, max_size=30))
    folder = str(tmp_path_factory.mktemp("labels"))
    index = ShardIndex("nowhere", 1, [Shard("a.tar", len(lists), 0, "")])
    found = write_labels(f"{folder}/labels", index, lists, num_classes)
    assert (found.samples, found.num_classes) == (len(lists), num_classes)
    assert found.labelled == sum(bool(each) for each in lists)
    assert found.max_labels == max(map(len, lists), default=0)
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    part = found.lists(start, stop)
    assert [part.of(n).tolist() for n in range(stop - start)] == lists[start:stop]
    assert part.counts.tolist() == [len(each) for each in lists[start:stop]]
    numbers = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=9)) if lists else []
    some = found.lists_of(np.array(numbers, np.int64))
    assert [some.of(n).tolist() for n in range(len(numbers))] == [lists[n] for n in numbers]
    if max(map(len, lists[start:stop]), default=0) <= 1:
        expected = [each[0] if each else -1 for each in lists[start:stop]]
        assert found.single_labels(start, stop).tolist() == expected
    else:
        with pytest.raises(ValueError, match="classes"):
            found.single_labels(start, stop)


def test_what_lies_in_the_folder(labels: LabelSet) -> None:
    folder = Path(labels.folder)
    about = json.loads((folder / "labels.json").read_text())
    assert about["format"] == "mhe-labels-1"
    assert {name: about[name] for name in ("num_classes", "samples", "labelled", "max_labels")} == {
        "num_classes": 4,
        "samples": 8,
        "labelled": 6,
        "max_labels": 3,
    }
    assert np.load(folder / "ends.npy").tolist() == [1, 1, 3, 4, 7, 7, 8, 9]
    assert np.load(folder / "class_ids.npy").tolist() == [2, 0, 1, 3, 1, 0, 3, 2, 2]
    rows = ["class\tsamples\tname", "0\t2\ta", r"1	2	b\tc", "2\t3\td", "3\t2\te", ""]
    assert (folder / "classes.tsv").read_text().split("\n") == rows
    assert sorted(path.name for path in folder.parent.iterdir()) == ["labels", "set"]


def test_no_secret_of_a_url_is_written(tmp_path: Path, index: ShardIndex) -> None:
    url = "https://user:hunter22@h/a.csv?X-Amz-Signature=s1"
    meta = {"tables": [url], "like": url, "layout": {"key": "name"}}
    stored = replace(index, folder=url)
    made = write_label_set(f"{tmp_path}/l", stored, 4, lambda: [as_lists(LISTS)], None, meta)
    clean = "https://***@h/a.csv?X-Amz-Signature=***"
    layout = {"key": "name"}
    assert made.meta == {"index": clean, "tables": [clean], "like": clean, "layout": layout}


def test_the_digest_is_of_lists_classes_and_data(tmp_path: Path, index: ShardIndex) -> None:
    base = write_labels(f"{tmp_path}/a", index, LISTS, 4)
    assert LabelSet.load(f"{tmp_path}/a/labels.json").digest == base.digest
    assert write_labels(f"{tmp_path}/b", index, LISTS, 4, list("wxyz")).digest == base.digest
    others = [
        write_labels(f"{tmp_path}/c", index, [[2], [], [1, 0], *LISTS[3:]], 4),
        write_labels(f"{tmp_path}/d", index, LISTS, 5),
        write_labels(f"{tmp_path}/e", ShardIndex("x", 9, index.shards), LISTS, 4),
    ]
    assert len({each.digest for each in [base, *others]}) == 4


def test_labels_of_another_data_set_are_refused(labels: LabelSet, index: ShardIndex) -> None:
    labels.require_index(index)
    other = ShardIndex("elsewhere", 9, index.shards)
    with pytest.raises(UserError, match="made for the data set with digest") as caught:
        labels.require_index(other)
    for word in (labels.folder, index.folder, "elsewhere", index.digest, other.digest):
        assert word in str(caught.value)


def test_lists_that_do_not_fit_are_not_written(tmp_path: Path, index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="7 lists for 8 samples"):
        write_labels(f"{tmp_path}/labels", index, LISTS[:-1], 4)
    with pytest.raises(ValueError, match=r"a class id is not in \[0, 3\)"):
        write_labels(f"{tmp_path}/labels", index, LISTS, 3)
    parts = iter([[as_lists(LISTS)], [as_lists(LISTS[:3])]])
    with pytest.raises(ValueError, match="3 values where 8 belong"):
        write_label_set(f"{tmp_path}/labels", index, 4, lambda: next(parts))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    write_labels(f"{tmp_path}/labels", index, LISTS, 4)
    with pytest.raises(UserError, match="already exists"):
        write_labels(f"{tmp_path}/labels", index, LISTS, 4)


def change(**values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        about = json.loads((folder / "labels.json").read_text())
        (folder / "labels.json").write_text(json.dumps(about | values))

    return apply


def cut(folder: Path) -> None:
    os.truncate(folder / "class_ids.npy", 140)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "labels.json").unlink(), r"no label set here \(labels.json is"),
        (lambda folder: (folder / "labels.json").write_text("{"), "not JSON"),
        (change(format="x"), "not a label set of format mhe-labels-1"),
        (change(columns={}), "damaged"),
        (change(max_labels=-1), "damaged"),
        (change(labelled=9), "damaged"),
        (lambda folder: (folder / "ends.npy").unlink(), r"ends\.npy.*label set.*file is missing"),
        (cut, r"class_ids\.npy.*has 140 bytes, the label set says 146"),
    ],
)
def test_a_damaged_label_set_is_refused(
    labels: LabelSet, damage: Callable[[Path], None], words: str
) -> None:
    assert label_set_exists(labels.folder)
    damage(Path(labels.folder))
    with pytest.raises(UserError, match=words) as caught:
        LabelSet.load(labels.folder)
    assert labels.folder in str(caught.value)
    assert "mhe data index" not in str(caught.value)


@pytest.mark.parametrize(("position", "start"), [(-4, 6), (-14, 0)])
def test_lists_that_end_before_they_begin_are_refused(
    labels: LabelSet, position: int, start: int
) -> None:
    with open(f"{labels.folder}/ends.npy", "r+b") as stream:
        stream.seek(position, os.SEEK_END)
        stream.write(b"\xff\xff")
    with pytest.raises(UserError, match=r"ends\.npy.*a list ends before it begins, or behind"):
        LabelSet.load(labels.folder).lists(start, 8)


def test_remote_labels_are_fetched_once_and_handed_on_without_their_values(
    tmp_path: Path, labels: LabelSet, index: ShardIndex
) -> None:
    cache = f"{tmp_path}/cache"
    with served(Faulty(files(Path(labels.folder)), share=0.3, seed=1)) as url:
        found = LabelSet.load(url, cache)
        assert not Path(cache).exists()  # nobody has asked for them
        found.map_columns()
    found.require_index(index)
    again = pickle.loads(pickle.dumps(found))  # the server is gone: these are the node's own
    assert again.digest == labels.digest
    assert again.lists(0, 8).class_ids.tolist() == labels.lists(0, 8).class_ids.tolist()
    assert len(pickle.dumps(again)) < 3000


def test_a_remote_column_that_was_changed_is_refused(tmp_path: Path, labels: LabelSet) -> None:
    path = Path(labels.folder, "class_ids.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"\x09")
    with served(files(Path(labels.folder))) as url:
        assert label_set_exists(url)
        found = LabelSet.load(url, f"{tmp_path}/cache")
        with pytest.raises(UserError, match="checksum is not that of the label set"):
            found.map_columns()


def test_similarities_are_a_column_beside_the_lists(tmp_path: Path, index: ShardIndex) -> None:
    plain = write_labels(f"{tmp_path}/plain", index, LISTS, 4)
    values = np.arange(9, dtype=np.uint16) * 1000
    folder = tmp_path / "labels"
    folder.mkdir()
    lists = as_lists(LISTS)
    write_label_files(
        str(folder), index, 4, lambda: [lists], similarities=lambda: [values[:4], values[4:]]
    )
    found = LabelSet.load(str(folder))
    assert found.similarities is not None and plain.similarities is None
    np.testing.assert_array_equal(found.similarities.values, values)
    assert [column.entry.file for column in found.columns][2:] == ["similarities.npy"]
    assert found.digest == plain.digest  # they decide nothing of a training
    np.save(folder / "similarities.npy", values[1:])
    with pytest.raises(UserError, match=r"similarities\.npy: .* make the label set again"):
        LabelSet.load(str(folder))
    about = json.loads((folder / "labels.json").read_text())
    about["columns"]["similarities"] |= {"length": 8, "bytes": 144}
    (folder / "labels.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"labels\.json: damaged .*8 similarities"):
        LabelSet.load(str(folder))
