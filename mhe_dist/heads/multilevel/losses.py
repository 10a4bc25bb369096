"""Cross-entropy and binary cross-entropy in closed form, over classes that lie on several ranks.

A sample's classes come in pieces. Each piece sums up its negatives in one number, the sample's own
rank joins the pieces and the golds, and what it finds goes back to the pieces, which then know the
derivative of the loss with respect to each of their logits. A class that does not count (padding,
filtered, a gold among the negatives) has a logit of -inf.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Settled(NamedTuple):
    """What a sample's own rank finds.

    Attributes:
        losses: `[B]`.
        total: `[B]`, what `Objective.derivative` needs of a sample.
        gold: derivative of the loss with respect to the logits of the golds `[B, K]`.
    """

    losses: Tensor
    total: Tensor
    gold: Tensor


class Objective(Protocol):
    """A loss of one level.

    Attributes:
        nothing: the sum of no negatives.
    """

    nothing: float

    def negatives(self, logits: Tensor) -> Tensor:
        """Sum up the negatives of a piece: `[..., L]` -> `[...]`."""

    def join(self, pieces: Tensor) -> Tensor:
        """Sum up pieces: `[B, k]` -> `[B]`."""

    def settle(self, negatives: Tensor, golds: Tensor, present: Tensor) -> Settled:
        """Loss of samples with negatives `[B]` and logits of golds `[B, K]`, where `present`."""

    def derivative(self, logits: Tensor, total: Tensor) -> Tensor:
        """Derivative with respect to negatives `[..., L]` of samples with `total` `[..., 1]`."""

    def log_score(self, logits: Tensor, negatives: Tensor) -> Tensor:
        """Log-probability of classes, where all classes were summed up as negatives."""


class CrossEntropy:
    """Softmax cross-entropy with exactly one gold (K = 1, always present)."""

    nothing = float("-inf")

    def negatives(self, logits: Tensor) -> Tensor:
        """Log-sum-exp; see `Objective`."""
        return logits.logsumexp(-1)

    def join(self, pieces: Tensor) -> Tensor:
        """Log-sum-exp; see `Objective`."""
        return pieces.logsumexp(-1)

    def settle(self, negatives: Tensor, golds: Tensor, present: Tensor) -> Settled:
        """`total` is the log-sum-exp over all classes; see `Objective`."""
        gold = golds.squeeze(1)
        total = torch.logaddexp(negatives, gold)
        return Settled(total - gold, total, (gold - total).expm1_().unsqueeze(1))

    def derivative(self, logits: Tensor, total: Tensor) -> Tensor:
        """The probability; see `Objective`."""
        return (logits - total).exp_()

    def log_score(self, logits: Tensor, negatives: Tensor) -> Tensor:
        """Log-softmax; see `Objective`."""
        return logits - negatives


class BinaryCrossEntropy:
    """Sum over the classes of the binary cross-entropy, with any number of golds.

    Summed and not averaged, so that a row learns as fast as with `CrossEntropy`, however many
    classes are scored beside it.
    """

    nothing = 0.0

    def negatives(self, logits: Tensor) -> Tensor:
        """Sum of `-log(1 - sigmoid)`; see `Objective`."""
        return F.softplus(logits).sum(-1)

    def join(self, pieces: Tensor) -> Tensor:
        """Sum; see `Objective`."""
        return pieces.sum(-1)

    def settle(self, negatives: Tensor, golds: Tensor, present: Tensor) -> Settled:
        """`total` is not needed and zero; see `Objective`."""
        losses = negatives + F.softplus(-golds).mul_(present).sum(-1)
        return Settled(losses, torch.zeros_like(losses), (-golds).sigmoid().neg_() * present)

    def derivative(self, logits: Tensor, total: Tensor) -> Tensor:
        """The probability; see `Objective`."""
        return logits.sigmoid()

    def log_score(self, logits: Tensor, negatives: Tensor) -> Tensor:
        """Log of the sigmoid; see `Objective`."""
        return F.logsigmoid(logits)
