"""BatchNorm's running statistics through the micro-batches of steps, on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.batchnorm import RunningStatistics


def step(model: nn.Module, statistics: RunningStatistics, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        statistics.begin_micro_batch()
        model(batch)
        statistics.end_micro_batch()
    statistics.finish_step(Topology())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_is_the_mean_of_one_update_per_micro_batch(
    count: int, momentum: float | None
) -> None:
    """With momentum 0.1 and with the cumulative average, over two steps."""
    norm = nn.BatchNorm1d(4, momentum=momentum)
    statistics = RunningStatistics(norm)
    mean, var = torch.zeros(4), torch.ones(4)
    for number in range(2):
        weight = 1 / (number + 1) if momentum is None else momentum
        batches = [torch.randn(6, 4) * (i + 1) + i for i in range(count)]
        step(norm, statistics, batches)
        mean = (1 - weight) * mean + weight * torch.stack([b.mean(0) for b in batches]).mean(0)
        var = (1 - weight) * var + weight * torch.stack([b.var(0) for b in batches]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        assert norm.num_batches_tracked == number + 1


def test_other_networks_pass_through() -> None:
    for model in [nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)]:
        statistics = RunningStatistics(model)
        step(model, statistics, [torch.randn(6, 4)])
        assert not statistics.in_step


def test_a_frozen_norm_stays() -> None:
    norm = nn.BatchNorm1d(4).eval()
    step(norm, RunningStatistics(norm), [torch.randn(6, 4), torch.randn(6, 4)])
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert norm.num_batches_tracked == 0


def test_counters_are_out_of_the_way_in_a_forward_pass_and_count_steps() -> None:
    plain, cumulative = nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None)
    model, seen = nn.Sequential(plain, cumulative), list[bool]()
    plain.register_forward_hook(lambda *_: seen.append(plain.num_batches_tracked is None))
    statistics = RunningStatistics(model)
    for _ in range(3):
        step(model, statistics, [torch.randn(6, 4), torch.randn(6, 4)])
    assert seen == [True] * 6
    assert int(plain.num_batches_tracked) == int(cumulative.num_batches_tracked) == 3
