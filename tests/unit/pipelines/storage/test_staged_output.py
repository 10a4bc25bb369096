"""Writers and readers that take local paths alone, and places that are paths or URLs."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest

from mhe_dist.errors import RunError
from pipelines.storage.staging import staged_output
from pipelines.storage.urls import local_copies


@pytest.fixture
def store() -> str:
    """URL of a folder of its own, in memory."""
    return f"memory://{uuid.uuid4().hex}/export"


@pytest.fixture(params=["store", "path", "file URL", "relative path"])
def folder(
    request: pytest.FixtureRequest, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A folder that there is not yet, by each kind of URL."""
    monkeypatch.chdir(tmp_path)
    here = f"{tmp_path}/export"
    kinds = {"store": store, "path": here, "file URL": f"file://{here}", "relative path": "export"}
    return kinds[request.param]


def contents(url: str) -> dict[str, bytes]:
    filesystem, path = fsspec.core.url_to_fs(url)
    found = filesystem.find(path)
    return {name.removeprefix(f"{path}/"): filesystem.cat_file(name) for name in found}


def write(folder: str, name: str, files: dict[str, bytes], whole: bool = False) -> None:
    """Stage a folder with some files, or a file, whose name is empty."""
    with staged_output(folder, name, whole) as path:
        for file, content in files.items():
            target = Path(path, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def test_what_is_written_arrives_and_other_files_stay(folder: str) -> None:
    write(folder, "mine", {"": b"mine"})
    for content, extra in ((b"old", True), (b"new", False)):
        write(folder, "a.onnx", {"": content})
        more = {"kept": content} if extra else {}
        write(folder, "timm", {"model": content, "deep/data": content, **more})
    assert contents(folder) == {
        "mine": b"mine",
        "a.onnx": b"new",
        "timm/model": b"new",
        "timm/deep/data": b"new",
        "timm/kept": b"old",
    }


def test_nothing_of_before_stays_in_a_folder_that_is_replaced_as_a_whole(folder: str) -> None:
    write(folder, "hub", {"kept": b"old", "onnx/gone": b"old"}, whole=True)
    write(folder, "hub", {"kept": b"new", "onnx/other": b"new"}, whole=True)
    assert contents(folder) == {"hub/kept": b"new", "hub/onnx/other": b"new"}


@pytest.mark.parametrize("whole", [False, True])
def test_what_fails_changes_nothing(folder: str, whole: bool) -> None:
    write(folder, "hub", {"a": b"old"})
    with (
        pytest.raises(RunError, match=f"^{folder}/hub/a: differs$"),
        staged_output(folder, "hub", whole) as path,
    ):
        Path(path).mkdir()
        Path(path, "a").write_text("new")
        raise RunError(f"{path}/a: differs")
    assert contents(folder) == {"hub/a": b"old"}


def test_it_is_made_beside_its_place(tmp_path: Path) -> None:
    """Not on another disk, which may have no room for it, and from which it had to be copied."""
    with staged_output(f"{tmp_path}/export", "a.onnx") as path:
        assert Path(path).parent.parent == tmp_path / "export"
        Path(path).touch()


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    script = (
        "import os, sys\n"
        "from pipelines.storage.staging import staged_output\n"
        "with staged_output(sys.argv[1], 'a') as path:\n"
        "    open(path, 'w').write('new')\n"
        "    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with staged_output(str(tmp_path), "a") as first:
        write(str(tmp_path), "b", {"": b"another at the same time"})
        Path(first).write_text("new")
    assert contents(str(tmp_path)) == {"a": b"new", "b": b"another at the same time"}


def test_copies_of_files_and_folders_last_as_long_as_the_block(store: str) -> None:
    write(store, "a", {"": b"1"})
    write(store, "sub", {"a": b"2"})
    with local_copies() as copied:
        file, deep, whole = (Path(copied(f"{store}{name}")) for name in ("/a", "/sub/a", ""))
        assert (file.name, file.read_text()) == ("a", "1")
        assert (deep.name, deep.read_text()) == ("a", "2")
        assert (whole / "sub" / "a").read_text() == "2"
    assert not file.exists()


def test_what_lies_on_this_machine_is_not_copied(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/export", f"file://{tmp_path}/export", "export"):
        with local_copies() as copied:
            assert copied(f"{url}/a") == f"{url.removeprefix('file://')}/a"


BROKEN_OFF = """
import os, sys
from pathlib import Path
from pipelines.storage.staging import staged_output

def end(*_):
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    raise {"interrupted": KeyboardInterrupt, "refused": OSError}[sys.argv[2]]

Path.replace = end
with staged_output(sys.argv[1], "hub", whole=True) as path:
    Path(path).mkdir()
    Path(path, "a").write_text("new")
"""


@pytest.mark.parametrize("how", ["killed", "interrupted", "refused"])
def test_what_is_broken_off_between_two_renames_leaves_what_was_there(
    how: str, tmp_path: Path
) -> None:
    """It had no name then, and went with the hidden folder."""
    write(str(tmp_path), "hub", {"a": b"old", "deep/b": b"old"})
    command = [sys.executable, "-c", BROKEN_OFF, str(tmp_path), how]
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    assert (tmp_path / "hub").exists() == (how != "killed")
    write(str(tmp_path), "other", {"": b"of the next command"})
    expected = {"hub/a": b"old", "hub/deep/b": b"old", "other": b"of the next command"}
    assert contents(str(tmp_path)) == expected
    assert len(list(tmp_path.iterdir())) == 2
