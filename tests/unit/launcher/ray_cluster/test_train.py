"""How the driver follows a run: events in order, failures in the right class. Without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.ray_cluster import train as ray_train
from launcher.ray_cluster import worker
from launcher.ray_cluster.elastic import group_size
from mhe_dist.config.schema import Config
from mhe_dist.errors import Preempted, RunError, UserError

FAILED = {"event": "failed", "rank": 1, "message": "model.name=x", "kind": "UserError"}


def config(**scale: Any) -> Config:
    return Config.model_validate({"data": {"shards": "x"}, "scale": scale})


def follow(*batches: list[dict[str, Any]]) -> list[Any]:
    """Events handed on while `batches` arrive; the last one comes as the run ends."""
    waiting, seen = list(batches), []
    ray_train.follow(lambda: len(waiting) == 1, lambda: waiting.pop(0), seen.append)
    return seen


def test_events_arrive_in_order_and_none_is_lost_at_the_end() -> None:
    events = [{"event": "metrics", "step": step} for step in range(4)]
    assert follow(events[:2], [], events[2:]) == events


@pytest.mark.parametrize(("user", "kind"), [(True, UserError), (False, RunError)])
def test_a_final_failure_ends_the_run_at_once(user: bool, kind: type[Exception]) -> None:
    event = {**FAILED, "user": user, "final": True}
    with pytest.raises(kind, match=r"model\.name=x"):
        ray_train.follow(lambda: False, lambda: [event], lambda event: None)


def test_a_lost_worker_does_not_end_the_run() -> None:
    events = [{**FAILED, "user": False, "final": False}, {"event": "end"}]
    assert follow(events[:1], events[1:]) == events


def test_a_preempted_worker_is_a_lost_worker_unless_the_run_was_told_to_stop() -> None:
    event = {"event": "preempted", "rank": 1, "message": "told to stop after step 7"}
    assert follow([event], [{"event": "end"}]) == [event, {"event": "end"}]
    with pytest.raises(Preempted, match="after step 7"):
        ray_train.follow(lambda: False, lambda: [event], lambda event: None, lambda: True)


@pytest.mark.parametrize(("available", "size"), [(0, 0), (1, 1), (3, 2), (4, 4), (9, 4)])
def test_the_group_is_the_largest_that_divides_the_micro_batches(available: int, size: int) -> None:
    values = {"data": {"shards": "x"}, "scale": {"workers": {"min": 1, "max": 6}}}
    assert group_size(available, Config.model_validate(values)) == size


class WorkersFailed(Exception):
    worker_failures = {1: ValueError("second"), 0: ValueError("cause\nlast line")}  # noqa: RUF012


class TaskFailed(Exception):
    cause = WorkersFailed("long text of Ray Train")


def test_too_many_failures_are_told_by_the_worker_that_failed_first() -> None:
    assert ray_train._reason(TaskFailed()) == "worker 0: ValueError: last line"
    assert ray_train._reason(RuntimeError("as it is")) == "as it is"


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"scale.workers=2.*has 1.*scale.gpu=false"):
        ray_train._check_resources(config(workers=2, gpu=True), {"GPU": 1.0})
    ray_train._check_resources(config(workers=2, gpu=True), {"GPU": 2.0})
    ray_train._check_resources(config(workers=2), {})


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
