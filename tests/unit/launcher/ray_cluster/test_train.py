"""How the driver follows a run: events in order, failures in the right class. Without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.train.v2._internal.util import count_required_parameters

from launcher.ray_cluster import ray_internals
from launcher.ray_cluster.crash_log import begin_line
from launcher.ray_cluster.elastic import group_size
from launcher.ray_cluster.mailbox import Mailbox, mailbox_name
from launcher.ray_cluster.train import TrainTask, _failure_message, _fit, forward_events
from mhe_dist.config.schema import Config
from mhe_dist.errors import Preempted, RunError, UserError

FAILED = {"event": "failed", "rank": 1, "message": "model.name=x", "kind": "UserError"}


def follow(*batches: list[dict[str, Any]]) -> list[Any]:
    """Events handed on while `batches` arrive; the last one comes as the run ends."""
    waiting, seen = list(batches), []
    forward_events(lambda: len(waiting) == 1, lambda: waiting.pop(0), seen.append)
    return seen


def test_events_arrive_in_order_and_none_is_lost_at_the_end() -> None:
    events = [{"event": "metrics", "step": step} for step in range(4)]
    assert follow(events[:2], [], events[2:]) == events


@pytest.mark.parametrize(("user", "kind"), [(True, UserError), (False, RunError)])
def test_a_final_failure_ends_the_run_at_once(user: bool, kind: type[Exception]) -> None:
    event = {**FAILED, "user": user, "final": True}
    with pytest.raises(kind, match=r"model\.name=x"):
        forward_events(lambda: False, lambda: [event], lambda event: None)


def test_a_lost_worker_does_not_end_the_run() -> None:
    events = [{**FAILED, "user": False, "final": False}, {"event": "end"}]
    assert follow(events[:1], events[1:]) == events


def test_a_preempted_worker_is_a_lost_worker_unless_the_run_was_asked_to_stop() -> None:
    event = {"event": "preempted", "rank": 1, "message": "told to stop after step 7"}
    assert follow([event], [{"event": "end"}]) == [event, {"event": "end"}]
    with pytest.raises(Preempted, match="after step 7"):
        forward_events(lambda: False, lambda: [event], lambda event: None, lambda: True)


def test_a_worker_that_fails_after_a_request_to_stop_is_not_waited_for() -> None:
    event = {**FAILED, "user": False, "final": False}
    with pytest.raises(Preempted, match=r"rank 1 failed.*last checkpoint"):
        forward_events(lambda: False, lambda: [event], lambda event: None, lambda: True)


def test_who_stops_a_run_hears_whether_a_worker_has_something_to_save() -> None:
    mailbox = Mailbox()
    assert not mailbox.stop(), "none had begun"
    assert not mailbox.begin(), "and none begins any more"
    assert not mailbox.stop()
    mailbox = Mailbox()
    assert mailbox.begin() and mailbox.stop() and mailbox.stopping()
    mailbox = Mailbox()
    assert mailbox.begin()
    mailbox.put({**FAILED, "final": False})
    assert not mailbox.stop(), "its group ended, the next one has not begun"


@pytest.mark.parametrize(("available", "size"), [(0, 0), (1, 1), (3, 2), (4, 4), (9, 4)])
def test_the_group_is_the_largest_that_divides_the_micro_batches(available: int, size: int) -> None:
    values = {"data": {"shards": "x"}, "scale": {"workers": {"min": 1, "max": 6}}}
    assert group_size(available, Config.model_validate(values)) == size


class WorkersFailed(Exception):
    worker_failures = {1: ValueError("second"), 0: ValueError("cause\nlast line")}  # noqa: RUF012


class TaskFailed(Exception):
    cause = WorkersFailed("long text of Ray Train")


def test_too_many_failures_are_reported_by_the_worker_that_failed_first(tmp_path: Path) -> None:
    assert _failure_message(TaskFailed(), tmp_path, "this") == "worker 0: ValueError: last line"
    assert _failure_message(RuntimeError("as it is"), tmp_path, "this") == "as it is"


@pytest.mark.parametrize(
    ("stopping", "kind", "said"),
    [
        (False, RunError, "Ray lost a process that the run needs .ActorDiedError: "),
        (True, Preempted, "told to stop, and its workers ended; "),
    ],
)
def test_a_process_that_ray_loses_ends_the_run_in_a_line_and_a_stop_in_order(
    stopping: bool, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mailbox, killed for want of memory, was Ray's long text, and a fault of this code."""
    import ray

    def get(_: object) -> None:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(ray, "get", get)
    task = TrainTask.__new__(TrainTask)
    task._mailbox, task._task, task._settings = MagicMock(), None, {"logs": "", "command": ""}
    with pytest.raises(kind, match=f"^{said}.*it goes on from its last checkpoint"):
        task.watch(lambda: False, lambda event: None, lambda: stopping)


def test_a_signal_that_ended_the_run_is_told_from_the_rank_s_log(tmp_path: Path) -> None:
    (tmp_path / "rank_0.log").write_text(f"{begin_line('this')}\nFatal Python error: Aborted\n")
    assert _failure_message(TaskFailed(), tmp_path, "this").startswith(
        "worker 0 was killed by a signal: Aborted; see "
    )


def test_ray_is_given_no_config_that_its_dashboard_would_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}

    class Trainer:
        def fit(self) -> None:
            """Nothing."""

    def create(*_: Any, **arguments: Any) -> Trainer:
        given.update(arguments)
        return Trainer()

    monkeypatch.setattr(ray_internals, "create_trainer", create)
    secret = {"tracking": {"uri": "http://me:planted@host"}, "data": {"shards": "x"}}
    config = Config.model_validate(secret).model_dump()
    _fit({"config": config, "storage": "/runs/a", "mailbox": None}, is_alone=True)
    train = given.pop("train_loop_per_worker")
    assert "planted" not in str(given)
    assert train.args[0]["config"] == config
    assert count_required_parameters(train) == 0  # as Ray counts them


def test_a_run_has_one_mailbox_whoever_asks_and_no_secret_in_its_name() -> None:
    names = {mailbox_name(f"sftp://{who}@host/runs/a") for who in ("me:planted", "you:other")}
    assert names == {"mailbox:sftp://***@host/runs/a"} == {mailbox_name("sftp://***@host/runs/a")}
