"""A file appears as a whole or not at all, and nothing else is left in its folder."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mhe_dist.atomic_file import replaced_file, write_file
from mhe_dist.errors import StorageUnavailable


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_refuses_it_keeps_what_was_there(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "made" / "state.json"
    write_file(str(file), "before")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, refuse)
        with pytest.raises(OSError, match="No space left"):
            write_file(str(file), "after")
    assert file.read_text() == "before"
    assert os.listdir(file.parent) == ["state.json"]
    write_file(f"file://{file}", "äfter")
    assert file.read_bytes() == "äfter".encode()


def test_nothing_is_left_of_a_writer_that_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replaced_file(f"{tmp_path}/a.onnx", ".pt2") as name:
        Path(name).write_text("half")
        assert os.path.dirname(name) == str(tmp_path) and name.endswith(".pt2")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("prompt_retries")
def test_a_store_that_fails_for_a_moment_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = MemoryFileSystem.pipe_file, [TimeoutError(), ConnectionResetError()]

    def failing(self: MemoryFileSystem, path: str, value: bytes) -> None:
        if left:
            raise left.pop()
        real(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", failing)
    write_file("memory://atomic/state.json", b"whole")
    assert fsspec.filesystem("memory").cat_file("/atomic/state.json") == b"whole"
    left += [TimeoutError("slow") for _ in range(99)]
    with pytest.raises(StorageUnavailable, match=r"memory://atomic/state\.json.*TimeoutError"):
        write_file("memory://atomic/state.json", b"lost")
