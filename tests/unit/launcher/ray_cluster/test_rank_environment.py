"""A Ray worker learns what torchrun would tell it, and rank 0's port stays its own."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from launcher.ray_cluster import rank_environment
from tests.support.waiting import WATCHDOG_S


class Group:
    """Two workers, which are this process."""

    def __init__(self) -> None:
        self.executed: list[Any] = []

    def execute_single(self, rank: int, function: Any) -> Any:
        assert (rank, function) == (0, rank_environment.choose_meeting_point)
        return "10.0.0.7", 4242

    def execute(self, function: Any, *arguments: Any) -> None:
        self.executed.append((function, arguments))


def test_workers_are_told_where_rank_0_listens() -> None:
    config = rank_environment.rank_environment()
    backend = config.backend_cls()
    assert backend.share_cuda_visible_devices
    group = Group()
    backend.on_start(group, config)
    assert group.executed == [(rank_environment.set_environment, ("10.0.0.7", 4242))]


def test_the_environment_is_that_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train

    class Context:
        def get_world_rank(self) -> int:
            return 5

        def get_world_size(self) -> int:
            return 8

        def get_local_rank(self) -> int:
            return 1

        def get_local_world_size(self) -> int:
            return 4

        def get_node_rank(self) -> int:
            return 1

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(os, "environ", {})
    rank_environment.set_environment("10.0.0.7", 4242)
    assert os.environ == {
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "4242",
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "NODE_RANK": "1",
    }


def test_the_port_is_held_for_torch_s_store_and_for_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    address, port = rank_environment.choose_meeting_point()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    store = dist.TCPStore(address, port, is_master=True, timeout=timedelta(seconds=WATCHDOG_S))
    assert dist.TCPStore(address, port, is_master=False).check([]) is store.check([])
    rank_environment._held.pop().close()
