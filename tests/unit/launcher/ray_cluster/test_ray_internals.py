"""What is overridden of Ray is there in the installed release, and does what it is for."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.ray_cluster import ray_internals


def policy_of(fit_group: Any, workers: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scaling policy that a trainer hands to Ray's controller."""
    from ray.train.v2.api.config import ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    monkeypatch.setattr(
        DataParallelTrainer,
        "_initialize_and_run_controller",
        lambda self, **parts: parts["scaling_policy"],
    )
    trainer = ray_internals.create_trainer(
        fit_group,
        train_loop_per_worker=lambda: None,
        scaling_config=ScalingConfig(num_workers=workers),
    )
    return trainer._initialize_and_run_controller(scaling_policy=None)


def test_an_elastic_group_has_a_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(lambda available: available - available % 2, (2, 4), monkeypatch)
    rays_own = type(policy).__mro__[2]
    assert rays_own.__name__ == "ElasticScalingPolicy"
    monkeypatch.setattr(rays_own, "_count_possible_workers", lambda self, reserved: 3)
    assert policy._count_possible_workers({}) == 2
    assert callable(rays_own.make_decision_for_non_running_worker_group)


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


def test_a_callback_runs_a_function_on_all_workers() -> None:
    executed: list[Any] = []

    class Group:
        def execute(self, function: Any) -> None:
            executed.append(function)

    ray_internals.on_main_thread_of_workers(print).after_worker_group_start(Group())
    assert executed == [print]


def test_the_client_s_token_and_loggers_are_there() -> None:
    ray_internals.quiet_job_client()
    assert ray_internals.is_token_auth_enabled() in (True, False)
