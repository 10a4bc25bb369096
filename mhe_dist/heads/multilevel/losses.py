"""Cross-entropy and binary cross-entropy in closed form, over classes that lie on several ranks.

A sample's classes lie in several parts. Each part sums up its negatives in one number. The sample's
own rank joins these sums and the targets, and sends a normaliser back to the parts; with it each
part knows the derivative of the loss with respect to its logits. A class that does not count
(padding, filtered, a target among the negatives) has a logit of -inf.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class LossAndGrad(NamedTuple):
    """The losses of samples, and what their gradient is formed from.

    Attributes:
        losses: `[B]`.
        normaliser: `[B]`, what `Objective.derivative` needs of a sample.
        target_grad: derivative of the loss with respect to the logits of the targets `[B, K]`.
    """

    losses: Tensor
    normaliser: Tensor
    target_grad: Tensor


class Objective(Protocol):
    """A loss of one level.

    Attributes:
        empty: the sum of no negatives.
    """

    empty: float

    def logits(self, scores: Tensor, scale: float) -> Tensor:
        """Logits of classes by their cosines, or by their inner products."""

    def negatives(self, logits: Tensor) -> Tensor:
        """Sum up the negatives of a part: `[..., L]` -> `[...]`."""

    def join(self, parts: Tensor) -> Tensor:
        """Sum up the parts: `[B, k]` -> `[B]`."""

    def loss_and_grad(self, negatives: Tensor, targets: Tensor, present: Tensor) -> LossAndGrad:
        """Loss of samples with negatives `[B]` and logits of targets `[B, K]`, where `present`."""

    def derivative(self, logits: Tensor, normaliser: Tensor) -> Tensor:
        """Derivative with respect to negatives `[..., L]`, given the `normaliser` `[..., 1]`."""

    def log_score(self, logits: Tensor, negatives: Tensor) -> Tensor:
        """Log-probability of classes, where all classes were summed up as negatives."""


class CrossEntropy:
    """Softmax cross-entropy with exactly one target (K = 1, always present)."""

    empty = float("-inf")

    def logits(self, scores: Tensor, scale: float) -> Tensor:
        """They are scaled; see `Objective`."""
        return scores * scale

    def negatives(self, logits: Tensor) -> Tensor:
        """Log-sum-exp; see `Objective`."""
        return logits.logsumexp(-1)

    def join(self, parts: Tensor) -> Tensor:
        """Log-sum-exp; see `Objective`."""
        return parts.logsumexp(-1)

    def loss_and_grad(self, negatives: Tensor, targets: Tensor, present: Tensor) -> LossAndGrad:
        """The normaliser is the log-sum-exp over all classes; see `Objective`."""
        target = targets.squeeze(1)
        log_sum = torch.logaddexp(negatives, target)
        return LossAndGrad(log_sum - target, log_sum, (target - log_sum).expm1_().unsqueeze(1))

    def derivative(self, logits: Tensor, normaliser: Tensor) -> Tensor:
        """The probability; see `Objective`."""
        return (logits - normaliser).exp_()

    def log_score(self, logits: Tensor, negatives: Tensor) -> Tensor:
        """Log-softmax; see `Objective`."""
        return logits - negatives


class BinaryCrossEntropy:
    """Sum over the classes of the binary cross-entropy, with any number of targets.

    Summed and not averaged, so that a row learns as fast as with `CrossEntropy`, however many
    classes are scored beside it.

    Args:
        offset: what a scaled score is lowered by; see `offset_of`.
    """

    empty = 0.0

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    @staticmethod
    def offset_of(classes: int, variance: float) -> float:
        """The offset with which a class is improbable from the start, as one of `classes`.

        Without it a sample begins with as many labels as half of the classes, and training first
        drives all rows away from all embeddings. (A prior: Lin et al., Focal Loss, 2017, section
        4.1; a bias of -10: Zhai et al., Sigmoid Loss, 2023.) It is the least b for which Chernoff's
        bound of `E[sigmoid(z - b)]`, `exp(t^2 v / 2 - t b)` with t in (0, 1], is `1 / classes`,
        where z is normal with mean 0 and variance v.

        Args:
            classes: that are scored beside each other, one at least.
            variance: v, of the logits before training.
        """
        log = math.log(classes)
        return log + variance / 2 if variance <= 2 * log else math.sqrt(2 * variance * log)

    def logits(self, scores: Tensor, scale: float) -> Tensor:
        """They are scaled, and lowered in the same pass; see `Objective`."""
        return torch.rsub(scores, -self.offset, alpha=-scale)

    def negatives(self, logits: Tensor) -> Tensor:
        """Sum of `-log(1 - sigmoid)`; see `Objective`."""
        return F.softplus(logits).sum(-1)

    def join(self, parts: Tensor) -> Tensor:
        """Sum; see `Objective`."""
        return parts.sum(-1)

    def loss_and_grad(self, negatives: Tensor, targets: Tensor, present: Tensor) -> LossAndGrad:
        """The normaliser is not needed, and zero; see `Objective`."""
        losses = negatives + F.softplus(-targets).mul_(present).sum(-1)
        return LossAndGrad(losses, torch.zeros_like(losses), (-targets).sigmoid().neg_() * present)

    def derivative(self, logits: Tensor, normaliser: Tensor) -> Tensor:
        """The probability; see `Objective`."""
        return logits.sigmoid()

    def log_score(self, logits: Tensor, negatives: Tensor) -> Tensor:
        """Log of the sigmoid; see `Objective`."""
        return F.logsigmoid(logits)
