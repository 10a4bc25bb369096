"""Sums over ranks: the rounds of a small one, with threads for ranks, and shares of a large one."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import local

import pytest
import torch
from torch import Tensor

from mhe_dist.distributed import collectives
from mhe_dist.distributed.collectives import reduce_scatter, sum_small
from mhe_dist.distributed.topology import Topology
from tests.conftest import run_ranks
from tests.support.waiting import WATCHDOG_S


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
        values.copy_(self.queues[peer, self.here.rank].get(timeout=WATCHDOG_S))

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


def _values_of(rank: int, ranks: int) -> Tensor:
    """float32 of sizes so different that a sum in float32 depends on its order."""
    values = torch.randn(ranks * 1001, generator=torch.Generator().manual_seed(rank))
    return values * 10.0 ** (rank * 3)


def _share(topology: Topology) -> list[Tensor]:
    """This rank's share in float64 and float32, a few columns at a time."""
    collectives.PIECE = 1 << 12
    values = _values_of(topology.rank, topology.world_size)
    shares = [torch.empty(1001, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    for share in shares:
        reduce_scatter(values, share, topology)
    return shares


@pytest.mark.parametrize("ranks", [1, 3])
def test_shares_of_a_sum_are_exact_in_a_wider_dtype(ranks: int) -> None:
    whole = torch.stack([_values_of(rank, ranks) for rank in range(ranks)])
    expected = whole.double().sum(0).split(1001)
    for (wide, narrow), exact in zip(run_ranks(_share, ranks), expected, strict=True):
        assert torch.equal(wide, exact)
        torch.testing.assert_close(narrow, exact.float())
