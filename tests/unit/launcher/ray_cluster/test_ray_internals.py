"""What is overridden of Ray is there in the installed release, and does what it is for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.ray_cluster import dashboard, elastic, ray_internals
from mhe_dist.errors import Preempted


class Post:
    """What Ray's controller asks of the mailbox, without one."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stopped = self.saved = False

    def stopping(self) -> bool:
        return self.stopped

    def has_new_checkpoint(self) -> bool:
        saved, self.saved = self.saved, False
        return saved

    def announce(self, what: str) -> None:
        self.said.append(what)

    ask_to_leave = announce


def policy_of(
    fit_group: Any, workers: Any, monkeypatch: pytest.MonkeyPatch, is_alone: bool = False
) -> Any:
    """The scaling policy that a trainer hands to Ray's controller."""
    return parts_of(trainer_of(fit_group, workers, is_alone), monkeypatch)["scaling_policy"]


def parts_of(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a trainer hands to Ray's controller."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    monkeypatch.setattr(
        DataParallelTrainer,
        "_initialize_and_run_controller",
        lambda self, **parts: parts,
    )
    parts: dict[str, Any] = trainer._initialize_and_run_controller(scaling_policy=None)
    return parts


def trainer_of(
    fit_group: Any, workers: Any, is_alone: bool, mailbox: Any = None, max_failures: int = 3
) -> Any:
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    return ray_internals.create_trainer(
        fit_group,
        is_alone,
        mailbox,
        run_config=RunConfig(failure_config=FailureConfig(max_failures=max_failures)),
        train_loop_per_worker=lambda: None,
        scaling_config=ScalingConfig(num_workers=workers),
    )


def test_an_elastic_group_has_a_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(lambda available: available - available % 2, (2, 4), monkeypatch)
    rays_own = type(policy).__mro__[2]
    assert rays_own.__name__ == "ElasticScalingPolicy"
    monkeypatch.setattr(rays_own, "_count_possible_workers", lambda self, reserved: 3)
    assert policy._count_possible_workers({}) == 2
    assert callable(rays_own.make_decision_for_non_running_worker_group)


def decide_of(
    mailbox: Post, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[Exception], str], list[float]]:
    """What becomes of a group whose rank 0 failed with an error, and the pauses that were made."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    policy = parts_of(trainer_of(None, 2, True, mailbox), monkeypatch)["failure_policy"]
    assert type(policy).__mro__[1].__name__ == "DefaultFailurePolicy"
    pauses: list[float] = []
    monkeypatch.setattr(elastic.time, "sleep", pauses.append)

    def decide(error: Exception) -> str:
        return str(policy.make_decision(WorkerGroupError("failed", {0: error})).name)

    return decide, pauses


def test_workers_that_saved_and_left_are_no_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    decide, pauses = decide_of(Post(), monkeypatch)
    assert [decide(Preempted("saved")) for _ in range(4)] == ["RETRY"] * 4
    assert pauses == [] and decide(OSError()) == "RETRY" and pauses == [5.0]


def test_failures_count_until_there_is_a_new_checkpoint_and_each_waits_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mailbox = Post()
    decide, pauses = decide_of(mailbox, monkeypatch)
    assert [decide(OSError()) for _ in range(3)] == ["RETRY"] * 3
    mailbox.saved = True
    assert [decide(OSError()) for _ in range(4)] == ["RETRY"] * 3 + ["RAISE"]
    assert pauses == [5.0, 20.0, 60.0, 5.0, 20.0, 60.0]
    assert mailbox.said[1] == "starting again in 20 s, after failure 2 without a new checkpoint"


def test_a_run_that_is_stopped_starts_no_other_group(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Post()
    decide, pauses = decide_of(mailbox, monkeypatch)
    mailbox.stopped = True
    assert decide(Preempted("saved")) == decide(OSError()) == "RAISE" and pauses == []


def test_an_elastic_group_is_asked_to_save_and_leave_before_it_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

    mailbox, now = Post(), 1000.0
    policy = parts_of(trainer_of(lambda available: available, (2, 4), False, mailbox), monkeypatch)[
        "scaling_policy"
    ]
    rays_own = type(policy).__mro__[2]
    decision: Any = NoopDecision()
    monkeypatch.setattr(
        rays_own,
        "make_decision_for_running_worker_group",
        lambda self, worker_group_state, worker_group_status: decision,
    )
    monkeypatch.setattr(ray_internals.time, "monotonic", lambda: now)

    def decide() -> bool:
        made = policy.make_decision_for_running_worker_group(
            worker_group_state=None, worker_group_status=None
        )
        return isinstance(made, NoopDecision)

    assert decide() and mailbox.said == []
    decision = ResizeDecision(num_workers=4, resources_per_worker={})
    assert decide() and mailbox.said == ["starting again with 4 workers"]
    assert decide() and len(mailbox.said) == 1, "it is saving"
    now += elastic.RESIZE_EVERY_S
    assert decide() and len(mailbox.said) == 2


def test_a_fixed_group_leases_too(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(None, 2, monkeypatch)
    rays_own = type(policy).__mro__[2]
    assert rays_own.__name__ == "FixedScalingPolicy"
    contexts: list[Any] = []
    monkeypatch.setattr(
        rays_own, "after_controller_start", lambda self, context: contexts.append(context)
    )
    policy.after_controller_start("context")
    assert contexts == ["context"]


def test_a_run_alone_reserves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(None, 2, monkeypatch, is_alone=True)
    policy.after_controller_start("context")  # would ask an actor, and there is no cluster
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    policy.before_controller_abort()


@pytest.mark.parametrize("is_alone", [False, True])
def test_services_that_a_run_does_not_use_are_not_started(is_alone: bool) -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = trainer_of(None, 2, is_alone)
    all_of_ray = {type(c).__name__ for c in DataParallelTrainer._create_default_callbacks(trainer)}
    started = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    unused = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if is_alone else set())
    assert unused < all_of_ray
    assert started == all_of_ray - unused


def test_a_callback_runs_a_function_on_all_workers() -> None:
    executed: list[Any] = []

    class Group:
        def execute(self, function: Any) -> None:
            executed.append(function)

    ray_internals.on_main_thread_of_workers(print).after_worker_group_start(Group())
    assert executed == [print]


def test_the_client_s_token_and_loggers_are_there() -> None:
    dashboard.quiet_job_client()
    assert ray_internals.is_token_auth_enabled() in (True, False)


SLOW_AGENTS = """
import sys, time
if any(script in " ".join(sys.orig_argv) for script in ("dashboard/agent.py", "agent/main.py")):
    time.sleep(20)
"""
START = """
import os, sys
from launcher.ray_cluster import environment, ray_internals
os.environ.update(environment.DRIVER_ENVIRONMENT | environment.LOCAL_ENVIRONMENT)
ray_internals.start_local_ray(1, 100 * 2**20, sys.argv[1])
import ray
print(ray.get(ray.remote(lambda: "a task").remote()))
ray_internals.end_local_ray()
"""


@pytest.mark.slow
def test_ray_starts_where_a_node_s_agents_take_long(tmp_path: Path) -> None:
    Path(tmp_path, "sitecustomize.py").write_text(SLOW_AGENTS)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with tempfile.TemporaryDirectory(prefix="mhe-", dir="/tmp") as files:
        started = subprocess.run(
            [sys.executable, "-c", START, files],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
    assert started.stdout == "a task\n", started.stderr
