"""Writers and readers that take local paths alone, and folders in stores."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest

from mhe_dist.errors import RunError
from pipelines.storage.urls import local_copies, staged_folder


@pytest.fixture
def store() -> str:
    """URL of a folder of its own, in memory."""
    return f"memory://{uuid.uuid4().hex}/export"


def contents(url: str) -> dict[str, bytes]:
    filesystem, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{path}/"): filesystem.cat(name) for name in filesystem.find(path)}


def test_a_folder_of_this_machine_is_written_in_place(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/export", f"file://{tmp_path}/export", "export"):
        with staged_folder(url) as folder:
            assert folder == url.removeprefix("file://")
        with local_copies() as copied:
            assert copied(f"{url}/a") == f"{folder}/a"


def test_what_is_written_arrives_in_a_store(store: str) -> None:
    for content, names in ((b"old", ("timm/kept", "mlflow/gone", "hub/kept")), (b"new", ())):
        with staged_folder(store, replaced=["mlflow", "hub"]) as folder:
            for name in ("a.onnx", "timm/model", "mlflow/data/deep", *names):
                Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, name).write_bytes(content)
    assert not Path(folder).exists()
    assert contents(store) == {
        "a.onnx": b"new",
        "timm/model": b"new",
        "timm/kept": b"old",
        "mlflow/data/deep": b"new",
        "hub/kept": b"old",
    }


def test_nothing_is_sent_of_what_failed(store: str) -> None:
    with pytest.raises(RunError, match=f"^{store}/a: differs$"), staged_folder(store) as folder:
        Path(folder, "a").touch()
        raise RunError(f"{folder}/a: differs")
    assert contents(store) == {}


def test_copies_of_files_and_folders_last_as_long_as_the_block(store: str) -> None:
    with staged_folder(store) as folder:
        Path(folder, "sub").mkdir()
        Path(folder, "a").write_text("1")
        Path(folder, "sub", "a").write_text("2")
    with local_copies() as copied:
        file, deep, whole = (Path(copied(f"{store}{name}")) for name in ("/a", "/sub/a", ""))
        assert (file.name, file.read_text()) == ("a", "1")
        assert (deep.name, deep.read_text()) == ("a", "2")
        assert (whole / "sub" / "a").read_text() == "2"
    assert not file.exists()
