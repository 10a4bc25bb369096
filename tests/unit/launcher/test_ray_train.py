"""How the driver follows a run: events in order, failures in the right class. Without Ray."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from launcher import ray_train, worker
from mhe_dist.config import Config
from mhe_dist.errors import RunError, UserError

FAILED = {"event": "failed", "rank": 1, "message": "model.name=x", "kind": "UserError"}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "POLL_S", 0.001)


def config(**scale: Any) -> Config:
    return Config.model_validate({"data": {"shards": "x"}, "scale": scale})


def follow(fit: Future[Any], *batches: list[dict[str, Any]], end: Any = None) -> list[Any]:
    """Events handed on while `batches` arrive, the last one as `fit` ends with `end`."""
    waiting, seen = list(batches), []

    def take() -> list[dict[str, Any]]:
        if len(waiting) == 1 and not fit.done():
            fit.set_exception(end) if end else fit.set_result(None)
            return []
        return waiting.pop(0) if waiting else []

    ray_train.follow(fit, take, seen.append)
    return seen


def test_events_arrive_in_order_and_none_is_lost_at_the_end() -> None:
    events = [{"event": "metrics", "step": step} for step in range(4)]
    assert follow(Future(), events[:2], [], events[2:]) == events


@pytest.mark.parametrize(("user", "kind"), [(True, UserError), (False, RunError)])
def test_a_final_failure_ends_the_run_at_once(user: bool, kind: type[Exception]) -> None:
    event = {**FAILED, "user": user, "final": True}
    with pytest.raises(kind, match=r"model\.name=x"):
        ray_train.follow(Future(), lambda: [event], lambda event: None)


def test_a_lost_worker_does_not_end_the_run() -> None:
    events = [{**FAILED, "user": False, "final": False}, {"event": "end"}]
    assert follow(Future(), events[:1], events[1:]) == events


def test_too_many_failures_are_told_by_the_worker_that_failed_first() -> None:
    error = RuntimeError("long text of Ray Train")
    error.worker_failures = {1: ValueError("second"), 0: ValueError("cause\nlast line")}  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"^worker 0: ValueError: last line$"):
        follow(Future(), [], end=error)


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"scale.workers=2.*has 1.*scale.gpu=false"):
        ray_train._check_resources(config(workers=2, gpu=True), {"GPU": 1.0})
    ray_train._check_resources(config(workers=2, gpu=True), {"GPU": 2.0})
    ray_train._check_resources(config(workers=2), {})


def test_the_background_call_gives_its_result_or_its_error() -> None:
    assert ray_train._in_background(lambda: 3).result(5) == 3
    with pytest.raises(ZeroDivisionError):
        ray_train._in_background(lambda: 1 // 0).result(5)


def test_ray_s_logs_are_kept_and_its_folder_is_not(tmp_path: Path) -> None:
    logs = tmp_path / "ray" / "session_7" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("x")
    (tmp_path / "ray" / "session_latest").symlink_to(logs.parent)
    ray_train._keep_logs(tmp_path / "ray", tmp_path / "kept")
    assert (tmp_path / "kept" / "session_7" / "raylet.out").read_text() == "x"
    assert not (tmp_path / "ray").exists()


def test_a_cluster_that_did_not_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    ray_train._keep_logs(tmp_path / "ray", tmp_path / "kept")
    assert not list(tmp_path.iterdir())


def test_a_worker_gets_its_threads_and_no_telemetry() -> None:
    variables = worker.environment(config(cpus_per_worker=3))
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert all(isinstance(value, str) for value in variables.values())


@pytest.mark.parametrize(
    ("error", "user", "final"),
    [
        (UserError("a"), True, True),
        (RunError("a"), False, True),
        (ConnectionResetError("a"), False, False),
    ],
)
def test_only_what_would_come_back_is_final(error: Exception, user: bool, final: bool) -> None:
    described = worker._describe(error)
    assert (described["user"], described["final"]) == (user, final)
    assert described["message"] == "a"
