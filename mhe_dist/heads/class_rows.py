"""The rows of a bank as class centres: their norms, their padding, the margin of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhe_dist.bank.bank import Bank, Units, inverse_norms
from mhe_dist.bank.class_layout import LabelLayout
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

    def read(self, units: Units) -> tuple[Tensor, Tensor]:
        """Rows `[U, L, D]` of touched units, and `1 / |w|` `[U, L]`, ones if not normalised."""
        return self.bank.read_for_products(units, self.margin.normalised)

    def read_unit_rows(self, units: Units) -> Tensor:
        """What features are multiplied with `[U, L, D]`: normalised rows, if the margin says so."""
        return self.bank.read_for_products(units, self.margin.normalised, scaled=True)[0]

    def inverse_norms(self, rows: Tensor) -> Tensor:
        """`1 / |w|` `[..., L]` of rows `[..., L, D]`, or ones where rows are not normalised."""
        if not self.margin.normalised:
            return rows.new_ones(rows.shape[:-1])
        return inverse_norms(rows)

    def padding(self, heads: Tensor) -> Tensor | None:
        """Which slots `[U, L]` of `heads` (host) hold no class; None if all do."""
        return padding_slots(self.layout, heads, self.bank.device)


def hide(logits: Tensor, index: tuple[Tensor, ...]) -> None:
    """Set logits at an index on their device to -inf, in place.

    `logits[index] = -inf` would make the number on the host and wait until the device has it.
    """
    logits.index_put_(index, logits.new_full((), float("-inf")))


def padding_slots(layout: LabelLayout, heads: Tensor, device: torch.device) -> Tensor | None:
    """Which slots `[U, L]` of distinct `heads` (host) hold no class; None if all do.

    Only the last head has such slots, so that nothing is uploaded.
    """
    first = layout.num_classes - (layout.heads - 1) * layout.length
    where = torch.nonzero(heads == layout.heads - 1).flatten().tolist()
    if first == layout.length or not where:
        return None
    padding = torch.zeros(len(heads), layout.length, dtype=torch.bool, device=device)
    padding[where[0], first:] = True
    return padding
