"""Collectives work under the names that torch had before 2.14, and are counted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.collectives import all_gather
from mhe_dist.distributed.topology import Topology
from pipelines.bench.traffic import TrafficCounter
from tests.conftest import run_ranks


def gather(topology: Topology, old: bool) -> list[Tensor]:
    """What was gathered, the gradient of this rank's rows, and the bytes that were sent."""
    if old and hasattr(dist, "all_gather_single"):
        # What torch 2.8 has. Its functions do not call the new ones.
        dist.all_gather_into_tensor = dist.all_gather_single
        dist.reduce_scatter_tensor = dist.reduce_scatter_single
        del dist.all_gather_single, dist.reduce_scatter_single
    rows = torch.full((2, 3), 1.0 + topology.rank).requires_grad_()
    with TrafficCounter() as traffic:
        gathered = all_gather(rows, topology)
        (gathered * torch.arange(4.0)[:, None] * (1 + topology.rank)).sum().backward()
    return [gathered.detach(), rows.grad, torch.tensor(traffic.bytes)]


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_either_name_serves(old: bool) -> None:
    if not hasattr(dist, "all_gather_single") and not old:
        pytest.skip("this torch has the old names only")
    for rank, (gathered, grad, sent) in enumerate(run_ranks(gather, 2, old)):
        assert gathered[:, 0].tolist() == [1, 1, 2, 2]
        assert grad[:, 0].tolist() == [3 * 2 * rank, 3 * (2 * rank + 1)]
        assert sent == 2 * 3 * 4 + 4 * 3 * 4
