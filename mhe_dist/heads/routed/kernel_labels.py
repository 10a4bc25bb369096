"""The extra heads of samples with several labels on a GPU, where `RoutedLabels` is the definition.

The passes over logits are kernels, all groups lie in one buffer, and the gradient of the features
is formed in the second pass, from the weights themselves. Import it where kernels may compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.class_rows import hide
from mhe_dist.heads.routed.dispatch import GroupPart
from mhe_dist.heads.routed.extra_gradient import ExtraGradients
from mhe_dist.heads.routed.extra_logits import ExtraLogits
from mhe_dist.heads.routed.several_labels import RoutedLabels


class KernelLabels(RoutedLabels):
    """See `RoutedLabels`; for negatives that are not corrected."""

    def _score_extras(self, extra: dict[int, Tensor]) -> None:
        """First pass over all extra rows."""
        none = torch.empty(0, dtype=torch.int64)
        parts = [GroupPart(part.group, part.visits, none, none) for part in self.dispatch.groups]
        self._visitors = self.features[self.visits.samples]
        self._logits = ExtraLogits(self.class_rows, self._visitors, parts, extra, False)
        self._inside, self._where, rows = self._labels_inside()
        logits = self._logits.buffer
        self._store(self._inside, logits[self._where] / self.scale, self._logits.all_rows[rows])
        hide(logits, (self._where,))
        found = self._logits.statistics()
        self.visits.log_sum[:-1], self.visits.highest[:-1] = found.log_sum, found.highest

    def _labels_inside(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels whose class is among the extra rows; where their logits, and their rows, are."""
        label, where, rows = [], [], []
        first, first_row = 0, 0
        for part, block in zip(self.dispatch.groups, self._logits.blocks, strict=True):
            label.append(part.labels)
            where.append(first + part.rows * block.shape[1] + part.columns)
            rows.append(first_row + part.columns)
            first, first_row = first + block.numel(), first_row + block.shape[1]
        table = torch.stack([torch.cat(parts) for parts in (label, where, rows)])
        inside, places, row = to_device(table, self.device)
        return inside, places, row

    def _extra_gradients(
        self, shift: Tensor, coefficient: Tensor, sums: ExtraGradients, share: float
    ) -> Tensor:
        """Second pass over all extra rows; see `RoutedLabels`."""
        logits, dispatch = self._logits, self.dispatch
        first = to_device(dispatch.visits.first, self.device)
        none = torch.zeros_like(shift[first])
        logits.form_weights(shift[first], none, none)
        gradient = torch.zeros_like(self._visitors)
        logits.add_gradient(gradient)
        logits.buffer[self._where] = coefficient[self._inside] / self.scale
        logits.add_row_gradient(sums, dispatch.sample_numbers[dispatch.visits.samples], share)
        return gradient
