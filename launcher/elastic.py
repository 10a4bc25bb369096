"""How many workers a run gets: the largest number that is there and divides the micro-batches."""

from __future__ import annotations

from typing import Any

from mhe_dist.config import Config

LOOK_AROUND_S = 30.0  # how often a running group looks for capacity to grow into


def group_size(available: int, config: Config) -> int:
    """Workers of the group that `available` places allow; 0 where they allow none."""
    fitting = [size for size in config.group_sizes() if size <= available]
    return max(fitting, default=0)


def trainer(config: Config, **arguments: Any) -> Any:
    """A Ray `TorchTrainer` whose group has a size of `config.group_sizes()`.

    Ray's elastic policy takes whatever number of workers there is room for; a run can only use
    numbers that divide its micro-batches. The policy here travels to Ray's controller instead.

    Args:
        config: the run.
        arguments: of `TorchTrainer`.
    """
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class Policy(ElasticScalingPolicy):
        def _count_possible_workers(self, reserved_resources: Any) -> int:
            return group_size(super()._count_possible_workers(reserved_resources), config)

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            if config.scale.elastic:
                parts["scaling_policy"] = Policy(arguments["scaling_config"])
            return super()._initialize_and_run_controller(**parts)

    return Trainer(**arguments)
