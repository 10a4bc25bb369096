"""Tables become label sets: as a plain join would have it, in buckets of a few samples."""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mhe_dist.errors import UserError
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_report import read_class_names
from pipelines.shards.label_set import LabelSet
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.sources.label_table import build
from pipelines.sources.label_table.build import LabelImport, LabelOptions, import_labels
from pipelines.sources.label_table.keys import read_keys
from pipelines.sources.label_table.rows import TableLayout
from pipelines.sources.webdataset import index_shards
from pipelines.storage.csv_table import encode_rows
from tests.support.data.images import jpeg
from tests.support.data.label_sets import lists_of
from tests.support.data.tars import add_members
from tests.support.servers.stores import files, served

SIZES = (5, 0, 6, 2)
KEYS = [f"a/{number:07d}" for number in range(sum(SIZES))]
LONG = "x" * 120


@pytest.fixture(scope="module", autouse=True)
def small_buckets() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BUCKET", 4)
        yield


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write(tmp_path_factory.mktemp("data") / "set", KEYS)


def write(folder: Path, keys: list[str]) -> ShardIndex:
    given_keys = iter(keys)
    with ShardWriter(str(folder), "part") as writer:
        for size in SIZES:
            keys_here = [next(given_keys) for _ in range(size)]
            writer.write(Sample(key, {"jpg": b"x" * 700, "cls": b"0"}) for key in keys_here)
        writer.finish(1)
    return ShardIndex.load(str(folder))


def named_lists(labels: LabelSet) -> list[list[str]]:
    names = read_class_names(labels)
    return [[names[number] for number in each] for each in lists_of(labels)]


def save(path: Path, rows: list[dict[str, object]]) -> str:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else ["key", "class"])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def make(index: ShardIndex, path: Path, rows: list[dict[str, object]], **options) -> LabelImport:
    layout = TableLayout(**options.pop("layout", {}))
    table = save(path.with_suffix(".csv"), rows)
    return import_labels([table], index, f"{path}-out", LabelOptions(layout, **options))


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_a_table_gives_what_a_plain_join_gives(
    index: ShardIndex, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("made")
    named = st.sampled_from([*KEYS, "nobody", "a", ""])
    label = st.sampled_from(["cat", "dog", "", " cat ", "12", "007"])
    rows = data.draw(st.lists(st.tuples(named, label), max_size=30))
    rows = [*rows, (KEYS[3], "dog")]
    expected: dict[str, list[str]] = {}
    for key, text in rows:
        known = expected.setdefault(key, [])
        if text.strip() and text.strip() not in known:
            known.append(text.strip())
    table = [{"key": key, "class": text} for key, text in rows]
    made = make(index, folder / "t", table, max_bad=1)
    assert named_lists(made.labels) == [expected.get(key, []) for key in KEYS]
    assert read_class_names(made.labels) == sorted({t.strip() for _, t in rows if t.strip()})
    assert made.rows == len(rows)
    assert made.unknown == sum(key not in KEYS for key, _ in rows)
    assert made.missing == sum(key not in expected for key in KEYS)
    assert made.emptied == sum(expected.get(key) == [] for key in KEYS)
    given_classes = sum(bool(text.strip()) for key, text in rows if key in KEYS)
    assert made.repeated == given_classes - sum(map(len, lists_of(made.labels)))
    by_number = [
        {"at": KEYS.index(key) if key in KEYS else -1, "class": text} for key, text in rows
    ]
    again = make(index, folder / "n", by_number, max_bad=1, layout={"number": "at"})
    if not [text for key, text in rows if key not in KEYS]:
        assert again.labels.digest == made.labels.digest
    assert named_lists(again.labels) == named_lists(made.labels)
    assert again[1:6] == made[1:6]


def test_what_did_not_fit_is_counted_and_named(index: ShardIndex, tmp_path: Path) -> None:
    rows = [{"key": key, "class": "x"} for key in [KEYS[0], "nobody", *KEYS[3:], "else"]]
    with pytest.raises(UserError, match="2 of 13 rows name no sample") as caught:
        make(index, tmp_path / "t", rows, max_bad=0.1)
    assert "t.csv: row 2: nobody is no sample of the data set" in str(caught.value)
    assert not (tmp_path / "t-out").exists()
    made = make(index, tmp_path / "t", rows, max_bad=0.2)
    assert (made.unknown, made.missing) == (2, 2)
    lines = (tmp_path / "t-out" / "skipped.tsv").read_text().split("\n")
    assert lines[1:3] == [
        f"{tmp_path}/t.csv: row 2\tnobody is no sample of the data set",
        f"{tmp_path}/t.csv: row 13\telse is no sample of the data set",
    ]
    assert lines[3] == f"sample 1 of {index.url(0)}\tno row names it"
    with pytest.raises(UserError, match="already exists"):
        make(index, tmp_path / "t", rows, max_bad=0.2)


def test_of_several_tables_the_one_with_the_row_is_named(index: ShardIndex, tmp_path: Path) -> None:
    tables = [tmp_path / "one.csv", tmp_path / "two.csv"]
    tables[0].write_text(f"key,class\n{KEYS[0]},a\n{KEYS[1]},a\n")
    tables[1].write_text(f"key,class\n{KEYS[2]},a\nnobody,b\n")
    made = import_labels(
        [str(each) for each in tables], index, str(tmp_path / "out"), LabelOptions(max_bad=1)
    )
    assert made.named[0].location == f"{tables[1]}: row 2"
    tables[1].write_text(f"key,class\n{KEYS[2]},-3\n")
    with pytest.raises(UserError, match=r"two.csv: row 1: class '-3' is negative"):
        import_labels([str(each) for each in tables], index, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("classes", "num_classes", "ids", "names"),
    [
        (["1", "0", "2"], 0, [1, 0, 2], ["0", "1", "2"]),
        (["10", "7", "9"], 0, [2, 0, 1], ["7", "9", "10"]),
        (["4", "0", "2"], 5, [4, 0, 2], ["0", "1", "2", "3", "4"]),
        (["10", "b", "9"], 0, [0, 2, 1], ["10", "9", "b"]),
        (["1", "01", "0"], 0, [2, 1, 0], ["0", "01", "1"]),
    ],
)
def test_numbers_stay_if_they_are_classes_already(
    index: ShardIndex,
    tmp_path: Path,
    classes: list[str],
    num_classes: int,
    ids: list[int],
    names: list[str],
) -> None:
    rows = [{"key": key, "class": text} for key, text in zip(KEYS, classes, strict=False)]
    made = make(index, tmp_path / "t", rows, num_classes=num_classes)
    assert [each[0] for each in lists_of(made.labels)[:3]] == ids
    assert read_class_names(made.labels) == names
    assert made.labels.num_classes == len(names)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [("0", "-1")],
            {},
            "t.csv: row 1: class '-1' is negative; leave a class out by an empty cell",
        ),
        ([("0", "-1"), ("1", "a")], {}, "row 1: class '-1' is negative"),
        ([("0", "7")], {"num_classes": 7}, r"row 1: class '7' is not in \[0, 7\)"),
        ([("0", "a")], {"num_classes": 7}, "row 1: class 'a' is no number, which --num-classes"),
        ([("0", "")], {}, "gets a class"),
        ([], {}, "gets a class"),
        ([("0", "1")], {"layout": {"key": "name"}}, "no column 'name'; --key names one of 'key'"),
        ([("0", "1")], {"layout": {"label": "id"}}, "no column 'id'; --label names one of 'key'"),
        ([("0", "1")], {"layout": {"number": "n"}}, "no column 'n'; --number names one of"),
        ([("x", "1")], {"layout": {"number": "key"}}, "rows 1 to 1: .*'x'"),
    ],
)
def test_tables_that_cannot_be_used(
    index: ShardIndex,
    tmp_path: Path,
    rows: list[tuple[str, str]],
    options: dict[str, object],
    message: str,
) -> None:
    table = [
        {"key": KEYS[int(key)] if key.isdecimal() else key, "class": text} for key, text in rows
    ]
    with pytest.raises(UserError, match=message):
        make(index, tmp_path / "t", table, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_cells_are_those_that_a_table_for_spreadsheets_was_made_of(
    index: ShardIndex, tmp_path: Path
) -> None:
    rows = [["image", "name"], [KEYS[0], "=b"], [KEYS[1], "a"], [KEYS[2], "-1.5"]]
    (tmp_path / "t.csv").write_bytes(encode_rows(rows).replace(b",", b";"))
    options = LabelOptions(TableLayout("image", "name"))
    made = import_labels([f"{tmp_path}/t.csv"], index, f"{tmp_path}/out", options)
    assert read_class_names(made.labels) == ["-1.5", "=b", "a"]


@pytest.mark.parametrize("name", ["t.txt", "missing.csv", "t.parquet"])
def test_what_is_no_table(index: ShardIndex, tmp_path: Path, name: str) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).write_text("key,class\n1,2\n")
    with pytest.raises(UserError, match=f"{name}: (cannot be (opened|read)|no table)"):
        import_labels([f"{tmp_path}/{name}"], index, f"{tmp_path}/out")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (pa.array([[1, 0], [], None, [0]]), [["1", "0"], [], [], ["0"]]),
        (pa.array([["b", "a"], ["b"], None, [None, "a"]]), [["b", "a"], ["b"], [], ["a"]]),
        (pa.array([1.0, float("nan"), None, 0.0]), [["1"], [], [], ["0"]]),
        (pa.array(["b", None, "a", "b"]).dictionary_encode(), [["b"], [], ["a"], ["b"]]),
        (pa.array([3, 2, 1, 0], pa.uint8()), [["3"], ["2"], ["1"], ["0"]]),
        (pa.array(["a", "", " b", None], pa.large_string()), [["a"], [], ["b"], []]),
        (pa.array(["1", "1.0", "0.0 ", "0"]), [["1"], ["1"], ["0"], ["0"]]),
        (pa.array([["1.", "0"], ["0.00"], [], None]), [["1", "0"], ["0"], [], []]),
        (pa.array(["a", "7", "7.0", "7.5"]), [["a"], ["7"], ["7"], ["7.5"]]),
    ],
)
def test_parquet_holds_numbers_texts_and_lists(
    index: ShardIndex, tmp_path: Path, classes: pa.Array, expected: list[list[str]]
) -> None:
    parquet.write_table(pa.table({"key": KEYS[:4], "class": classes}), tmp_path / "t.parquet")
    made = import_labels([f"{tmp_path}/t.parquet"], index, f"{tmp_path}/out")
    assert named_lists(made.labels)[:4] == expected
    assert made.labels.meta["rows"] == 4
    for wrong in (pa.array([True] * 4), pa.array([0.5] * 4)):
        parquet.write_table(pa.table({"key": KEYS[:4], "class": wrong}), tmp_path / "t.parquet")
        with pytest.raises(UserError, match=r"t\.parquet: rows 1 to 4: "):
            import_labels([f"{tmp_path}/t.parquet"], index, f"{tmp_path}/other")


def test_a_whole_number_is_one_class_in_whatever_table_it_stands(
    index: ShardIndex, tmp_path: Path
) -> None:
    floats = pa.table({"key": KEYS[:2], "class": [3.0, None]})
    parquet.write_table(floats, tmp_path / "one.parquet")
    (tmp_path / "two.csv").write_text(f"key,class\n{KEYS[1]},3.0\n{KEYS[2]},3\n{KEYS[3]},1.0\n")
    tables = [f"{tmp_path}/one.parquet", f"{tmp_path}/two.csv"]
    made = import_labels(tables, index, f"{tmp_path}/out")
    assert named_lists(made.labels)[:4] == [["3"], ["3"], ["3"], ["1"]]
    (tmp_path / "three.csv").write_text(f"key,class\n{KEYS[1]},-3.0\n")
    with pytest.raises(UserError, match="class '-3' is negative"):
        import_labels([f"{tmp_path}/three.csv"], index, f"{tmp_path}/other")


def test_numbers_of_samples_may_be_floats(index: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("number,class\n1.0,b\n0.0,a\n")
    options = LabelOptions(TableLayout(number="number"))
    made = import_labels([f"{tmp_path}/t.csv"], index, f"{tmp_path}/out", options)
    assert named_lists(made.labels)[:2] == [["a"], ["b"]]


def test_several_tables_compressed_from_a_store(index: ShardIndex, tmp_path: Path) -> None:
    import gzip

    (tmp_path / "in").mkdir()
    one = f"key\tclass\n{KEYS[0]}\ta|b\n{KEYS[1]}\tb\n".encode()
    (tmp_path / "in" / "one.tsv.gz").write_bytes(gzip.compress(one))
    (tmp_path / "in" / "two.csv").write_text(f"class,other,key\n c | a,,{KEYS[1]}\n")
    options = LabelOptions(TableLayout(separator="|"))
    with served(files(tmp_path / "in")) as url:
        tables = [f"{url}/one.tsv.gz", f"{url}/two.csv"]
        made = import_labels(tables, index, f"{tmp_path}/out", options)
    assert named_lists(made.labels)[:3] == [["a", "b"], ["b", "c", "a"], []]
    assert made.labels.meta["tables"] == tables


def test_keys_that_are_not_unique_need_the_tar_as_well(tmp_path: Path) -> None:
    twice = write(tmp_path / "set", [*KEYS[:5], *KEYS[:6], "b", "c"])
    rows = [{"key": "c", "class": "x"}]
    made = make(twice, tmp_path / "fine", rows)  # nobody asks for those that are not
    assert named_lists(made.labels)[12] == ["x"]
    rows = [{"key": KEYS[1], "class": "x"}]
    with pytest.raises(UserError, match=f"two samples have the key '{KEYS[1]}'") as caught:
        make(twice, tmp_path / "t", rows)
    assert f"sample 1 of {twice.url(0)} and sample 1 of {twice.url(2)}" in str(caught.value)
    rows = [{"key": KEYS[1], "class": "x", "tar": "part-000002.tar"}]
    made = make(twice, tmp_path / "t", rows, layout={"shard": "tar"})
    assert [n for n, each in enumerate(lists_of(made.labels)) if each] == [6]


def test_keys_are_those_that_training_reads(tmp_path: Path) -> None:
    """Also long ones, in folders with dots, and beside what a Mac leaves."""
    names = ["a.b/c", "plain", LONG, "é" * 60, "deep/er/x"]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in names:
            beside = f"._{name.rpartition('/')[2]}.jpg"
            images = [(beside, jpeg(1)), (f"{name}.jpg", jpeg(1))]
            add_members(tar, [*images, (f"{name}.cls", b"0")])
    index = index_shards([f"{tmp_path}/t.tar"]).index
    assert read_keys(index, 0, 0, 5) == names
    with served(files(tmp_path)) as url:
        remote = ShardIndex(url, 1, index.shards)
        assert read_keys(remote, 0, 1, 4) == names[1:4]


def test_the_order_in_which_tars_are_read_is_none(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"key": key, "class": text} for text in "ba" for key in KEYS]
    one = make(index, tmp_path / "one", rows)

    def backwards(function, tasks, processes):  # as processes may do
        return [(number, function(task)) for number, task in reversed(list(tasks))]

    monkeypatch.setattr(build, "map_unordered", backwards)
    assert make(index, tmp_path / "two", rows).labels.digest == one.labels.digest
