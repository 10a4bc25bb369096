"""A run in a store that fails now and then is the same run."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from gcsfs.retry import HttpError

from mhe_dist.config.schema import Config, ExportConfig
from mhe_dist.errors import RunError, StorageUnavailable
from pipelines.pretrain.main import run_pretraining
from pipelines.runs import lease
from tests.support import tiny
from tests.support.waiting import WATCHDOG_S

SHARE = 0.15  # of the requests that fail; six times in turn, one of 90,000
READS = ("info", "ls", "cat_file", "open")
WRITES = ("makedirs", "pipe_file", "put_file", "cp_file", "rm_file")


def fail(patch: pytest.MonkeyPatch, share: float) -> list[int]:
    """Let requests to the store fail at random; a list of as many items as did.

    Whether one fails depends on what it asks for, and how often that was asked for before, and not
    on what other threads ask for meanwhile.
    """
    requests, failed, inside = Counter[str](), [], threading.local()

    def failing(call: Any) -> Any:
        def attempt(self: MemoryFileSystem, *args: Any, **more: Any) -> Any:
            if getattr(inside, "request", False):  # one of its methods calls another
                return call(self, *args, **more)
            request = f"{call.__name__} {args[call.__name__ == 'put_file']}"
            requests[request] += 1
            draws = random.Random(f"{request} {requests[request]}")
            if draws.random() < share:
                failed.append(1)
                raise draws.choice([TimeoutError("slow"), HttpError({"code": 503, "message": ""})])
            inside.request = True
            try:
                return call(self, *args, **more)
            finally:
                inside.request = False

        return attempt

    for method in (*READS, *WRITES):
        patch.setattr(MemoryFileSystem, method, failing(getattr(MemoryFileSystem, method)))
    return failed


def run(folder: Path, where: str, steps: int) -> Config:
    shards = tiny.write_shards(folder / "shards") if not (folder / "shards").exists() else ""
    return tiny.config(
        *(folder, shards or str(folder / "shards")),
        run={"dir": where, "name": "run"},
        train={"max_steps": steps, "log_every": 2},
        checkpoint={"every_steps": 2},
        export={"formats": ["timm"]},
        resume={"allow": ["train.max_steps"]},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("prompt_retries")
def test_a_run_whose_store_fails_now_and_then_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began anew at step 0 where its checkpoints were not seen, and so did its record."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    monkeypatch.setattr(lease, "BEAT_S", WATCHDOG_S)  # else it asks more often, the longer it takes
    reference = run(tmp_path, str(tmp_path / "runs"), 8)
    run_pretraining(reference)
    url = "memory://now-and-then"
    with monkeypatch.context() as patch:
        failed = fail(patch, SHARE)
        run_pretraining(run(tmp_path, url, 4))
        summary = run_pretraining(run(tmp_path, url, 8))
        assert len(failed) > 20
    stored = run(tmp_path, url, 8)
    assert summary["resumed_from"].endswith("step_00000004")
    assert summary["failed_checkpoints"] == []
    assert tiny.per_step(stored) == tiny.per_step(reference)
    assert tiny.differing(stored, reference) == []
    with monkeypatch.context() as patch, pytest.raises(StorageUnavailable):
        fail(patch, 1.0)
        run_pretraining(stored)
    fsspec.filesystem("memory").store.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [("put_file", "/export/"), ("pipe_file", "summary")])
def test_results_that_a_store_refuses_are_named_with_their_run_and_the_cure(
    method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told as "Access Denied", of nobody knew what."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    url = f"memory://refused-{method}"
    config = run(tmp_path, url, 2).model_copy(update={"export": ExportConfig(formats=["timm"])})
    call = getattr(MemoryFileSystem, method)

    def refuse(self: MemoryFileSystem, *args: Any, **more: Any) -> Any:
        if any(name in word for word in args if isinstance(word, str)):
            raise PermissionError("Access Denied")
        return call(self, *args, **more)

    said = (
        f"{url}/run: its results cannot be written (PermissionError: Access Denied); the run is "
        "trained: mend that, and the same command writes them"
    )
    with monkeypatch.context() as patch, pytest.raises(RunError, match=re.escape(said)):
        patch.setattr(MemoryFileSystem, method, refuse)
        run_pretraining(config)
    assert run_pretraining(config)["exports"]["timm"]["path"] == f"{url}/run/export/timm"
