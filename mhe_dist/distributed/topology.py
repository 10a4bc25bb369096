"""Ranks, their devices and process groups. The only file that creates process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.device import choose_device, default_device, numbered_device
from mhe_dist.distributed.interface import choose_gloo_interface

Group = dist.ProcessGroup | None
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Topology:
    """One rank among the others.

    Attributes:
        rank, world_size: this process among W.
        device: where this rank computes.
        device_group: collectives on device tensors (NCCL or gloo); None alone.
        host_group: collectives on host tensors (gloo), which never wait for the device.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    device_group: Group = None
    host_group: Group = None

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0

    def share(self, pieces: int) -> range:
        """This rank's contiguous, balanced range of `pieces` (groups, micro-batches)."""
        return share(pieces, self.rank, self.world_size)

    def barrier(self) -> None:
        """Wait on the host until all ranks have called."""
        if self.world_size > 1:
            dist.barrier(group=self.host_group)

    def side_group(self, timeout_s: float) -> Group:
        """A group of its own for work in the background (host tensors); all ranks must call."""
        if self.world_size == 1:
            return None
        return cast(Group, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))


def share(pieces: int, rank: int, world_size: int) -> range:
    """Pieces of `rank` when `pieces` are cut into `world_size` contiguous, balanced ranges."""
    return range(pieces * rank // world_size, pieces * (rank + 1) // world_size)


def connect(timeout_s: float = 600.0, device: torch.device | None = None) -> Topology:
    """Join the process group of the environment (Ray Train, torchrun), or stand alone.

    Args:
        timeout_s: seconds after which a collective that one rank does not join ends.
        device: where to compute: `rank_device(scale.gpu)` in a run; by default `default_device()`.
    """
    device = numbered_device(device or default_device())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = choose_device(device.type == "cuda").backend
    timeout = timedelta(seconds=timeout_s)
    # Of groups that libraries make without saying how long; DeepSpeed does.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        choose_gloo_interface()
        dist.init_process_group(backend, timeout=timeout)
    world = dist.group.WORLD
    host_group = world
    if backend != "gloo":
        host_group = cast(Group, dist.new_group(backend="gloo", timeout=timeout))
    return Topology(dist.get_rank(), dist.get_world_size(), device, world, host_group)


def disconnect() -> None:
    """Leave in order, on success only: a failed rank must not enter another collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def owner_of(groups: Tensor, total: int, world_size: int) -> Tensor:
    """Rank that owns each group, of `total`, under `topology.share`; -1 stays -1."""
    return ((groups + 1) * world_size - 1) // total
