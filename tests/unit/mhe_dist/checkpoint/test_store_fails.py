"""A store that fails for a moment is no run without checkpoints."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from gcsfs.retry import HttpError

from mhe_dist.backbone.model import Backbone
from mhe_dist.backbone.pretrained import load_pretrained
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import StorageUnavailable, UserError, is_final
from pipelines.pretrain.restarts import read_skipped_steps
from pipelines.runs.folder import find_run, newest_checkpoint, read_run_config
from pipelines.runs.resume import record_changes
from pipelines.runs.warm_start import find_checkpoint

RUN = "memory://fails/run"
FAULTS = [
    TimeoutError("slow"),
    ConnectionResetError("reset"),
    PermissionError(errno.EACCES, "denied"),
    OSError(errno.EIO, "Input/output error"),
    HttpError({"code": 503, "message": "busy"}),
    HttpError({"code": 403, "message": "token"}),
]
Fail = Callable[..., list[Exception]]


@pytest.fixture(autouse=True)
def run(prompt_retries: None) -> Iterator[None]:
    """A run with two checkpoints."""
    save(f"{RUN}/checkpoints", 10, 20)
    fsspec.filesystem("memory").pipe_file(f"{RUN}/config.yaml", b"run: {name: run}")
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Let the first calls of all that asks a store about some path fail."""

    def begin(
        name: str, *errors: Exception, of: type = MemoryFileSystem, methods: str = "info ls"
    ) -> list[Exception]:
        left = list(errors)

        def failing(call: Callable[..., Any]) -> Callable[..., Any]:
            def attempt(self: object, path: str, *rest: object, **more: object) -> object:
                if left and str(path).endswith(name):
                    raise left.pop(0)
                return call(self, path, *rest, **more)

            return attempt

        for method in f"{methods} cat_file open".split():
            monkeypatch.setattr(of, method, failing(getattr(of, method)))
        return left

    return begin


def save(root: str, *steps: int) -> None:
    store = CheckpointStore(root, Topology())
    for step in steps:
        store.save(step, {"model.weight": torch.ones(3) * step}, {}, {"step": step})
        ended = store.wait()
        assert ended is not None and ended.error is None


def newest_step(root: str = f"{RUN}/checkpoints") -> int | None:
    found = CheckpointStore(root, Topology()).newest()
    return None if found is None else found.step


@pytest.mark.parametrize("error", FAULTS, ids=repr)
@pytest.mark.parametrize("name", ["checkpoints", "20", "manifest.json", ".metadata", ".distcp"])
def test_what_cannot_be_read_is_neither_absent_nor_passed_over(
    name: str, error: Exception, fail: Fail
) -> None:
    """The run began anew at step 0, or lost what it had done since the checkpoint before."""
    fail(name, *[error] * 99)
    with pytest.raises(
        StorageUnavailable,
        match=r"memory://fails/run/checkpoints.*: (6 attempts failed|cannot be read now)",
    ):
        newest_step()


@pytest.mark.parametrize("error", [e for e in FAULTS if getattr(e, "code", 0) != 403][2:], ids=repr)
def test_a_disk_that_cannot_be_read_says_nothing_either(
    error: Exception, tmp_path: Path, fail: Fail
) -> None:
    save(str(tmp_path), 10)
    fail(tmp_path.name, *[error] * 99, of=LocalFileSystem)
    with pytest.raises(StorageUnavailable):
        newest_step(str(tmp_path))


@pytest.mark.parametrize("name", ["checkpoints", "20", "manifest.json", ".metadata", ".distcp"])
def test_a_moment_is_waited_out(name: str, fail: Fail) -> None:
    left = fail(name, TimeoutError(), HttpError({"code": 503, "message": "busy"}), OSError(5))
    assert newest_step() == 20
    assert left == []


def test_a_store_that_says_that_there_is_nothing_is_believed() -> None:
    assert newest_step("memory://fails/other/checkpoints") is None


def test_tensors_wait_a_moment_out_and_a_longer_one_is_not_final(fail: Fail) -> None:
    found = find_checkpoint(RUN)
    left = fail(".distcp", TimeoutError(), ConnectionResetError())
    assert found.load(lambda name: True)["model.weight"].tolist() == [20.0] * 3
    assert left == []
    fail(".distcp", *[TimeoutError("slow")] * 99)
    with pytest.raises(StorageUnavailable, match=r"__0_0\.distcp: .*TimeoutError: slow") as raised:
        found.load(lambda name: True)
    assert not is_final(raised.value)


@pytest.mark.parametrize(
    ("search", "name"),
    [
        (find_run, "config.yaml"),
        (read_run_config, "config.yaml"),
        (newest_checkpoint, "checkpoints"),
        (newest_checkpoint, "manifest.json"),
        (lambda url: find_checkpoint(f"{url}/checkpoints/step_00000020"), "20"),
    ],
)
def test_who_looks_for_a_run_is_not_told_that_there_is_none(
    search: Callable[[str], object], name: str, fail: Fail
) -> None:
    """`no run at ...` is a user's mistake, after which nothing is tried again."""
    fail(name, TimeoutError("slow"), TimeoutError("slow"))
    assert search(RUN)
    fail(name, *[TimeoutError("slow")] * 99)
    with pytest.raises(StorageUnavailable):
        search(RUN)


def test_what_a_run_left_out_and_whether_it_is_complete_outlive_a_moment(fail: Fail) -> None:
    """No step was left out where the file was not seen, and a run with changes stayed complete."""
    store = fsspec.filesystem("memory")
    store.pipe_file(f"{RUN}/skipped.json", b"[3, 4]")
    store.pipe_file(f"{RUN}/summary.json", b"{}")
    fail("skipped.json", TimeoutError("slow"))
    assert read_skipped_steps(RUN, Topology()) == {3, 4}
    fail("summary.json", TimeoutError("slow"))
    record_changes(RUN, 5, [("optim.lr", 0.1, 0.2)])
    assert not store.exists(f"{RUN}/summary.json") and store.exists(f"{RUN}/changes.json")


@pytest.mark.parametrize("name", ["run", "checkpoints", "20"])
def test_weights_to_begin_with_are_not_missing_for_a_moment(name: str, fail: Fail) -> None:
    source = f"{RUN}/checkpoints/step_00000020" if name == "20" else RUN
    fail(name, TimeoutError("slow"))
    with pytest.raises(UserError, match=r"model\.init_from.* is not of this model"):
        load_pretrained(Backbone(torch.nn.Linear(2, 2), torch.nn.Identity()), source)


def test_a_run_that_is_not_there_is_still_a_users_mistake() -> None:
    with pytest.raises(UserError, match="no run at memory://fails/none"):
        find_run("memory://fails/none")
    assert read_run_config("memory://fails/none") is None
    assert newest_checkpoint("memory://fails/none") is None
