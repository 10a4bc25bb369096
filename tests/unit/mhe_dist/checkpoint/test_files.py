"""A checkpoint in a store that fails for the moment is not passed over."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gcsfs.retry import HttpError

from mhe_dist.checkpoint.files import CheckpointFolder, FileEntry

DATA = bytes(range(256)) * 10
ENTRY = FileEntry(len(DATA), f"{zlib.crc32(DATA):08x}")


def written(url: str) -> CheckpointFolder:
    """A complete checkpoint of one file of tensors."""
    folder = CheckpointFolder(url)
    folder.fs.makedirs(folder._path, exist_ok=True)
    folder._put("a.distcp", DATA)
    folder.write_manifest({"a.distcp": ENTRY}, {"step": 1})
    return folder


@pytest.fixture
def folder() -> Iterator[CheckpointFolder]:
    """A checkpoint in a store."""
    folder = written("memory://checkpoints/step_00000001")
    yield folder
    folder.remove()


def answers(monkeypatch: pytest.MonkeyPatch, folder: CheckpointFolder, method: str, *first: Any):
    """Let the first calls of a method of the store raise or give something else."""
    left, real = list(first), getattr(folder.fs, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        answer = left.pop(0) if left else real(*args, **kwargs)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(folder.fs, method, call)


@pytest.mark.parametrize(
    "answer", [io.BytesIO(DATA[:100]), TimeoutError("slow"), HttpError({"code": 503})]
)
def test_tensors_that_came_short_are_read_again(
    monkeypatch: pytest.MonkeyPatch, folder: CheckpointFolder, waits: list[float], answer: Any
) -> None:
    answers(monkeypatch, folder, "open", answer)
    assert folder.first_corrupt_file([("a.distcp", ENTRY)]) is None
    assert len(waits) == 1


@pytest.mark.parametrize(
    "answer", [b'{"format": 1, "fi', b"", TimeoutError("slow"), HttpError({"code": 503})]
)
def test_a_manifest_that_came_short_is_read_again(
    monkeypatch: pytest.MonkeyPatch, folder: CheckpointFolder, waits: list[float], answer: Any
) -> None:
    answers(monkeypatch, folder, "cat_file", answer)
    assert folder.manifest()["a.distcp"] == ENTRY
    assert len(waits) == 1


def test_rows_that_a_store_fails_to_give_are_read_again(
    monkeypatch: pytest.MonkeyPatch, folder: CheckpointFolder, waits: list[float]
) -> None:
    stored = io.BytesIO()
    torch.save(torch.arange(9), stored)
    folder._put("b.distcp", stored.getvalue())
    answers(monkeypatch, folder, "cat_file", HttpError({"code": 503}))
    assert folder.find_fault_of_zip("b.distcp", 0, len(stored.getvalue())) is None
    assert len(waits) == 1


def test_what_stays_short_is_told_with_both_sizes(
    monkeypatch: pytest.MonkeyPatch, folder: CheckpointFolder, waits: list[float]
) -> None:
    answers(monkeypatch, folder, "open", *(io.BytesIO(DATA[:100]) for _ in range(9)))
    reason = folder.first_corrupt_file([("a.distcp", ENTRY)])
    assert reason == f"a.distcp gave 100 bytes, manifest.json says {len(DATA)}"
    assert len(waits) == 2


def test_a_disk_is_not_waited_for(tmp_path: Path, waits: list[float]) -> None:
    folder = written(str(tmp_path))
    (tmp_path / "a.distcp").write_bytes(b"x" + DATA[1:])
    assert "has CRC-32" in folder.first_corrupt_file([("a.distcp", ENTRY)])
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in folder.manifest()
    assert waits == []


def test_a_folder_that_is_not_there_is_not_waited_for(waits: list[float]) -> None:
    assert "FileNotFoundError" in CheckpointFolder("memory://checkpoints/step_00000002").manifest()
    assert waits == []
