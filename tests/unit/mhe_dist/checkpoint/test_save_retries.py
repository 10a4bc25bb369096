"""A disk or a store that fails for a moment costs no checkpoint."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from gcsfs.retry import HttpError

from mhe_dist.checkpoint.retention import RetentionPolicy
from mhe_dist.checkpoint.store import CheckpointStore, CheckpointWarning, SaveResult
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from pipelines.pretrain import main
from tests.support.waiting import WATCHDOG_S

MOMENTS = [
    TimeoutError("slow"),
    HttpError({"code": 503, "message": "busy"}),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
]
LASTING = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EROFS, "Read-only file system"),
    PermissionError(errno.EACCES, "Permission denied"),
]
# What a save calls: of which class, which method.
ON_DISK = [
    (LocalFileSystem, "makedirs"),
    (LocalFileSystem, "open"),
    (LocalFileOpener, "write"),
    (LocalFileOpener, "close"),
    (LocalFileSystem, "rename"),
    (os, "fsync"),
    (os, "replace"),
]
IN_STORE = [
    (MemoryFileSystem, "makedirs"),
    (MemoryFileSystem, "open"),
    (MemoryFile, "write"),
    (MemoryFile, "commit"),
    (MemoryFileSystem, "cp_file"),
    (MemoryFileSystem, "rm_file"),
    (MemoryFileSystem, "pipe_file"),
]
Fail = Callable[..., list[Exception]]


@pytest.fixture(autouse=True)
def store(prompt_retries: None) -> Iterator[None]:
    """Nobody waits, and the store is empty afterwards."""
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Let calls fail with some errors, after `skipped` calls that do not."""

    def begin(of: Any, method: str, *errors: Exception, skipped: int = 0) -> list[Exception]:
        left, calls, real = list(errors), iter(range(1 << 20)), getattr(of, method)

        def call(*args: Any, **more: Any) -> Any:
            if next(calls) >= skipped and left:
                raise left.pop(0)
            return real(*args, **more)

        monkeypatch.setattr(of, method, call)
        return left

    return begin


def save(root: str, *steps: int) -> SaveResult:
    policy = RetentionPolicy(last=1)
    checkpoints = CheckpointStore(root, Topology(), policy)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.{n}": torch.randn(50 + n, generator=generator) for n in range(3)}
    for step in steps:
        checkpoints.save(step, tensors, {"head/rows": torch.ones(2000)}, {"step": step})
        ended = checkpoints.wait()
    assert ended is not None
    return ended


def contents(root: str) -> dict[str, bytes]:
    """Of all files but `.metadata`, which has an id of its own, and so the manifest has."""
    filesystem, path = fsspec.core.url_to_fs(root)
    files = {name.removeprefix(f"{path}/"): name for name in filesystem.find(path)}
    varying = (".metadata", "manifest.json")
    return {f: filesystem.cat_file(n) for f, n in files.items() if not f.endswith(varying)}


@pytest.mark.parametrize("error", MOMENTS, ids=repr)
@pytest.mark.parametrize(
    "call", [*ON_DISK, *IN_STORE], ids=lambda call: ".".join(map(str, call[1:]))
)
def test_a_moment_is_waited_out_and_the_bytes_are_the_same(
    call: tuple[Any, str], error: Exception, tmp_path: Path, fail: Fail
) -> None:
    """There was no checkpoint then, and what was done since the one before was lost."""
    root = "memory://moment/checkpoints" if call in IN_STORE else str(tmp_path / "checkpoints")
    save(str(tmp_path / "reference"), 1)
    for skipped in range(3):
        left = fail(*call, error, error, skipped=skipped)
        ended = save(f"{root}/{skipped}", 1)
        assert ended.error is None
        assert contents(f"{root}/{skipped}") == contents(str(tmp_path / "reference"))
        found = CheckpointStore(f"{root}/{skipped}", Topology()).newest()
        assert found is not None and found.step == 1
        if not skipped:
            assert left == []


@pytest.mark.parametrize("error", LASTING, ids=repr)
@pytest.mark.parametrize("call", [ON_DISK[1], ON_DISK[2], IN_STORE[2]], ids=lambda call: call[1])
def test_a_full_disk_and_missing_rights_are_told_at_once(
    call: tuple[Any, str], error: Exception, tmp_path: Path, fail: Fail, waits: list[float]
) -> None:
    """What `torch.save` made of a write that failed was `unexpected pos 30 vs 0`."""
    root = "memory://full/checkpoints" if call in IN_STORE else str(tmp_path)
    for skipped in range(2):
        left = fail(*call, error, skipped=skipped)
        with pytest.warns(CheckpointWarning):
            ended = save(f"{root}/{skipped}", 1)
        assert ended.error is not None and str(error) in ended.error
        assert left == [] and waits == []


def test_a_store_that_stays_away_is_told_with_the_attempts(tmp_path: Path, fail: Fail) -> None:
    fail(LocalFileSystem, "open", *[TimeoutError("slow")] * 99)
    with pytest.warns(CheckpointWarning, match=r"step_00000001: 6 attempts failed.*slow"):
        assert save(str(tmp_path), 1).error is not None


def test_old_ones_are_deleted_though_the_store_fails_for_a_moment(fail: Fail) -> None:
    root = "memory://old/checkpoints"
    save(root, 1)
    fail(MemoryFileSystem, "rm", TimeoutError("slow"))
    save(root, 2)
    assert fsspec.filesystem("memory").ls("/old/checkpoints", detail=False) == [
        "/old/checkpoints/step_00000002"
    ]


def test_a_name_in_a_store_is_no_pattern() -> None:
    """Every save of such a run failed, and deleted what the name matched."""
    for name in ("run1", "run[1]", "run*"):
        assert save(f"memory://names/{name}/checkpoints", 1, 2).error is None
    filesystem = fsspec.filesystem("memory")
    filesystem.rm_file("/names/run*/checkpoints/step_00000002/manifest.json")
    assert save("memory://names/run*/checkpoints", 2).error is None
    names = {name.split("/")[2] for name in filesystem.find("/names") if "manifest" in name}
    assert names == {"run1", "run[1]", "run*"}
    assert len(filesystem.find("/names")) == 3 * 4, "one checkpoint of each"


HANGING = """
import sys, time, torch
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.distributed.topology import Topology
CheckpointStore._write = lambda *_: time.sleep(10_000)
store = CheckpointStore(sys.argv[1], Topology())
store.save(1, {"weight": torch.ones(3)}, {}, {})
assert store.wait(0.1) is None
raise ValueError("this rank fails")
"""


def test_a_rank_that_fails_ends_though_its_save_hangs(tmp_path: Path) -> None:
    """It waited an hour for ranks that were stuck, and nothing started it again."""
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WATCHDOG_S, check=False)
    assert ended.returncode == 1 and "this rank fails" in ended.stderr


def test_a_rank_that_fails_lets_its_save_come_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = mock.MagicMock()
    run.train.side_effect = RunError("a shard is missing")
    monkeypatch.setattr(main, "watched", lambda *_: nullcontext())
    with pytest.raises(RunError, match="a shard is missing"):
        main._attempt(run)
    run.store.wait.assert_called_once_with(main.LAST_SAVE_S)
    run.tracker.close.assert_called_once_with("failed")
