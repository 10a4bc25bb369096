"""A read that fails for the moment deletes no checkpoint, and makes none of a new one fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from mhe_dist.checkpoint.files import CheckpointFolder
from mhe_dist.checkpoint.retention import RetentionPolicy
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import StorageUnavailable

pytestmark = pytest.mark.usefixtures("prompt_retries")

BEST = "heldout/rank1"


class StoreError(Exception):
    """As gcsfs has one, which is no OSError."""


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, {"model.weight": torch.ones(3) * step}, {}, {"step": step})
        ended = store.wait()
        assert ended is not None and ended.error is None


def stands(folder: Path) -> list[int]:
    return sorted(int(each.name.removeprefix("step_")) for each in folder.iterdir())


def fail_at(
    patch: pytest.MonkeyPatch, method: str, name: str, error: Exception, step: int = 10
) -> None:
    """Let a call of the file system fail for a file of a step."""
    call = getattr(LocalFileSystem, method)

    def attempt(self: LocalFileSystem, path: str, *rest: object, **more: object) -> object:
        if f"step_{step:08d}" in str(path) and name in str(path):
            raise error
        return call(self, path, *rest, **more)

    patch.setattr(LocalFileSystem, method, attempt)


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), StoreError("503")])
@pytest.mark.parametrize("method", ["cat_file", "ls"])
def test_a_checkpoint_that_cannot_be_read_now_stays(
    method: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for the remains of a dead process, although `keep_every` keeps it."""
    store = CheckpointStore(str(tmp_path), Topology(), RetentionPolicy(1, every=10))
    save(store, 10, 20)
    with monkeypatch.context() as patch:
        fail_at(patch, method, "manifest" if method == "cat_file" else "", error)
        save(store, 30)
    assert stands(tmp_path) == [10, 20, 30]


def test_the_remains_of_a_dead_process_go(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), Topology(), RetentionPolicy(1))
    save(store, 10)
    Path(tmp_path, "step_00000010", "manifest.json").write_text("{")
    save(store, 20)
    assert stands(tmp_path) == [20]


def test_the_best_checkpoint_stays_while_its_score_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path), Topology(), RetentionPolicy(1, best=BEST))
    for step, score in ((10, 0.9), (20, 0.5)):
        save(store, step)
        store.add_scores(step, {BEST: score})
    with monkeypatch.context() as patch:
        fail_at(patch, "cat_file", "scores", OSError(5, "Input/output error"))
        save(store, 30)
    assert 10 in stands(tmp_path)
    save(store, 40)
    assert stands(tmp_path) == [10, 40], "what stays for the moment alone goes later"


def test_the_newest_checkpoint_is_not_passed_over_and_stays_while_it_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path), Topology(), RetentionPolicy(1, every=10))
    save(store, 10)
    with monkeypatch.context() as patch:
        fail_at(patch, "ls", "", OSError(116, "Stale file handle"))
        with pytest.raises(StorageUnavailable, match=r"step_00000010.*Stale file handle"):
            store.newest()
        save(store, 15)
    assert stands(tmp_path) == [10, 15]
    newest = store.newest()
    assert newest is not None and newest.step == 15


def test_one_that_cannot_be_read_hinders_no_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path), Topology(), RetentionPolicy(9))
    save(store, 10, 20, 30)
    with monkeypatch.context() as patch:
        fail_at(patch, "ls", "", OSError(116, "Stale file handle"))
        assert store.roll_back_to(25)
        assert stands(tmp_path) == [10, 20]
        with pytest.raises(StorageUnavailable):  # nobody knows whether that is an older one
            store.roll_back_to(15)
    assert stands(tmp_path) == [10, 20]


def test_scores_that_cannot_be_read_are_none_for_who_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path), Topology(), RetentionPolicy(9))
    save(store, 10)
    store.add_scores(10, {BEST: 0.5})
    newest = store.newest()
    assert newest is not None and newest.scores == {BEST: 0.5}
    fail_at(monkeypatch, "cat_file", "scores", StoreError("503"))
    assert newest.scores == {}
    with pytest.raises(StorageUnavailable):
        newest.read_scores()


def test_what_a_store_refuses_to_delete_or_to_take_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path), Topology(), RetentionPolicy(1))
    save(store, 10)

    def refuse(*_: object) -> None:
        raise StoreError("503")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "remove", refuse)
        patch.setattr(CheckpointFolder, "write_scores", refuse)
        patch.setattr(CheckpointStore, "_clear_folder", lambda *_: True)
        save(store, 20)
        store.add_scores(20, {BEST: 0.5})
    assert "cannot be deleted: 503" in caplog.text and "cannot be stored: 503" in caplog.text
    newest = store.newest()
    assert newest is not None and newest.step == 20
    assert json.loads(Path(newest.path, "run.json").read_text()) == {"step": 20}
