"""Shared helpers: one way to run a function on several gloo ranks."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.multiprocessing as mp

from mhe_dist import topology


def _rank_main(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    port: int,
    folder: str,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    place = topology.connect(timeout_s=60, device=torch.device("cpu"))
    result = fn(place, *args)
    torch.save(result, Path(folder) / f"{rank}.pt")
    place.barrier()
    topology.disconnect()


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `fn(topology, *args)` on `world_size` gloo ranks; its results by rank.

    `fn` must be importable (a module-level function) and return tensors and plain containers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (fn, world_size, port, folder, args), nprocs=world_size)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)
        ]


@pytest.fixture
def run_distributed() -> Callable[..., list[Any]]:
    """`run_distributed(fn, world_size, *args)`: see `run_ranks`."""
    return run_ranks
