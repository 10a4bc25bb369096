"""A loss whose gradient was formed beside it, so that no row is read again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class FusedOutput(NamedTuple):
    """What a rank returns for the samples that it scored.

    Attributes:
        loss: sum of the losses.
        gradient: of that sum with respect to the features, `[n, width]`; overwritten.
        correct: number of samples whose target has a higher cosine than every other class seen.
    """

    loss: Tensor
    gradient: Tensor
    correct: Tensor


class FusedLoss(torch.autograd.Function):
    """`weight` times loss and correct samples; the gradient of the features is that of the loss.

    Arguments are the features `[n, width]`, a function of (features, whether they need a gradient),
    and the weight. The function itself keeps the rows' gradient, which has its final scale (`1 / N`
    per sample) from the start and does not depend on what arrives in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, score: Callable[[Tensor, bool], FusedOutput], weight: float
    ) -> tuple[Tensor, Tensor]:
        """Score; see the class."""
        scored = score(features, ctx.needs_input_grad[0])
        ctx.save_for_backward(scored.gradient.mul_(weight))
        correct = scored.correct * weight
        ctx.mark_non_differentiable(correct)
        return scored.loss * weight, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient; see the class."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None
