"""The rows of a bank as class centres: their norms, their padding, the margin of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhe_dist.bank.bank import Bank
from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.bank.row_optim import inverse_norms
from mhe_dist.heads.margins import Margin


@dataclass(frozen=True)
class ClassRows:
    """What a softmax needs to know of the rows that it scores.

    Attributes:
        bank: where the rows are.
        layout: which class is in which row.
        margin: that of the step.
        norm_statistics: AdaFace's running mean and deviation `[2]` before the step, on the device.
    """

    bank: Bank
    layout: LabelLayout
    margin: Margin
    norm_statistics: Tensor

    def target(self, cosine: Tensor, norms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Target cosines with their margin, and the derivative; see `Margin.target`."""
        mean, std = self.norm_statistics
        return self.margin.target(cosine, norms, mean, std)

    def inverse_norms(self, rows: Tensor) -> Tensor:
        """`1 / |w|` `[..., L]` of rows `[..., L, D]`, or ones where rows are not normalised."""
        if not self.margin.normalised:
            return rows.new_ones(rows.shape[:-1])
        return inverse_norms(rows)

    def padding(self, heads: Tensor) -> Tensor | None:
        """Which slots `[U, L]` of `heads` (host) hold no class; None if all do."""
        last = self.layout.heads - 1
        if self.layout.num_classes % self.layout.length == 0 or not (heads == last).any():
            return None
        slots = torch.arange(self.layout.length)
        position = heads[:, None] * self.layout.length + slots
        return (position >= self.layout.num_classes).to(self.bank.device)
