"""What a group of workers hears from the driver, from Ray's controller and of drained nodes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.ray_cluster import ray_internals, worker
from launcher.ray_cluster.mailbox import ControllerMailbox, Mailbox, watch_stop
from mhe_dist.errors import Preempted
from pipelines.pretrain import preemption
from tests.support.waiting import wait_for

POLL = "watch stop"  # name of the thread


class Handle:
    """A handle of a mailbox whose actor is this process; `answers` may raise in its place."""

    def __init__(self, *answers: Any) -> None:
        self.mailbox, self.answers = Mailbox(), list(answers)

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            answer = self.answers.pop(0) if self.answers else None
            if isinstance(answer, Exception):
                raise answer
            return getattr(self.mailbox, name)(*arguments)

        return SimpleNamespace(remote=remote)


@pytest.fixture(autouse=True)
def answers_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import ray

    monkeypatch.setattr(ray, "get", lambda answer: answer)
    yield
    preemption.clear()


def unavailable() -> Exception:
    from ray.exceptions import ActorUnavailableError

    return ActorUnavailableError("restarting the connection", None)


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def watch(handle: Handle, draining: Callable[[], bool] = lambda: False) -> None:
    watch_stop(handle, preemption.request, draining, every_s=0.01)


def watched() -> bool:
    return POLL in [thread.name for thread in threading.enumerate()]


def test_a_mailbox_that_does_not_answer_for_a_moment_is_asked_again() -> None:
    handle = Handle(unavailable())
    handle.mailbox.stop()
    watch(handle)
    wait_for(lambda: not watched())
    assert preemption.requested() and not handle.answers


def test_a_mailbox_that_died_with_the_driver_is_not_asked_again() -> None:
    handle = Handle(died())
    handle.mailbox.stop()
    watch(handle)
    wait_for(lambda: not watched())
    assert not preemption.requested()


def test_a_group_saves_itself_when_ray_tells_that_a_node_will_be_taken_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2.api.preemption import PreemptionInfo

    warning = PreemptionContext()
    monkeypatch.setattr(context, "_train_context", SimpleNamespace(preemption_context=warning))
    watch(Handle(), ray_internals.is_draining)
    assert not preemption.requested() and watched()
    warning.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    wait_for(lambda: not watched())
    assert preemption.requested()


def test_a_group_that_is_to_leave_makes_room_for_another_one() -> None:
    mailbox = Mailbox()
    assert mailbox.begin() and not mailbox.leaving()
    mailbox.leave()
    assert mailbox.leaving() and not mailbox.stopping()
    assert mailbox.begin(), "the next group may train"
    assert not mailbox.leaving(), "and is not asked to leave"
    mailbox.stop()
    assert mailbox.leaving() and not mailbox.begin() and mailbox.leaving()


def test_the_controller_hears_of_each_further_checkpoint_once() -> None:
    handle = Handle()
    mailbox = ControllerMailbox(handle)
    assert not mailbox.has_new_checkpoint()
    handle.mailbox.put({"event": "checkpoint", "step": 10})
    assert mailbox.has_new_checkpoint() and not mailbox.has_new_checkpoint()
    handle.mailbox.put({"event": "checkpoint", "step": 9})
    assert not mailbox.has_new_checkpoint(), "a run that went back is not further"


def test_the_controller_restarts_nothing_without_its_driver_and_goes_on_in_a_hiccup() -> None:
    assert ControllerMailbox(Handle(died())).stopping()
    assert not ControllerMailbox(Handle(unavailable())).stopping()
    assert not ControllerMailbox(Handle(unavailable())).has_new_checkpoint()


def test_a_group_that_is_asked_to_leave_is_announced() -> None:
    handle = Handle()
    ControllerMailbox(handle).ask_to_leave("starting again with 4 workers")
    assert handle.mailbox.leaving()
    said = "saving, then starting again with 4 workers"
    assert handle.mailbox.take() == [{"event": "waiting", "what": said}]


@pytest.mark.parametrize(("local_rank", "asks"), [(0, True), (1, False)])
def test_one_rank_of_a_node_asks_for_all(
    local_rank: int, asks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import ray
    import ray.train

    context = SimpleNamespace(
        get_world_rank=lambda: 8 + local_rank, get_local_rank=lambda: local_rank
    )
    calls: list[Any] = []
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray, "wait", lambda *_, **__: ([], []))
    monkeypatch.setattr(worker, "redirect_output", lambda *_: None)
    monkeypatch.setattr(worker, "watch_stop", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    handle = Handle()
    handle.mailbox.stop()
    settings = {
        "folder": str(tmp_path),
        "logs": str(tmp_path),
        "command": "this",
        "mailbox": handle,
    }
    with pytest.raises(Preempted, match="before it began"):
        worker.train_worker(settings)
    assert bool(calls) == asks
