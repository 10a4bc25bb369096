"""Folders of images become shards: by their folders, or by a list in either dialect."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mhe_dist.errors import RunError, UserError
from pipelines.shards import writer
from pipelines.sources.convert import ImportOptions
from pipelines.sources.image_folder import import_folder, parse_list_line, path_below_root
from tests.recordio_files import content, jpeg


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), 7).save(stream, "png")
    return stream.getvalue()


FILES = {
    "cat/a.jpg": jpeg(0),
    "cat/deep/b.JPEG": jpeg(1),
    "ant/x[1].v2.png": png(),
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


@given(st.text(alphabet="0123456789.e+-\t/ab", max_size=30))
def test_any_line_is_read_or_refused(line: str) -> None:
    try:
        label, path = parse_list_line(line)
    except ValueError:
        return
    assert label >= 0
    assert path in line.split("\t")


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
    out, options = tmp_path / "out", ImportOptions(shard_bytes=1, processes=1, max_bad=1)
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
        import_folder(str(root), str(tmp_path / "out"), options=ImportOptions(processes=1))
