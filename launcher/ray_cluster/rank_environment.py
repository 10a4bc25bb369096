"""The environment of a rank, set on each Ray worker: what torchrun sets, by the same names.

`mhe_dist.distributed.topology.connect` makes the process group from it, here as under torchrun.
Ray's own `TorchConfig` would import torch in two processes that start workers and compute nothing.
"""

from __future__ import annotations

import os
from typing import Any

_held: list[Any] = []


def rank_environment() -> Any:
    """A `ray.train.backend.BackendConfig` that sets the environment once workers have started."""
    from ray.train.backend import Backend, BackendConfig

    class RankEnvironment(Backend):
        share_cuda_visible_devices = True  # a rank sees its node's GPUs; LOCAL_RANK picks its own

        def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
            """Tell each worker its rank and where rank 0 listens."""
            address, port = worker_group.execute_single(0, choose_meeting_point)
            worker_group.execute(set_environment, address, port)

    class RankEnvironmentConfig(BackendConfig):
        backend_cls = RankEnvironment

    return RankEnvironmentConfig()


def choose_meeting_point() -> tuple[str, int]:
    """Address of this node and a free port of it, held for torch's store while this process lives.

    Returns:
        MASTER_ADDR and MASTER_PORT.
    """
    import ray

    from mhe_dist.distributed.interface import hold_port

    address = ray.util.get_node_ip_address()
    holder = hold_port(address)
    _held.append(holder)
    return address, holder.getsockname()[1]


def set_environment(address: str, port: int) -> None:
    """Say to this process which rank it is, and where rank 0 listens."""
    import ray.train

    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )
