"""The rounds of a sum over ranks, with threads for ranks and queues for wires."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import local

import pytest
import torch
from torch import Tensor

from mhe_dist.distributed import collectives
from mhe_dist.distributed.collectives import sum_small
from mhe_dist.distributed.topology import Topology


class Wires:
    """Stands for `torch.distributed` in threads that have set `here.rank`."""

    def __init__(self) -> None:
        self.here = local()
        self.queues: dict[tuple[int, int], Queue[Tensor]] = defaultdict(Queue)
        self.messages: dict[int, int] = defaultdict(int)

    def isend(self, values: Tensor, peer: int, group: object) -> Wires:
        self.queues[self.here.rank, peer].put(values.clone())
        self.messages[self.here.rank] += 1
        return self

    send = isend

    def recv(self, values: Tensor, peer: int, group: object) -> None:
        values.copy_(self.queues[peer, self.here.rank].get(timeout=10))

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 13])
def test_a_small_sum_takes_few_rounds(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wires = Wires()
    monkeypatch.setattr(collectives, "dist", wires)

    def one(rank: int) -> list[int]:
        wires.here.rank = rank
        values = torch.tensor([rank + 1, -(2**62) if rank == 0 else 0])
        return sum_small(values, Topology(rank, ranks)).tolist()

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(one, range(ranks)))
    assert found == [[ranks * (ranks + 1) // 2, -(2**62)]] * ranks
    doublings = ranks.bit_length() - 1
    assert max(wires.messages.values(), default=0) <= doublings + 1
