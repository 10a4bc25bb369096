"""The sums of gradients at ZeRO 0 and 1 against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.exact_reduce import sum_dtype
from mhe_dist.engine.gradient_sums import SharedSum, WholeSum

GENERATOR = torch.Generator().manual_seed(4)
GRADIENTS = torch.randn(4, 50, generator=GENERATOR).mul_(10.0 ** torch.arange(-2, 2).view(4, 1))


def backward(parameter: Tensor, order: tuple[int, ...]) -> None:
    for index in order:
        (parameter.flatten() * GRADIENTS[index]).sum().backward()


@pytest.fixture
def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(5, 10))


def test_any_order_gives_the_exact_sum_rounded_once(parameter: nn.Parameter) -> None:
    total = WholeSum([parameter], Topology())
    columns = GRADIENTS.T.tolist()
    exact = torch.tensor([float(sum(map(Fraction, column))) for column in columns])
    for order in permutations(range(4)):
        backward(parameter, order)
        assert parameter.grad is None, "taken over"
        total.reduce()
        total.hand_over()
        assert torch.equal(parameter.grad.flatten(), exact)
        parameter.grad = None


def test_autograds_own_sum_depends_on_the_order(parameter: nn.Parameter) -> None:
    sums = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        parameter.grad = None
        backward(parameter, order)
        sums.append(parameter.grad)
    assert not torch.equal(*sums)


def test_gradients_have_the_layout_of_their_parameters() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    vector = nn.Parameter(torch.randn(3))
    total = WholeSum([weight, vector], Topology())
    (weight.square().sum() + vector.sum()).backward()
    assert total.sums[0].numel() == 51
    total.reduce()
    total.hand_over()
    assert torch.equal(weight.grad, 2 * weight)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(vector.grad, torch.ones(3))
    weight.grad = vector.grad = None
    weight.sum().backward()
    total.reduce()
    total.hand_over()
    assert torch.equal(weight.grad, torch.ones_like(weight)), "a step begins anew"
    assert torch.equal(vector.grad, torch.zeros(3)), "what had no part in the loss is zero"


def zero_optimizer(
    groups: list[list[nn.Parameter]], offsets: list[list[int]], sizes: list[int]
) -> Any:
    """What of DeepSpeed's optimizer is used: where each weight is in its group's flat tensor."""
    return SimpleNamespace(
        bit16_groups_flat=[torch.zeros(size) for size in sizes],
        round_robin_bit16_groups=groups,
        round_robin_bit16_offsets=offsets,
        averaged_gradients={},
        contiguous_gradients=True,
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_a_share_is_the_sum_where_the_weights_are(micro_batches: int, precision: str) -> None:
    """Each step anew, zeros where there is padding and where a parameter had no part."""
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    vector, idle = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    optimizer = zero_optimizer([[weight], [vector, idle]], [[0], [0, 3]], [50, 6])
    total = SharedSum(optimizer, micro_batches, precision, Topology())
    for step in range(3):
        for _ in range(micro_batches):
            idle_part = idle.sum() if step == 1 else 0.0
            (weight.square().sum() + vector.sum() + idle_part).backward()
            assert weight.grad is None, "taken over"
        total.reduce()
        total.hand_over()
        (first,), (second,) = (optimizer.averaged_gradients[group] for group in (0, 1))
        assert first.dtype == second.dtype == sum_dtype(precision)
        gradient = 2 * weight.detach().flatten().double() * micro_batches
        torch.testing.assert_close(first[:48].double(), gradient, rtol=1e-6, atol=0.0)
        assert not first[48:].any()
        expected = [micro_batches] * 3 + [micro_batches * (step == 1)] * 2 + [0]
        assert second.tolist() == expected


def test_a_share_is_the_exact_sum(parameter: nn.Parameter) -> None:
    exact = [float(sum(map(Fraction, column))) for column in GRADIENTS.T.tolist()]
    optimizer = zero_optimizer([[parameter]], [[0]], [50])
    total = SharedSum(optimizer, 4, "float32", Topology())
    for order in permutations(range(4)):
        backward(parameter, order)
        total.reduce()
        assert total.sums[0].tolist() == exact
