"""PartialFC: the classes of the batch and a random share of the others (arXiv 2203.15565)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mhe_dist import seeds
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.gathered.base import GatheredHead
from mhe_dist.heads.gathered.selection import Selection
from mhe_dist.heads.row_head import HeadSpec


class PartialFc(GatheredHead):
    """In each canonical group, the classes of the step and random others up to a share of all.

    The classes of the step are those of its global batch; when they exceed the share, all of them
    are in and no others. A unit of the bank is one class.
    """

    def __init__(self, spec: HeadSpec, topology: Topology) -> None:
        super().__init__(spec, topology, length=1)
        sizes = [len(self.layout.group_heads(group)) for group in range(self.layout.groups)]
        rate = spec.config.partial_fc.rate
        # Rounded first, so that 0.1 * 30 = 3.0000000000000004 is 3.
        self._budgets = torch.tensor([math.ceil(round(rate * size, 6)) for size in sizes])

    def select(self, present: Tensor) -> Selection:
        """Positives and random negatives of this rank's groups; see `GatheredHead`."""
        counts = torch.bincount(self.layout.group_of(present), minlength=self.layout.groups)
        ends = counts.cumsum(0)
        parts = [
            self.draw(self.step_number, group, present[ends[group] - counts[group] : ends[group]])
            for group in self.groups
        ]
        units = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return Selection(units, int(torch.maximum(counts, self._budgets).sum()))

    def draw(self, step: int, group: int, positives: Tensor) -> Tensor:
        """Units of a group in a step's softmax, ascending, from its ascending `positives`."""
        units = self.layout.group_heads(group)
        others = max(0, int(self._budgets[group]) - len(positives))
        rng = seeds.generator(self.spec.seed, "negative classes", step, group)
        drawn = seeds.sample_without_replacement(len(units) - len(positives), others, rng)
        negatives = _skip(torch.from_numpy(drawn) + units.start, positives)
        # NumPy sorts several times as fast as torch on a host.
        return torch.from_numpy(np.sort(torch.cat([positives, negatives]).numpy()))


def _skip(numbers: Tensor, taken: Tensor) -> Tensor:
    """Move `numbers` up past the `taken` ones, both ascending: the rank-preserving map of `[a, b)`
    onto the numbers from `a` on that are not taken.
    """
    free_below = taken - torch.arange(len(taken))
    return numbers + torch.searchsorted(free_below, numbers, right=True)
