"""The sum of gradients at ZeRO 0 against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.exact_reduce import ExactSum, _SumsInPlace

GENERATOR = torch.Generator().manual_seed(4)
GRADIENTS = torch.randn(4, 50, generator=GENERATOR).mul_(10.0 ** torch.arange(-2, 2).view(4, 1))


def backward(parameter: Tensor, order: tuple[int, ...]) -> None:
    for index in order:
        (parameter.flatten() * GRADIENTS[index]).sum().backward()


@pytest.fixture
def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(5, 10))


def test_any_order_gives_the_exact_sum_rounded_once(parameter: nn.Parameter) -> None:
    total = ExactSum([parameter])
    columns = GRADIENTS.T.tolist()
    exact = torch.tensor([float(sum(map(Fraction, column))) for column in columns])
    for order in permutations(range(4)):
        backward(parameter, order)
        assert parameter.grad is None, "taken over"
        total.reduce(Topology())
        total.write_grads()
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
    total = ExactSum([weight, vector])
    (weight.square().sum() + vector.sum()).backward()
    assert total.flat.numel() == 51
    total.write_grads()
    assert torch.equal(weight.grad, 2 * weight)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(vector.grad, torch.ones(3))
    assert not total.flat.any()


def test_zero_1_reduces_sums_where_they_are() -> None:
    """In another order, or with another tensor between them, they are copied as DeepSpeed does."""
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    vector, scalar = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(()))
    sums = _SumsInPlace(
        SimpleNamespace(
            bit16_groups=[[weight, vector], [scalar]],
            flatten=_flatten_dense_tensors,
            unflatten=_unflatten_dense_tensors,
        )
    )
    parameters: list[Any] = [weight, vector, scalar]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad_accum = None
        for _ in range(3):
            (weight.square().sum() / 3 + vector.sum() + scalar).backward()
            for parameter in parameters:
                sums.accumulate(parameter)
                assert parameter.grad is None
        totals = [parameter.grad_accum for parameter in parameters]
        flat = sums.flatten(totals)
        assert flat.data_ptr() == sums.flat.data_ptr() and len(flat) == len(sums.flat) == 52
        assert sums.unflatten(flat, totals) is totals
        assert torch.allclose(totals[0].float(), 2 * weight)
        assert torch.equal(flat[48:], torch.full((4,), 3.0, dtype=torch.float64))
    for others in (totals[::-1], totals[:1] + totals[2:], [totals[0], torch.zeros(2).double()]):
        copied = sums.flatten(others)
        assert torch.equal(copied, torch.cat([other.reshape(-1) for other in others]))
        parts = sums.unflatten(copied, others)
        assert parts is not others
        assert all(torch.equal(*pair) for pair in zip(parts, others, strict=True))
