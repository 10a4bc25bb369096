"""Softmax cross-entropy of gathered samples over the selected rows of all ranks, in closed form.

With unit rows `u`, logits `z = s * cos` (the margin applied to the target) and `p = softmax(z)`,
the gradient of a unit embedding is `s * sum_j q_j u_j` and that of a unit row `s * sum_i q_i e_i`,
where `q = p`, but `(p - 1) * dphi` at the target. The head's `step` turns that into the gradient of
the row itself, once a step (`mhe_dist.bank.row_optim.Dense`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.heads.gathered.scores import GatheredScores, RowChunk


class GatheredSoftmax(GatheredScores):
    """Samples with one label each; see `GatheredScores` for the arguments.

    The first pass finds each sample's normaliser, the second, when that is known over all ranks,
    forms the gradients.
    """

    def normalise(self) -> tuple[Tensor, Tensor]:
        """First pass: losses `[n]`, and 1 where the target beats every other class seen `[n]`.

        The same on every rank; all ranks must call.
        """
        top, highest = self.sum_up()
        sums = torch.stack([(self.log_sum - top).exp(), self.target, self.with_margin])
        total, target, with_margin = all_reduce(sums, self.topology)
        self.log_sum = top + total.log()
        return self.log_sum - with_margin, (target > highest).to(target.dtype)

    def gradients(self, rows_gradient: Tensor, share: float) -> Tensor:
        """Second pass: gradient of the sum of the losses.

        Args:
            rows_gradient: of the selected unit rows `[U * L, width]`; `share` times that of this
                micro-batch is added.
            share: scale of the rows' gradient, `1 / N`.

        Returns:
            The part of the features' gradient that this rank's rows give, `[n, width]`.
        """
        gradient = torch.zeros_like(self.scaled)
        for chunk in self.chunks():
            rows = self.unit_rows(chunk)
            logits = self.kept.pop(chunk.rows.start, None)
            if logits is None:
                logits = self.finish(self.cosines(chunk, rows), chunk)
            q = logits.sub_(self.log_sum.unsqueeze(1)).exp_()
            where = (chunk.samples, chunk.columns)
            q[where] = (q[where] - 1) * self.slope[chunk.targets]
            gradient.addmm_(q, rows)
            rows_gradient[chunk.rows].addmm_(q.T, self.scaled, alpha=share)
        return gradient.mul_(self.scale)

    def finish(self, logits: Tensor, chunk: RowChunk) -> Tensor:
        """Filter, correct and set the targets, in place."""
        super().finish(logits, chunk)
        logits[chunk.samples, chunk.columns] = self.with_margin[chunk.targets]
        return logits
