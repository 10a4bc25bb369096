"""Folders of images become shards: by their folders, or by a list in either dialect."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from mhe_dist.config.data import DataConfig
from mhe_dist.errors import RunError, UserError
from pipelines.data.mixture.index import open_training_index
from pipelines.shards import writer
from pipelines.sources.convert import ImportOptions, ImportResult
from pipelines.sources.heldout_split import HeldoutSplit
from pipelines.sources.image_folder import (
    import_folder,
    import_split_folder,
    path_below_root,
)
from tests.support.data.images import encoded, jpeg
from tests.support.data.recordio_files import content
from tests.support.servers.stores import Faulty, files, served

PNG = encoded(Image.new("L", (4, 4), 7), "png")
FILES = {
    "cat/a.jpg": jpeg(0),
    "cat/deep/b.JPEG": jpeg(1),
    "ant/x[1].v2.png": PNG,
    "zürich/a.jpg": jpeg(2),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "root"


def labels_of(out: Path | str) -> dict[bytes, int]:
    return {image: label for label, image, _ in content(str(out)).values()}


def test_one_class_is_refused(root: Path, tmp_path: Path) -> None:
    """Often the folder above the right one was named."""
    out = str(tmp_path / "out")
    above = str(root.parent)
    words = f"{above}: its images are all of one class, 'root', .* needs two; name the folder that"
    for refuse in (
        lambda: import_folder(above, out),
        lambda: import_split_folder(above, out, HeldoutSplit(images=2)),
    ):
        with pytest.raises(UserError, match=words):
            refuse()
    (tmp_path / "a.csv").write_text("path,class\ncat/a.jpg,x\nant/x[1].v2.png,x\n")
    with pytest.raises(UserError, match=r"a\.csv: its images are all of one class, 'x'"):
        import_folder(str(root), out, table=str(tmp_path / "a.csv"))
    assert not Path(out).exists()
    assert import_folder(above, out, classless=True).index.samples == len(FILES)


def test_a_folder_is_a_class(root: Path, tmp_path: Path) -> None:
    made = import_folder(str(root), str(tmp_path / "out"))
    classes = {"ant": 0, "cat": 1, "zürich": 2}
    assert labels_of(tmp_path / "out") == {
        data: classes[name.split("/")[0]] for name, data in FILES.items()
    }
    assert (made.faults, made.warnings) == ([], [])
    assert (tmp_path / "out" / "classes.tsv").read_text() == (
        "class\tsamples\tname\n0\t1\tant\n1\t2\tcat\n2\t1\tzürich\n"
    )


def test_every_sample_can_be_traced_to_its_file(root: Path, tmp_path: Path) -> None:
    import_folder(str(root), str(tmp_path / "out"))
    lines = (tmp_path / "out" / "files.tsv").read_text().splitlines()
    rows = dict(line.split("\t") for line in lines[1:])
    assert lines[0] == "key\tpath"
    assert {rows[key]: image for key, (_, image, _) in content(str(tmp_path / "out")).items()} == (
        FILES
    )


def test_what_is_no_image_is_told_and_left_out(root: Path, tmp_path: Path) -> None:
    for name in ("cat/notes.txt", "top.jpg", ".git/a.jpg", "cat/.a.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(jpeg(9))
    (root / "empty").mkdir()
    made = import_folder(str(root), str(tmp_path / "out"))
    assert made.index.samples == len(FILES)
    assert made.index.num_classes == 3
    assert made.warnings == [
        "1 images are in no class folder; left out",
        "1 files do not end like an image; left out",
    ]


def test_links_are_followed_but_not_in_circles(root: Path, tmp_path: Path) -> None:
    (root / "cat" / "again").symlink_to(root)
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.jpg").write_bytes(jpeg(5))
    (root / "dog" / "broken.jpg").symlink_to("nowhere.jpg")
    made = import_folder(str(root), str(tmp_path / "out"))
    assert made.index.samples == len(FILES) + 1


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_an_image_that_is_cut_off_is_bad(root: Path, tmp_path: Path, kind: str) -> None:
    """As it is for training and for `mhe embed`, though its first bytes are those of an image."""
    whole = jpeg(9, side=64) if kind == "jpeg" else PNG
    (root / "cat" / f"short.{kind}").write_bytes(whole[: len(whole) * 2 // 3])
    made = import_folder(str(root), str(tmp_path / "out"), options=ImportOptions(max_bad=0.2))
    assert [fault.location for fault in made.faults] == [f"{root}/cat/short.{kind}"]
    assert made.index.samples == len(FILES)


def write_table(path: Path, rows: list[tuple[str, object]]) -> str:
    """CSV with a column too many and a separator of Excel's, or Parquet; by the name."""
    if path.suffix == ".csv":
        lines = [f"{number};{name};{label}" for number, (name, label) in enumerate(rows)]
        path.write_text("\n".join(["\ufeffnumber;path;class", *lines, ""]))
    else:
        columns = {"class": [label for _, label in rows], "path": [name for name, _ in rows]}
        parquet.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("ten", "two", "ten"), ["ten", "two"]),
        ((10, 9, 10), ["9", "10"]),
        ((10.0, 9.0, 10.0), ["9", "10"]),
    ],
)
def test_a_table_names_files_and_classes(
    root: Path, tmp_path: Path, kind: str, labels: tuple[object, ...], names: list[str]
) -> None:
    paths = ["cat/a.jpg", "cat/deep/b.JPEG", "zürich/a.jpg"]
    rows = [*zip(paths, labels, strict=True), ("gone.jpg", "ten" if "ten" in names else 10)]
    table = write_table(tmp_path / f"t.{kind}", rows)
    made = import_folder(
        str(root), str(tmp_path / "out"), table=table, options=ImportOptions(max_bad=0.5)
    )
    assert labels_of(tmp_path / "out") == {
        FILES[path]: names.index(str(label).removesuffix(".0"))
        for path, label in zip(paths, labels, strict=True)
    }
    (fault,) = made.faults
    assert fault.location == f"{table} {'line 5' if kind == 'csv' else 'row 4'}"
    assert "gone.jpg" in fault.reason


def test_a_whole_number_is_one_class_however_a_table_has_it(root: Path, tmp_path: Path) -> None:
    rows = [("cat/a.jpg", "3"), ("cat/deep/b.JPEG", "3.0"), ("zürich/a.jpg", "7.")]
    table = write_table(tmp_path / "t.csv", rows)
    import_folder(str(root), str(tmp_path / "out"), table=table)
    assert labels_of(tmp_path / "out") == {
        FILES[path]: int(label[0] == "7") for path, label in rows
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"path,label\na.jpg,1\n", "has no column 'class' among path, label"),
        (b"", "has no column 'path' among none"),
        (b"\xff\xfe\x00", "is no CSV file in UTF-8"),
        (b"PAR1 and no more", "not a Parquet file that can be read"),
    ],
)
def test_what_is_no_such_table_is_a_mistake(
    root: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "table").write_bytes(content)
    with pytest.raises(UserError, match=words):
        import_folder(str(root), str(tmp_path / "out"), table=str(tmp_path / "table"))


def test_rows_without_a_class_are_bad(root: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,class\ncat/a.jpg,\n,7\ncat/deep/b.JPEG,7\n")
    table, options = str(tmp_path / "t.csv"), ImportOptions(max_bad=1)
    made = import_folder(str(root), str(tmp_path / "out"), table=table, options=options)
    assert [fault.reason for fault in made.faults] == [
        "no class in this row",
        "no path in this row",
    ]


def test_images_without_class_folders(tmp_path: Path) -> None:
    (tmp_path / "root" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "deep/b.jpg", "c.jpg")):
        (tmp_path / "root" / name).write_bytes(jpeg(number))
    root, out = str(tmp_path / "root"), str(tmp_path / "out")
    made = import_folder(root, out, classless=True)
    assert (made.index.samples, made.index.num_classes) == (3, 1)
    with pytest.raises(UserError, match=r"in no class .* not trained on"):
        open_training_index(DataConfig(shards=out), seed=0)
    for name in ("deep/b.jpg", "deep"):
        path = tmp_path / "root" / name
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"2 images lie in no class folder; .*--no-classes"):
        import_folder(root, str(tmp_path / "other"))


def many_images(root: Path, counts: dict[str, int]) -> str:
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number}.jpg").write_bytes(jpeg(100 * seed + number))
    return str(root)


COUNTS = {"a": 1, "b": 3, "c": 4, "d": 2, "e": 5}


def names_of(made: ImportResult) -> list[str]:
    lines = Path(made.index.folder, "classes.tsv").read_text().splitlines()
    return [line.split("\t")[2] for line in lines[1:]]


def labels_in_order(made: ImportResult) -> list[int]:
    return [int(shard.label(n) or 0) for shard in made.index.shards for n in range(shard.samples)]


def test_whole_classes_are_held_out(tmp_path: Path) -> None:
    root = many_images(tmp_path / "root", COUNTS)
    made = import_split_folder(root, str(tmp_path / "out"), HeldoutSplit(classes=2))
    held, kept = made
    assert [Path(each.index.folder).name for each in made] == ["heldout", "train"]
    assert sorted([*names_of(held), *names_of(kept)]) == sorted(COUNTS)
    assert held.index.samples == sum(COUNTS[name] for name in names_of(held))
    assert all(COUNTS[name] > 1 for name in names_of(held))
    assert labels_in_order(held) == sorted(labels_in_order(held)), "class by class"
    again = import_split_folder(root, str(tmp_path / "again"), HeldoutSplit(classes=2))
    assert [each.index.digest for each in again] == [each.index.digest for each in made]


def test_images_of_every_class_are_held_out_under_the_same_ids(tmp_path: Path) -> None:
    root = many_images(tmp_path / "root", COUNTS)
    held, kept = import_split_folder(root, str(tmp_path / "out"), HeldoutSplit(images=2))
    assert names_of(held) == names_of(kept) == sorted(COUNTS)
    assert labels_in_order(held) == [1, 1, 2, 2, 4, 4]
    assert sorted(labels_in_order(kept)) == [0, 1, 2, 2, 3, 3, 4, 4, 4]
    images = [labels_of(each.index.folder) for each in (held, kept)]
    assert not set(images[0]) & set(images[1])


def test_what_is_held_out_stays_when_a_folder_grows(tmp_path: Path) -> None:
    root = many_images(tmp_path / "root", COUNTS)
    held, _ = import_split_folder(root, str(tmp_path / "out"), HeldoutSplit(images=2))
    before = labels_of(held.index.folder)
    many_images(tmp_path / "root", {"z": 3})
    held, _ = import_split_folder(root, str(tmp_path / "more"), HeldoutSplit(images=2))
    assert set(before) <= set(labels_of(held.index.folder))


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (HeldoutSplit(classes=4), "5 classes, 4 of them with two images or more, and 2 must"),
        (HeldoutSplit(images=5), "the largest class has 5 images"),
    ],
)
def test_more_cannot_be_held_out_than_there_is(
    tmp_path: Path, split: HeldoutSplit, words: str
) -> None:
    root = many_images(tmp_path / "root", COUNTS)
    with pytest.raises(UserError, match=words):
        import_split_folder(root, str(tmp_path / "out"), split)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named_and_bounded(root: Path, tmp_path: Path) -> None:
    (root / "cat" / "bad.jpg").write_bytes(b"GARBAGE!")
    with pytest.raises(RunError, match=r"1 of 5 samples are bad(?s:.*)cat/bad\.jpg: no image"):
        import_folder(str(root), str(tmp_path / "out"))
    made = import_folder(str(root), str(tmp_path / "out"), options=ImportOptions(max_bad=0.2))
    assert len(made.faults) == 1
    assert "cat/bad.jpg" in (tmp_path / "out" / "skipped.tsv").read_text()


LISTS = {
    "im2rec": "0\t7\tcat/a.jpg\n2\t7.000000\tcat/deep/b.JPEG\r\n5\t3\t0.5\tant/x[1].v2.png\n",
    "aligned": "1\tcat/a.jpg\t7\n0\tcat/deep/b.JPEG\t7\t1\t2.5\n1\tROOT/ant/x[1].v2.png\t3\n",
}


@pytest.mark.parametrize("dialect", LISTS)
def test_both_dialects_of_lists(root: Path, tmp_path: Path, dialect: str) -> None:
    lst = tmp_path / "train.lst"
    lst.write_text(LISTS[dialect].replace("ROOT", str(root)))
    import_folder(str(root), str(tmp_path / "out"), str(lst))
    assert labels_of(tmp_path / "out") == {
        FILES["cat/a.jpg"]: 1,
        FILES["cat/deep/b.JPEG"]: 1,
        FILES["ant/x[1].v2.png"]: 0,
    }
    assert "0\t1\t3\n1\t2\t7\n" in (tmp_path / "out" / "classes.tsv").read_text()


def test_large_labels_are_exact_and_sorted_as_numbers(root: Path, tmp_path: Path) -> None:
    lst = tmp_path / "train.lst"
    lst.write_text("0\t90071992547409930\tcat/a.jpg\n1\t90071992547409931\tcat/deep/b.JPEG\n")
    import_folder(str(root), str(tmp_path / "out"), str(lst))
    assert sorted(labels_of(tmp_path / "out").values()) == [0, 1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0\t1\t../secret.jpg", "leaves the folder"),
        ("0\t1\tcat/../../secret.jpg", "leaves the folder"),
        ("0\t1\t/etc/passwd", "leaves the folder"),
        ("0\t1\tcat/\0a.jpg", "leaves the folder"),
        ("0\t1\tcat/none.jpg", "No such file"),
        ("0\t1\t" + "x" * 5000, "File name too long"),
        ("0\t-1\tcat/a.jpg", "label -1 is no class"),
        ("0\t0.5\tcat/a.jpg", "label 0.5 is no class"),
        ("0\t1e99\tcat/a.jpg", "label 1e99 is no class"),
        ("0\t1\t2", "is neither"),
        ("cat/a.jpg", "is neither"),
        ("2\tcat/a.jpg\t1", "is neither"),
        ("0 1 cat/a.jpg", "is neither"),
    ],
)
def test_a_bad_line_is_counted(root: Path, tmp_path: Path, line: str, words: str) -> None:
    lst = tmp_path / "train.lst"
    lst.write_bytes(b"0\t1\tcat/a.jpg\n\n" + line.encode() + b"\n")
    made = import_folder(str(root), str(tmp_path / "out"), str(lst), ImportOptions(max_bad=0.5))
    assert made.index.samples == 1
    assert made.faults[0].location == f"{lst} line 3"
    assert words in made.faults[0].reason


@given(st.text(max_size=40))
def test_any_path_stays_inside_or_is_refused(name: str) -> None:
    try:
        path = path_below_root(name, "/data/root")
    except ValueError:
        return
    assert Path("/data/root", path).is_relative_to("/data/root")
    assert ".." not in path.split("/")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.integers(0, 60))
def test_a_damaged_list_gives_errors_or_true_labels(
    root: Path, tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    text = b"0\t3\tcat/a.jpg\n1\t5\tant/x[1].v2.png\n2\t3\tcat/deep/b.JPEG\n"
    (folder / "a.lst").write_bytes(text[:at] + data + text[at:])
    try:
        made = import_folder(
            str(root), str(folder / "out"), str(folder / "a.lst"), ImportOptions(max_bad=1)
        )
    except UserError:
        return
    found = labels_of(folder / "out")
    assert set(found) <= set(FILES.values())
    assert 1 <= len(found) <= made.index.samples


@pytest.mark.parametrize("lst", [None, "memory://store/train.lst"])
def test_folders_behind_urls(lst: str | None) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/store/root/{name}": data for name, data in FILES.items()})
    filesystem.pipe("/store/train.lst", b"0\t4\tcat/a.jpg\n1\t6\tant/x[1].v2.png\n2\t6\tgone.jpg\n")
    out = f"memory://store/out{bool(lst)}"
    made = import_folder("memory://store/root", out, lst, ImportOptions(max_bad=0.5))
    assert made.index.samples == (2 if lst else len(FILES))
    assert labels_of(out)[FILES["ant/x[1].v2.png"]] == (1 if lst else 0)
    assert [fault.reason for fault in made.faults] == (["gone.jpg: no such file"] if lst else [])


def test_a_missing_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        import_folder(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="name the files by --lst"):
        import_folder("http://127.0.0.1:9/root", str(tmp_path / "out"))
    with pytest.raises(UserError, match="no image here"):
        import_folder(str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "your quota")]
)
def test_a_full_disk_says_what_is_missing_and_that_it_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    out, options = tmp_path / "out", ImportOptions(shard_bytes=1, max_bad=1)
    whole = import_folder(str(root), str(tmp_path / "whole"), options=options)
    assert len(whole.index.shards) > 1
    write, written = writer._write_tar, []

    def fill_up(*arguments: Any) -> Any:
        if written:
            raise OSError(number, os.strerror(number))
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(writer, "_write_tar", fill_up)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(RunError) as failed:
        import_folder(str(root), str(out), options=options)
    said = str(failed.value)
    for part in (f"{out}: {words}", "1 MiB are still to be written", "0 MiB are free"):
        assert part in said
    assert "1 MiB are missing" in said and "the same command goes on" in said
    monkeypatch.setattr(writer, "_write_tar", write)
    made = import_folder(str(root), str(out), options=options)
    assert made.index.samples == whole.index.samples


def test_other_trouble_of_a_disk_stays_what_it_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(writer, "_write_tar", fail)
    with pytest.raises(OSError, match="input/output error"):
        import_folder(str(root), str(tmp_path / "out"), options=ImportOptions())


def test_a_server_that_is_busy_now_and_then_is_asked_again_and_its_password_kept(
    root: Path, tmp_path: Path
) -> None:
    rows = "".join(f"0\t{n}\t{name}\n" for n, name in enumerate([*FILES, "gone.jpg"]))
    (root / "a.lst").write_text(rows)
    with served(Faulty(files(root), share=0.5, seed=3)) as url:
        own = url.replace("http://", "http://me:planted@")
        options = ImportOptions(max_bad=0.5)
        made = import_folder(own, str(tmp_path / "out"), str(root / "a.lst"), options)
    assert set(labels_of(tmp_path / "out")) == set(FILES.values())
    assert len(made.faults) == 1 and "gone.jpg" in made.faults[0].location
    for file in (tmp_path / "out").iterdir():
        assert b"planted" not in file.read_bytes(), file.name
