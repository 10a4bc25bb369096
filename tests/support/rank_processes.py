"""Processes of a run that a test may kill: forked, so that each costs little."""

from __future__ import annotations

import os
import socket

import torch

from mhe_dist.distributed.interface import hold_port

_held: list[socket.socket] = []


def free_port() -> int:
    """A port for a server, held for it as long as this process lives."""
    _held.append(hold_port())
    return int(_held[-1].getsockname()[1])


def environment(rank: int, world_size: int, port: int) -> None:
    """Make this process the rank of a group, as torchrun would."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
