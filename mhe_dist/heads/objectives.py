"""Losses of samples with up to K labels each, in closed form, from few numbers per sample.

A sample's negatives are the classes of its softmax that are none of its labels. They enter a loss
only through `S`, the log-sum-exp of their logits. So whoever owns the rows sums them up, the sums
are joined, and the losses follow with their derivatives. With `z_i` the logit of label i, the
margin applied to it:

- `softmax`: each label is a target of its own, and no other label of the sample is its negative:
  the mean over the labels of `log(exp(S) + exp(z_i)) - z_i`.
- `multi_label`: the two separated sums of MLCD (arXiv 2407.17331): `log(1 + exp(S))` plus
  `log(1 + sum_i exp(-z_i))`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor


class LabelLoss(NamedTuple):
    """Losses of samples, and their derivatives.

    Attributes:
        losses: `[n]`.
        push: `[n]`, the derivative with respect to `S`: a negative's logit `z_j` has
            `push * exp(z_j - S)`.
        pull: `[n, K]`, minus the derivative with respect to each label's logit; 0 where none is.
    """

    losses: Tensor
    push: Tensor
    pull: Tensor


LabelObjective = Callable[[Tensor, Tensor, Tensor], LabelLoss]
"""A function of `S` `[n]` (-inf: no negatives), the labels' logits `[n, K]`, and the mask `[n, K]`
of those that are labels; the other logits must be finite."""


def softmax_per_label(negatives: Tensor, targets: Tensor, mask: Tensor) -> LabelLoss:
    """`softmax`, see the module; a sample without a label has no loss."""
    share = mask.to(targets.dtype) / mask.sum(1, keepdim=True).clamp_min(1)
    excess = negatives.unsqueeze(1) - targets
    # Not `softplus`, which is a straight line beyond 20.
    losses = torch.logaddexp(excess, torch.zeros_like(excess)).mul_(share).sum(1)
    pull = excess.sigmoid_().mul_(share)
    return LabelLoss(losses, pull.sum(1), pull)


def separated_sums(negatives: Tensor, targets: Tensor, mask: Tensor) -> LabelLoss:
    """`multi_label`, see the module; a sample without a label has the first sum alone."""
    missing = (-targets).masked_fill_(~mask, float("-inf"))
    total = missing.logsumexp(1)
    one = torch.zeros_like(total)
    losses = torch.logaddexp(negatives, one) + torch.logaddexp(total, one)
    # exp(-z_i) / (1 + sum_i exp(-z_i)), finite also where the sum is 0
    pull = missing.sub_(torch.logaddexp(total, one).unsqueeze(1)).exp_()
    return LabelLoss(losses, negatives.sigmoid(), pull)


OBJECTIVES: Final[dict[str, LabelObjective]] = {
    "softmax": softmax_per_label,
    "multi_label": separated_sums,
}
