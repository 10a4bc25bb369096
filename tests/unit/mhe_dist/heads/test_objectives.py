"""The closed forms of the losses of several labels, against autograd of their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.heads.base import without_repetition
from mhe_dist.heads.objectives import OBJECTIVES

MASK = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()


def define(name: str, negatives: Tensor, targets: Tensor) -> Tensor:
    """The loss of each sample from the logits of its negatives `[n, m]`."""
    losses = []
    for others, logits, mask in zip(negatives, targets, MASK, strict=True):
        own = logits[mask]
        if name == "multi_label":
            losses.append((1 + others.exp().sum()).log() + (1 + (-own).exp().sum()).log())
        else:
            each = [-F.log_softmax(torch.cat([z[None], others]), 0)[0] for z in own]
            losses.append(torch.stack(each).mean() if each else others.sum() * 0)
    return torch.stack(losses)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_losses_and_derivatives_are_those_of_the_definition(name: str, scale: float) -> None:
    rng = torch.Generator().manual_seed(2)
    negatives = torch.randn(4, 5, generator=rng, dtype=torch.float64) * scale
    targets = torch.randn(4, 3, generator=rng, dtype=torch.float64) * scale
    negatives, targets = negatives.requires_grad_(), targets.requires_grad_()
    losses = define(name, negatives, targets)
    losses.sum().backward()
    found = OBJECTIVES[name](negatives.detach().logsumexp(1), targets.detach(), MASK)
    near = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found.losses, losses.detach(), **near)
    torch.testing.assert_close(-found.pull, targets.grad, **near)
    pushed = found.push[:, None] * negatives.detach().softmax(1)
    torch.testing.assert_close(pushed, negatives.grad, **near)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("negatives", [float("-inf"), -3e4, 3e4])
@pytest.mark.parametrize("logit", [-3e4, 3e4])
def test_nothing_overflows(name: str, negatives: float, logit: float) -> None:
    found = OBJECTIVES[name](torch.full((4,), negatives), torch.full((4, 3), logit), MASK)
    assert all(torch.isfinite(part).all() for part in found)
    assert not found.pull[~MASK].any()


def test_a_label_that_comes_twice_counts_once() -> None:
    given = torch.tensor([[3, 1, 3, -1], [2, 2, 2, 2], [-1, -1, -1, -1], [0, 4, 1, 0]])
    kept = [sorted(n for n in row if n >= 0) for row in without_repetition(given).tolist()]
    assert kept == [[1, 3], [2], [], [0, 1, 4]]
