"""Samples of all groups against their groups' extra heads, on a GPU: one buffer of logits.

The rows of all groups are read at once, and the passes over logits are kernels that take all groups
together. Import it where kernels may compute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mhe_dist.bank.row_optim import SharedFactors
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.batch_invariant import LEAST_ROWS, product
from mhe_dist.heads.class_rows import ClassRows
from mhe_dist.heads.routed.dispatch import GroupPart
from mhe_dist.heads.routed.extra_gradient import ExtraGradients
from mhe_dist.kernels.extra_softmax import (
    ExtraTable,
    TargetStatistics,
    extra_statistics,
    extra_weights,
)
from mhe_dist.kernels.negatives import Negatives


class ExtraLogits:
    """Logits of samples over their groups' extra heads.

    Args:
        class_rows: the rows of this rank.
        features: `[n, D]`, sorted by group.
        parts: the groups that have samples and extra heads.
        extra: extra heads of each group.
        correction: whether `log(1 / q)` is added to sampled negatives.

    Attributes:
        all_rows: the normalised extra rows of all parts, one after the other.
        rows: those of each part `[m * L, D]`.
        blocks: the logits `[n, m * L]` of each part's samples; parts of `buffer`.
    """

    def __init__(
        self,
        class_rows: ClassRows,
        features: Tensor,
        parts: list[GroupPart],
        extra: dict[int, Tensor],
        correction: bool,
    ) -> None:
        self.class_rows, self.features, self.parts = class_rows, features, parts
        self.negatives = negatives_of(class_rows)
        self.heads = [extra[part.group] for part in parts]
        widths = [len(heads) * class_rows.layout.length for heads in self.heads]
        sizes = [part.size * width for part, width in zip(parts, widths, strict=True)]
        self.buffer = features.new_empty(sum(sizes))
        self.blocks = [
            block.view(-1, width)
            for block, width in zip(self.buffer.split(sizes), widths, strict=True)
        ]
        self.all_rows = self._read(class_rows)
        self.rows = self.all_rows.split(widths)
        self.table = self._table(len(features), correction)
        self._multiply()

    def statistics(self) -> TargetStatistics:
        """First pass over the logits."""
        return extra_statistics(self.buffer, self.table, self.negatives)

    def form_weights(self, log_sum: Tensor, with_margin: Tensor, slope: Tensor) -> None:
        """Second pass: `blocks` are the derivatives then; see `extra_weights`."""
        extra_weights(self.buffer, self.table, self.negatives, log_sum, with_margin, slope)

    def add_gradient(self, gradient: Tensor) -> None:
        """Add what `blocks` make of the rows to the gradient of the features `[n, D]`."""
        scale = self.negatives.scale
        for part, rows, block in zip(self.parts, self.rows, self.blocks, strict=True):
            if part.size < LEAST_ROWS:
                gradient[part.samples].add_(product(block, rows), alpha=scale)
            else:
                gradient[part.samples].addmm_(block, rows, alpha=scale)

    def add_row_gradient(self, sums: ExtraGradients, numbers: Tensor, share: float) -> None:
        """Add the gradient of the rows, of which `blocks` and the features are the factors.

        Args:
            sums: where it is added.
            numbers: canonical numbers of the samples `[n]`, host.
            share: scale of the gradient.
        """
        features = self.features * (self.negatives.scale * share)
        largest = max((part.size for part in self.parts), default=0)
        if self.parts and sums.takes_factors(largest, features.shape[1]):
            length, normalised = self.table.length, sums.of_normalised
            factors = SharedFactors(self.buffer, features, self._unit_places(), length, normalised)
            sums.keep(torch.cat(self.heads), factors)
            return
        for part, weights in zip(self.parts, self.blocks, strict=True):
            sums[part.group].add(numbers[part.samples], weights, features[part.samples])

    def _unit_places(self) -> Tensor:
        """Where the weights and samples of each extra head are; see `SharedFactors`."""
        places, first = [], 0
        for part, heads in zip(self.parts, self.heads, strict=True):
            count = len(heads)
            table = torch.tensor([[first], [count], [part.samples.start], [part.size]])
            table = table.repeat(1, count)
            table[0] += torch.arange(count)
            places.append(table)
            first += part.size * count
        return torch.cat(places, dim=1)

    def _read(self, class_rows: ClassRows) -> Tensor:
        """The rows of all groups, read at once."""
        if not self.heads:
            return self.features[:0]
        rows: Tensor = class_rows.read_unit_rows(torch.cat(self.heads)).flatten(0, 1)
        return rows

    def _table(self, count: int, correction: bool) -> ExtraTable:
        """Where the logits of each sample lie, planned on the host and sent at once."""
        layout, first = self.class_rows.layout, 0
        places, offsets = torch.zeros(4, count, dtype=torch.int64), torch.zeros(count)
        places[3] = -1
        for part, heads, block in zip(self.parts, self.heads, self.blocks, strict=True):
            width = block.shape[1]
            places[0, part.samples] = first + torch.arange(part.size) * width
            places[1, part.samples] = width
            # Slots without a class are the last ones of the last head.
            missing = (int(heads[-1]) + 1) * layout.length - layout.num_classes
            places[2, part.samples] = width - max(0, missing)
            places[3, part.inside + part.samples.start] = part.column
            others, seen = max(1, layout.heads - 1), max(1, len(heads) - 1)
            offsets[part.samples] = math.log(others / len(heads))
            offsets[part.inside + part.samples.start] = math.log(others / seen)
            first += block.numel()
        device, widest = self.buffer.device, max((len(rows) for rows in self.rows), default=0)
        return ExtraTable(
            to_device(places, device),
            to_device(offsets, device) if correction else None,
            layout.length,
            widest,
            self.buffer.nbytes,
        )

    def _multiply(self) -> None:
        scaled = self.features * self.negatives.scale
        for part, rows, block in zip(self.parts, self.rows, self.blocks, strict=True):
            if part.size < LEAST_ROWS:
                block.copy_(product(scaled[part.samples], rows.T))
            else:
                torch.mm(scaled[part.samples], rows.T, out=block)


def negatives_of(class_rows: ClassRows) -> Negatives:
    """What the margin makes of the logits of negatives."""
    return Negatives(class_rows.margin.scale, class_rows.margin.filter)
