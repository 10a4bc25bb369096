"""Ray's private modules: every use of one is here, and nowhere else.

Private names move between releases of Ray. Each function says what it uses, what for, and for which
release that was checked; after an update of Ray, check this file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

LEASE_S, RENEWAL_S = 15, 3
_NOISY_LOGGERS = (  # they report each upload and each lost connection
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def start_local_ray(cpus: int, object_store_bytes: int, folder: str) -> None:
    """Start Ray on the loopback interface of this machine, with all its files in `folder`.

    Checked with Ray 2.60.0: the arguments `_node_ip_address` and `_temp_dir` of `ray.init`.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=object_store_bytes,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )


def create_trainer(fit_group: Callable[[int], int] | None, **arguments: Any) -> Any:
    """A `TorchTrainer` that leases its resources, and whose group has a size that the run can use.

    Ray's elastic policy takes whatever number of workers there is room for; a run can only use
    numbers that divide its micro-batches. And what a run reserves of a cluster stays reserved for
    three minutes when its controller is ended from outside, as by `mhe stop`, while the next
    elastic run waits: here a reservation is a short lease that its holder renews. The policy
    travels to Ray's controller instead of Ray's own.

    Checked with Ray 2.60.0: `ScalingPolicy.after_controller_start`,
    `ElasticScalingPolicy.make_decision_for_non_running_worker_group` and `_count_possible_workers`,
    `TorchTrainer._initialize_and_run_controller(scaling_policy=...)`.

    Args:
        fit_group: number of workers that can be used of those there is room for; None: the number
            of `scaling_config` is fixed.
        arguments: of `TorchTrainer`.
    """
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        FixedScalingPolicy,
        ScalingPolicy,
    )
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class Leased(ScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None:
            """Reserve, for a short time."""
            _shorten_leases()
            super().after_controller_start(train_run_context)

    class Fixed(Leased, FixedScalingPolicy):
        pass

    class Elastic(Leased, ElasticScalingPolicy):
        def make_decision_for_non_running_worker_group(self) -> Any:
            """Decide by the nodes that there are now: Ray looks at them every 20 s."""
            self._autoscaling_coordinator.get_reserved_resources.remote(
                self._requester_id, recompute=True
            )
            return super().make_decision_for_non_running_worker_group()

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            assert fit_group
            return fit_group(super()._count_possible_workers(reserved_resources))

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            policy = Elastic if fit_group else Fixed
            parts["scaling_policy"] = policy(arguments["scaling_config"])
            return super()._initialize_and_run_controller(**parts)

    return Trainer(**arguments)


def _shorten_leases() -> None:
    """Let what this controller reserves end soon after it; Ray has no setting for that.

    Checked with Ray 2.60.0: both constants are read when a request is made, not at import.
    """
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client

    autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = LEASE_S
    autoscaling_coordinator_client.AUTOSCALING_REQUESTS_INTERVAL_S = RENEWAL_S


def on_main_thread_of_workers(function: Callable[[], None]) -> Any:
    """A callback for `RunConfig` that runs a function on each new worker's main thread.

    Training runs on another thread of the worker, where no signal handler can be set.
    Checked with Ray 2.60.0: `WorkerGroupCallback.after_worker_group_start`, `WorkerGroup.execute`.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class OnMainThread(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            worker_group.execute(function)

    return OnMainThread()


def enable_token_auth() -> None:
    """Send a token to the cluster if one lies in the home, and stay quiet about it.

    That is what `ray start` does, which asks for a token once `ray.init` has left one in the home.
    Checked with Ray 2.60.0: `maybe_enable_token_auth_if_token_available`.
    """
    from ray._private.authentication import authentication_token_setup

    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def is_token_auth_enabled() -> bool:
    """Whether this process sends a token to the cluster (checked with Ray 2.60.0)."""
    from ray._private.authentication import authentication_utils

    return bool(authentication_utils.is_token_auth_enabled())


def quiet_job_client() -> None:
    """Let the client of the Jobs API log warnings only (logger names of Ray 2.60.0)."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
