"""Verification finds every kind of damage, names it, and is silent about good data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.data import verify
from pipelines.data.verify import DataProblem, DatasetReport, find_duplicates, verify_dataset
from pipelines.report.figures import save_figure
from pipelines.report.sheets.sample_sheet import class_names, draw_sample_sheet
from pipelines.report.verification import draw_class_sizes, verification_summary
from pipelines.shards.index import ShardIndex
from pipelines.shards.packing import pack_labels, pack_offsets
from pipelines.shards.shard import Shard
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.storage.staging import Journal
from pipelines.storage.worker_pool import HERE, Processes, Workers
from tests.support.data.images import jpeg
from tests.support.faults import interrupt_at

PER_SHARD, CLASSES = 5, 4


def members(number: int) -> dict[str, bytes]:
    return {"jpg": jpeg(number), "cls": str(number % CLASSES).encode()}


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    with ShardWriter(str(tmp_path / "set"), "x") as writer:
        for shard in range(3):
            numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
            writer.write(Sample(f"k{n:02d}", members(n)) for n in numbers)
        return writer.finish(CLASSES)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar of these has several reads, and a short last one, as large tars have."""
    monkeypatch.setattr(verify, "_SAMPLES_PER_READ", 2)


def read(index: ShardIndex, folder: Path, workers: Workers = HERE) -> DatasetReport:
    journal = Journal(str(folder / "journal"), index.digest)
    report = verify_dataset(index, journal, workers)
    journal.remove()
    return report


def test_good_data_is_good(index: ShardIndex, tmp_path: Path) -> None:
    report = read(index, tmp_path)
    assert report.is_good
    assert report.per_class.tolist() == [4, 4, 4, 3]
    assert (report.problems, report.repeated) == ([], 0)


@pytest.mark.slow
def test_processes_find_what_one_would(index: ShardIndex, tmp_path: Path) -> None:
    one, two = (read(index, tmp_path, Processes(number)) for number in (1, 2))
    assert two.per_class.tolist() == one.per_class.tolist()
    assert two._replace(per_class=0) == one._replace(per_class=0)


def alter(index: ShardIndex, change: Callable[[bytearray], object], shard: int = 1) -> None:
    path = Path(index.url(shard))
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "kinds", "words"),
    [
        (lambda data: data.__setitem__(-1, 1), {"shard": 1}, "its checksum"),
        (lambda data: data.extend(b"x"), {"shard": 1}, "bytes, the index says"),
        (lambda data: data.__delitem__(slice(9000, None)), {"shard": 1, "sample": 2}, "too early"),
        (lambda data: data.__setitem__(600, 255), {"shard": 1}, "its checksum"),
        (lambda data: data.__setitem__(slice(512, 530), bytes(18)), {"shard": 1, "image": 1}, ""),
        (lambda data: data.__setitem__(3, 9), {"shard": 1, "sample": 1}, "not a sample"),
    ],
)
def test_damage_of_a_tar(
    index: ShardIndex,
    tmp_path: Path,
    change: Callable[[bytearray], object],
    kinds: dict[str, int],
    words: str,
) -> None:
    alter(index, change)
    report = read(index, tmp_path)
    assert report.counts == kinds
    assert any(words in problem.reason for problem in report.problems)
    assert all("x-000001.tar" in problem.location for problem in report.problems)


def test_a_missing_tar(index: ShardIndex, tmp_path: Path) -> None:
    Path(index.url(2)).unlink()
    report = read(index, tmp_path)
    assert report.counts == {"shard": 1}
    assert report.problems[0].reason == "is missing"
    assert report.per_class.sum() == 2 * PER_SHARD


@pytest.mark.parametrize(
    ("sample", "kind", "words"),
    [
        ({"jpg": jpeg(0), "cls": b"4"}, "sample", "label 4 is not in [0, 4)"),
        ({"jpg": jpeg(0), "cls": b"-1"}, "sample", "label -1"),
        ({"jpg": jpeg(0), "cls": b"?"}, "sample", "is no number"),
        ({"jpg": jpeg(0)}, "sample", "no label among jpg"),
        ({"cls": b"0"}, "sample", "no image among cls"),
        ({"jpg": jpeg(0)[:-200], "cls": b"0"}, "image", "k00.jpg"),
        ({"png": b"nonsense", "cls": b"0"}, "image", "no image of a known format"),
    ],
)
def test_a_bad_sample_is_named(
    tmp_path: Path, sample: dict[str, bytes], kind: str, words: str
) -> None:
    with ShardWriter(str(tmp_path / "set"), "x") as writer:
        writer.write([Sample("k00", sample), Sample("k01", members(1))])
        report = read(writer.finish(CLASSES), tmp_path)
    assert report.counts == {kind: 1}
    assert (
        words in f"{report.problems[0].location.rpartition(' ')[2][1:-1]}.jpg {report.problems[0]}"
    )
    assert report.per_class.tolist() == [0, 1, 0, 0]


def test_a_label_that_the_index_does_not_share(index: ShardIndex, tmp_path: Path) -> None:
    alter(index, lambda data: data.__setitem__(data.index(b"k06.cls") + 512, ord("3")))
    report = read(index, tmp_path)
    assert report.counts == {"shard": 1, "label": 1}
    assert (report.problems[0].kind, report.problems[0].reason) == ("label", "3, the index says 2")


def test_equal_images_in_two_classes_are_named(tmp_path: Path) -> None:
    numbers = [0, 1, 2, 1, 0, 3]  # images; classes below
    labels = [0, 1, 2, 1, 3, 0]
    with ShardWriter(str(tmp_path / "set"), "x") as writer:
        for first in (0, 3):
            writer.write(
                Sample(f"k{n}", {"jpg": jpeg(numbers[n]), "cls": str(labels[n]).encode()})
                for n in range(first, first + 3)
            )
        report = read(writer.finish(CLASSES), tmp_path)
    assert (report.counts, report.repeated) == ({"duplicate": 1}, 1)
    (problem,) = report.problems
    assert problem.location.endswith("x-000000.tar (k0)")
    assert problem.reason.startswith("class 0; the same in class 3: sample 1 of ")
    assert problem.reason.endswith("x-000001.tar (k4)")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 2)), max_size=12))
def test_duplicates_are_those_of_a_plain_count(rows: list[tuple[int, int]]) -> None:
    digests = np.array([(image // 2, image % 2) for image, _ in rows], "<u8").reshape(-1, 2)
    labels = np.array([label for _, label in rows], np.int64)
    pairs, repeated = find_duplicates(digests, labels)
    usable = Counter(row for row in rows if row[1] >= 0)
    assert repeated == sum(count - 1 for count in usable.values())
    classes = Counter(image for image, _ in usable)
    assert len(pairs) == sum(count - 1 for count in classes.values())
    for one, other in pairs.tolist():
        assert rows[one][0] == rows[other][0]
        assert rows[one][1] != rows[other][1]


def test_an_interrupted_verification_goes_on(index: ShardIndex, tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal"), index.digest)
    with pytest.raises(KeyboardInterrupt):
        verify_dataset(index, journal, progress=interrupt_at(2))
    seen: list[int] = []
    again = Journal(str(tmp_path / "journal"), index.digest)
    report = verify_dataset(index, again, progress=lambda done, _: seen.append(done))
    assert seen == [2, 3]
    assert report.is_good


def test_the_report_is_json_and_a_picture(index: ShardIndex, tmp_path: Path) -> None:
    alter(index, lambda data: data.extend(b"x"))
    report = read(index, tmp_path)
    content = json.loads(json.dumps(verification_summary(report)))
    assert (content["good"], content["problems"]) == (False, {"shard": 1})
    assert content["named"][0]["kind"] == "shard"
    assert content["images_per_class"] == {
        **{"classes_without_images": 0, "classes_with_one_image": 0},
        **{"fewest": 3, "median": 4.0, "mean": 3.75, "most": 4},
    }
    draw_class_sizes(report.per_class, str(tmp_path / "plot.png"))
    wide = report._replace(per_class=np.array([0, 1, 2, 500, 90]))
    draw_class_sizes(wide.per_class, "memory://plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_sheet_shows_what_cannot_be_read_too(index: ShardIndex, tmp_path: Path) -> None:
    alter(index, lambda data: data.__setitem__(slice(0, 9000), bytes(9000)))
    figure = draw_sample_sheet(index, rows=3, columns=3)
    save_figure(figure, str(tmp_path / "sheet.png"))
    picture = (tmp_path / "sheet.png").read_bytes()
    save_figure(draw_sample_sheet(index, rows=3, columns=3), str(tmp_path / "again.png"))
    assert (tmp_path / "again.png").read_bytes() == picture
    assert draw_sample_sheet(index, rows=99, columns=99).texts
    older = ShardIndex(index.folder, CLASSES, [replace(s, classes="") for s in index.shards])
    assert draw_sample_sheet(older, rows=3, columns=3).texts


def test_the_sheet_names_classes(index: ShardIndex) -> None:
    path = Path(index.folder, "classes.tsv")
    path.write_text("class\tsamples\tname\n0\t1\tcat\n1\t2\t山\n2\t1\t" + "x" * 60 + "\n3\t1\t$d\n")
    named = ShardIndex(index.folder, CLASSES, index.shards, {"class_names": "classes.tsv"})
    names = class_names(named, [0, 1, 2, 3])
    assert names == ["cat", "\\u5c71", "x" * 27 + "~", "$d"]
    assert class_names(index, [3]) == [""]


def test_a_damaged_column_is_a_finding(index: ShardIndex, tmp_path: Path) -> None:
    path = Path(index.folder, "labels.npy")
    before = path.read_bytes()
    path.write_bytes(before[:-1] + b"\x7f")
    report = read(ShardIndex.load(index.folder), tmp_path)
    assert report.counts["column"] == 1
    assert DataProblem("column", str(path), "is damaged") in report.problems


@pytest.mark.parametrize("label", [2**24, CLASSES, -7])
def test_a_label_that_no_class_has_is_a_finding(
    index: ShardIndex, tmp_path: Path, label: int
) -> None:
    """It took memory for as many classes as that, or ended in a traceback, after all was read."""
    first, *others = index.shards
    labels = [int(each) for each in first.labels]
    labels[1] = label
    changed = Shard(
        *(first.url, first.samples, first.bytes, first.checksum),
        *(pack_offsets(first.offsets), pack_labels(labels)),
    )
    theirs = {"fields": {"image": ["jpg"], "label": "cls"}}
    report = read(replace(index, shards=[changed, *others], meta=theirs), tmp_path)
    assert report.counts["label"] == 1
    assert [each.reason for each in report.problems if each.kind == "label"] == [
        f"{label} is not in [0, {CLASSES})"
    ]
    assert report.per_class.tolist() == [4, 3, 4, 3]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 12000), st.integers(0, 255)), max_size=5),
    st.integers(0, 13000),
)
def test_any_damage_is_a_report(
    index: ShardIndex, tmp_path: Path, changes: list[tuple[int, int]], length: int
) -> None:
    before = Path(index.url(1)).read_bytes()
    data = bytearray(before[:length])
    for position, value in changes:
        data[position : position + 1] = bytes([value])
    try:
        Path(index.url(1)).write_bytes(data)
        report = read(index, tmp_path)
        assert report.is_good == (bytes(data) == before)
        assert report.per_class.sum() >= 2 * PER_SHARD
    finally:
        Path(index.url(1)).write_bytes(before)
