"""Who does the tasks of a command: processes of this machine, or the nodes of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.tasks.ray_tasks import cluster_tasks
from mhe_dist.distributed.device import choose_device
from mhe_dist.errors import UserError
from mhe_dist.limits import available_cores
from pipelines.storage.worker_pool import Processes, Workers


@contextmanager
def choose_workers(count: int, gpu: bool = False, address: str = "") -> Iterator[Workers]:
    """Workers for `pipelines.storage.worker_pool.run_tasks` inside the block.

    Args:
        count: how many; 0: one per core, or per GPU.
        gpu: each has a GPU; otherwise it sees none.
        address: of a Ray cluster; empty: processes of this machine.

    Raises:
        UserError: no cluster answers, or there are fewer GPUs than workers.
    """
    if address:
        with cluster_tasks(address, count, gpu) as tasks:
            yield tasks
        return
    devices = _gpus() if gpu else []
    if gpu and (count > len(devices) or not devices):
        raise UserError(
            f"--gpu: {len(devices)} GPUs are to be seen here for --workers {max(count, 1)}; ask "
            "for as many workers at most, or --no-gpu"
        )
    environments = [{"CUDA_VISIBLE_DEVICES": device} for device in devices]
    environments = environments or [choose_device(False).environment]
    yield Processes(count or len(devices) or available_cores(), environments)


def _gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may name for a process of one GPU."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
