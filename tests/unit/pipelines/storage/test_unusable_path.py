"""What is said of a path that the system refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mhe_dist.errors import UserError
from pipelines.storage.unusable_path import (
    describe_unusable_path,
    explain_fault,
    require_usable,
)
from pipelines.storage.urls import RangeReader, atomic_write


def test_nothing_can_be_made_below_proc() -> None:
    """The file is named as the user named it, not as it is called while it is written."""
    with pytest.raises(OSError) as caught, atomic_write("/proc/page.html"):
        pass
    assert describe_unusable_path(caught.value) == (
        "/proc/page.html: is not there, and nothing can be made below /proc/; give another path"
    )
    with pytest.raises(OSError) as caught:
        os.makedirs("/proc/made")
    assert "/proc/made: is not there" in describe_unusable_path(caught.value)


def test_a_file_that_cannot_be_opened_is_told_without_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        RangeReader(f"{tmp_path}/lfw.bin")
    assert str(caught.value) == f"{tmp_path}/lfw.bin: cannot be opened: there is no such file"
    with pytest.raises(UserError, match=r"cannot be opened: a folder stands where a file"):
        RangeReader(str(tmp_path))
    assert explain_fault(OSError()) == "OSError"
    assert explain_fault(TypeError("no size")) == "no size"


def test_a_missing_file_elsewhere_is_told_by_who_opens_it() -> None:
    assert describe_unusable_path(FileNotFoundError(errno.ENOENT, "no such file", "a/b")) == ""


def test_a_file_that_is_being_made_is_named_as_it_will_be() -> None:
    name = f"a/.b.png.{'0' * 32}.tmp"
    said = describe_unusable_path(PermissionError(errno.EACCES, "denied", name))
    assert said.startswith("a/b.png: may not be read or written")


def said_of(path: str, is_folder: bool) -> str:
    try:
        require_usable(path, is_folder)
    except OSError as error:
        return describe_unusable_path(error)
    return ""


def test_what_cannot_be_written_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in ("new", "folder", "folder/", "folder/a/b", f"{tmp_path}/a/b", "s3://b/file/c", ""):
        assert said_of(path, is_folder=True) == "", path
    for path in ("new.json", "file", "folder/a.json", f"{tmp_path}/a/b.json"):
        assert said_of(path, is_folder=False) == "", path
    for path in ("file", "file/a", "file/a/b"):
        assert said_of(path, is_folder=True).startswith("file: a file stands where a folder")
    assert said_of("file/a.json", is_folder=False).startswith("file: a file stands where a folder")
    assert said_of("folder", is_folder=False).startswith("folder: a folder stands where a file")
    assert "/proc/a/b: is not there" in said_of("/proc/a/b", is_folder=True)
    assert "the name is too long" in said_of(f"folder/{'a' * 300}", is_folder=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != "folder")
    assert said_of("folder/a", is_folder=True).startswith("folder: may not be read or written")
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith("n")] == []
