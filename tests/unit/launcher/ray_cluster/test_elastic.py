"""What a run says that has no workers yet: what it asks for, and what the cluster has free."""

from __future__ import annotations

import re
from typing import Any

import pytest

from launcher.ray_cluster.elastic import LongWait, NodeRoom, describe_wait
from mhe_dist.config.schema import Config


def config(**scale: Any) -> Config:
    return Config.model_validate({"data": {"shards": "x"}, "scale": {"workers": 2, **scale}})


def room(host: str, total: float, free: float, **others: float) -> NodeRoom:
    return NodeRoom(host, {"CPU": total, "memory": 9.0, **others}, {"CPU": free, "memory": 1.0})


def test_it_names_what_is_asked_and_what_each_node_has_free() -> None:
    said = describe_wait(config(), [room("a", 1, 1), room("b", 1, 0)])
    assert said == (
        "still waiting for 2 workers, each with CPU 1: there is room for 1 now, for 2 when nothing "
        "else runs; a has CPU 1 free of CPU 1; b has CPU 0 free of CPU 1; "
        "mhe jobs lists what else runs there"
    )


@pytest.mark.parametrize(
    ("scale", "nodes", "said"),
    [
        ({}, [room("a", 2, 2)], "room for 2 now, .*see ray status$"),
        ({}, [room("a", 1, 1)], "room for 1 now, for 1 when .*lower scale.workers"),
        ({}, [], "room for 0 now, for 0 when .*or add nodes$"),
        ({"min_workers": 1}, [room("a", 1, 0)], "for at least 1 worker, each with CPU 1: "),
        ({"workers": 4, "min_workers": 3}, [room("a", 3, 3)], "for at least 4 .*lower scale.wo"),
        ({"cpus_per_worker": 4}, [room("a", 8, 7)], "CPU 4: .*room for 1 now, for 2 .*CPU 7 free"),
        ({"gpu": True}, [room("a", 8, 8, GPU=1)], "CPU 1, GPU 1: .*CPU 8, GPU 0 free of .*GPU 1;"),
        ({"accelerator_type": "H100"}, [room("a", 8, 8)], "accelerator_type:H100 0.001: .*for 0 "),
        ({}, [room(str(n), 1, 0) for n in range(30)], "7 has CPU 0 .*; and 22 nodes more; mhe"),
    ],
)
def test_it_says_what_stands_in_the_way(
    scale: dict[str, Any], nodes: list[NodeRoom], said: str
) -> None:
    assert re.search(said, describe_wait(config(**scale), nodes))


def test_it_is_said_once_a_minute_and_only_while_no_worker_trains() -> None:
    now, training, checks = 0.0, False, 0

    def trains() -> bool:
        nonlocal checks
        checks += 1
        return training

    wait = LongWait(trains, lambda: "said", lambda: now)
    said = []
    for tick in range(4 * 400):  # a quarter of a second each
        now = tick / 4
        training = 130 <= now < 250
        said += [now for event in wait.events() if event == {"event": "waiting", "what": "said"}]
    assert said == [60.0, 120.0, 305.0, 365.0]
    assert checks < 100
