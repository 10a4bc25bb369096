"""How many workers a run gets: the largest number that is there and divides the micro-batches."""

from __future__ import annotations

from typing import Any

from mhe_dist.config.schema import Config

LOOK_AROUND_S = 30.0  # how often a running group looks for capacity to grow into
LEASE_S, RENEWAL_S = 15, 3


def group_size(available: int, config: Config) -> int:
    """Workers of the group that `available` places allow; 0 where they allow none."""
    fitting = [size for size in config.group_sizes() if size <= available]
    return max(fitting, default=0)


def trainer(config: Config, **arguments: Any) -> Any:
    """A Ray `TorchTrainer` whose group has a size of `config.group_sizes()`.

    Ray's elastic policy takes whatever number of workers there is room for; a run can only use
    numbers that divide its micro-batches. And what a run reserves of a cluster stays reserved for
    three minutes when its controller is ended from outside, as by `mhe stop`, while the next
    elastic run waits: here a reservation is a short lease that its holder renews. The policy
    travels to Ray's controller instead of Ray's own.

    Args:
        config: the run.
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
            return group_size(super()._count_possible_workers(reserved_resources), config)

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            policy = Elastic if config.scale.elastic else Fixed
            parts["scaling_policy"] = policy(arguments["scaling_config"])
            return super()._initialize_and_run_controller(**parts)

    return Trainer(**arguments)


def _shorten_leases() -> None:
    """Let what this controller reserves end soon after it; Ray has no setting for that."""
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client

    autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = LEASE_S
    autoscaling_coordinator_client.AUTOSCALING_REQUESTS_INTERVAL_S = RENEWAL_S
