"""Samples with up to K labels over the selected rows of all ranks, in closed form.

As in `softmax.py`, with `q_j = dL/dz_j`: of a negative `push * exp(z_j - S)`, of a label `-pull *
dphi` (see `mhe_dist.heads.objectives`). Of each sample `3 + 2 K` numbers are all-reduced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.class_rows import hide
from mhe_dist.heads.gathered.scores import GatheredScores, SelectedRows
from mhe_dist.heads.gathered.selection import GatheredBatch
from mhe_dist.heads.objectives import LabelObjective


class GatheredLabels(GatheredScores):
    """Samples with any number of labels; see `GatheredScores` for the other arguments.

    Args:
        objective: what is made of the sums.
    """

    def __init__(
        self,
        selected: SelectedRows,
        batch: GatheredBatch,
        features: Tensor,
        norms: Tensor | None,
        topology: Topology,
        objective: LabelObjective,
    ) -> None:
        super().__init__(selected, batch, features, norms, topology)
        self.objective = objective
        self.push = self.pull = torch.empty(0)

    def normalise(self) -> tuple[Tensor, Tensor]:
        """First pass: losses `[n]`, and 1 where a label beats every class that is none `[n]`.

        The same on every rank; all ranks must call.
        """
        top, highest = self.sum_up()
        # Where all classes of a sample are its labels, it has no negatives on any rank.
        top = top.masked_fill(top == float("-inf"), 0)
        sums = torch.cat([(self.log_sum - top).exp(), self.target, self.with_margin])
        total, target, with_margin = all_reduce(sums, self.topology).split(
            [len(top), len(self.target), len(self.target)]
        )
        self.log_sum = top + total.log()
        shape = self.batch.units.shape
        mask = to_device(self.batch.units >= 0, target.device)
        found = self.objective(self.log_sum, with_margin.view(shape), mask)
        self.push, self.pull = found.push, found.pull.flatten()
        best = target.view(shape).masked_fill(~mask, float("-inf")).amax(1)
        return found.losses, (best > highest).to(target.dtype)

    def gradients(self, rows_gradient: Tensor, share: float) -> Tensor:
        """Second pass: gradient of the sum of the losses; see `GatheredSoftmax.gradients`."""
        gradient = torch.zeros_like(self.scaled)
        shift = (self.log_sum - self.push.log()).masked_fill(self.push == 0, float("inf"))
        for chunk in self.chunks():
            rows = self.unit_rows(chunk)
            logits = self.kept.pop(chunk.rows.start, None)
            if logits is None:
                logits = self.cosines(chunk, rows)
                hide(logits, (chunk.samples, chunk.columns))
                self.finish(logits, chunk)
            q = logits.sub_(shift.unsqueeze(1)).exp_()
            slope, pull = self.slope[chunk.targets], self.pull[chunk.targets]
            q[chunk.samples, chunk.columns] = -pull * slope
            gradient.addmm_(q, rows)
            rows_gradient[chunk.rows].addmm_(q.T, self.scaled, alpha=share)
        return gradient.mul_(self.scale)
