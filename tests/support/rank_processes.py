"""Processes of a run that a test may kill: forked, so that each costs little."""

from __future__ import annotations

import os
import socket

import torch


def free_port() -> int:
    """A port that the system gave."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, world_size: int, port: int) -> None:
    """Make this process the rank of a group, as torchrun would."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
