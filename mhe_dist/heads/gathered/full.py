"""Softmax over all classes, the rows sharded over the ranks."""

from __future__ import annotations

from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.gathered.base import GatheredHead
from mhe_dist.heads.gathered.selection import Selection
from mhe_dist.heads.row_head import HeadSpec

MOST_ROWS, LEAST_UNITS = 1024, 64


class Full(GatheredHead):
    """Every class in every softmax: the reference, whose cost per step grows with C.

    The rows lie in units of up to `MOST_ROWS`, but at least `LEAST_UNITS` units for each group, so
    that the groups have similar sizes. They are read in place and updated in place.
    """

    def __init__(self, spec: HeadSpec, topology: Topology) -> None:
        groups = spec.config.chosen_groups
        length = min(MOST_ROWS, max(1, spec.num_classes // (groups * LEAST_UNITS)))
        super().__init__(spec, topology, length)

    def select(self, present: Tensor) -> Selection:
        """All units; see `GatheredHead`."""
        return Selection(self.bank.units, self.spec.num_classes)
