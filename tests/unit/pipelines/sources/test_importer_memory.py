"""What importers keep of each item before they write: listings and indexes of 10^5 items."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.spec import AbstractFileSystem
from pyarrow import parquet

from pipelines.shards.packing import pack_labels, pack_offsets
from pipelines.sources import convert, image_folder, insightface, recordio, webdataset
from pipelines.sources.image_list import read_list_file
from pipelines.sources.image_table import ListedRow, read_image_table
from pipelines.sources.recordio import Frame, ImageRecord
from pipelines.sources.text_column import TextColumn
from pipelines.sources.webdataset_tar import DEFAULT_LAYOUT, ScanTask
from pipelines.storage.staging import Journal
from pipelines.storage.worker_pool import HERE, no_progress

ITEMS = 100_000
MOST = 64 + 6  # bytes of an item, and 0.6 MB that do not grow with their number
PATH = "n{0:08d}/n{0:08d}_{1:05d}.JPEG"  # of 30 letters, as ImageNet's


def peak(make: Callable[[], Any]) -> float:
    """Bytes of an item at the peak."""
    tracemalloc.start()
    try:
        kept = make()
        assert kept is not None
        return tracemalloc.get_traced_memory()[1] / ITEMS
    finally:
        tracemalloc.stop()


def test_a_listing_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def _listed(root: str) -> Iterator[tuple[str, int]]:
        for number in range(ITEMS):
            yield PATH.format(number // 100, number % 100), 100_000 + number % 999

    monkeypatch.setattr(image_folder, "list_files", _listed)
    convert._order(10, True, "folder")  # imports torch

    def _cut() -> Any:
        found = image_folder._find_images("/photos", None, None)
        new = image_folder._new_dataset("/out", found, image_folder.DEFAULT_OPTIONS)
        return new, new.recipe(), new.cut()

    assert peak(_cut) <= MOST


class MadeUpStore(AbstractFileSystem):  # type: ignore[misc]
    """A store of `ITEMS` files in folders of 100, which keeps its listings as fsspec's do."""

    protocol = "made-up"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        self.dircache[path] = found = self._list(path)
        return found

    def _list(self, path: str) -> list[dict[str, Any]]:
        _, _, folder = path.partition("/")
        if not folder:
            names = (f"root/n{number:08d}" for number in range(ITEMS // 100))
            return [{"name": name, "size": 0, "type": "directory"} for name in names]
        first = 100 * int(folder[1:])
        paths = (PATH.format(number // 100, number % 100) for number in range(first, first + 100))
        return [{"name": f"root/{name}", "size": 1 << 17, "type": "file"} for name in paths]


@pytest.mark.parametrize("listed", [False, True], ids=["all", "of a list"])
def test_a_listing_of_a_store(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the columns of a list, the sizes in the store take 16 bytes a file."""
    fsspec.register_implementation("made-up", MadeUpStore, clobber=True)
    rows = (
        ListedRow(f"row {number}", PATH.format(number // 100, number % 100), str(number % 2), "")
        for number in range(ITEMS)
    )
    monkeypatch.setattr(image_folder, "read_list_file", lambda url: rows)
    lst = "list" if listed else None
    bound = MOST + 16 if listed else MOST
    assert peak(lambda: image_folder._find_images("made-up://root", lst, None)) <= bound


def test_an_index_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        url, size = "train.rec", 1 << 50

    def _frames(reader: Any, offsets: Any) -> Iterator[Frame]:
        for at in offsets:
            yield Frame(int(at), int(at) + 999, ((int(at) + 8, int(at) + 999),))

    def _head(reader: Any, frame: Frame) -> tuple[ImageRecord, int]:
        return ImageRecord([float(frame.start // 100_000)], b""), 900

    lines = (b"%d\t%d" % (number, number * 1000) for number in range(ITEMS))
    monkeypatch.setattr(recordio, "_lines", lambda url: lines)
    monkeypatch.setattr(insightface, "read_indexed_frames", _frames)
    monkeypatch.setattr(insightface, "read_payload_head", _head)

    def _scan() -> Any:
        reader: Any = Reader()
        records = insightface._scan(
            reader, recordio.read_record_index("train.idx"), lambda done, total: None
        )
        return records, insightface.dense_classes(records.column("labels"))

    assert peak(_scan) <= MOST


@pytest.mark.parametrize(
    ("label", "classes", "is_given", "bound"),
    [("{}", 10**8, True, 25), ("{}", 10**8, False, 55), ("person {:08d}", 5_000, False, 35)],
)
def test_labels_of_shuffled_tars(
    label: str,
    classes: int,
    is_given: bool,
    bound: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tar of shuffled samples has about as many different labels as samples: 193 bytes each."""
    rng = np.random.default_rng(0)
    numbers = np.stack([rng.choice(classes, 5_000, replace=False) for _ in range(ITEMS // 5_000)])
    tars = {f"{n:03d}.tar": row.tolist() for n, row in enumerate(numbers)}

    def _scan_tar(task: ScanTask) -> dict[str, Any]:
        row = tars[task.url]
        values = [label.format(number) for number in row]
        codes, blocks = pack_labels(range(len(row))), pack_offsets(range(0, 1, 512))
        about = {"bytes": 1, "checksum": "sha256:", "faults": [], "damage": ""}
        return {"samples": len(row), "values": values, "codes": codes, "blocks": blocks} | about

    monkeypatch.setattr(webdataset, "scan_tar", _scan_tar)
    tasks = [ScanTask(url, DEFAULT_LAYOUT) for url in tars]

    def _index() -> Any:
        journal = Journal(str(tmp_path / "journal"), label)
        results = webdataset._scan_all(tasks, journal, HERE, no_progress)
        return webdataset.number_labels(results, "", classes if is_given else 0)

    assert peak(_index) <= bound


def test_texts_come_back_by_number() -> None:
    rng = np.random.default_rng(0)
    texts = ["", "ä/ö\udcff", *("x" * int(size) + "é" for size in rng.integers(0, 300, 400))]
    column = TextColumn(texts)
    assert list(column) == texts and len(column) == len(texts)
    assert column[-1] == texts[-1] and column[64] == texts[64]
    chosen = rng.permutation(len(texts))[:100]
    assert list(column.choose(chosen)) == [texts[number] for number in chosen]
    with pytest.raises(IndexError):
        column[len(texts)]


@pytest.mark.parametrize("kind", ["lst", "csv", "parquet"])
def test_the_text_of_a_list_is_not_kept(kind: str, tmp_path: Path) -> None:
    paths = [PATH.format(number // 100, number % 100) for number in range(ITEMS)]
    labels = [str(number // 100) for number in range(ITEMS)]
    file = tmp_path / f"images.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table({"path": paths, "class": labels}), file)
        rows = read_image_table(str(file))
    elif kind == "csv":
        lines = (f"{path},{label}\n" for path, label in zip(paths, labels, strict=True))
        file.write_text("path,class\n" + "".join(lines))
        rows = read_image_table(str(file))
    else:
        lines = (f"1\t{path}\t{label}\n" for path, label in zip(paths, labels, strict=True))
        file.write_text("".join(lines))
        rows = read_list_file(str(file))
    count = 0

    def _walk() -> int:
        nonlocal count
        for row, path, label in zip(rows, paths, labels, strict=True):
            count += (row.path, row.label) == (path, label)
        return count

    assert peak(_walk) < 3_500_000 / ITEMS  # a buffer of 1 MiB, and what becomes of one
    assert count == ITEMS
