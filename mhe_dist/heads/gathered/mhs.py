"""Multi-Head Sampling by `gather`: every rank scores all samples against its selected heads."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mhe_dist import seeds
from mhe_dist.bank.bank import Units
from mhe_dist.distributed.topology import Topology
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.base import without_repetition
from mhe_dist.heads.gathered.base import GatheredHead
from mhe_dist.heads.gathered.selection import GatheredBatch, Selection
from mhe_dist.heads.row_head import HeadSpec


class MhsGather(GatheredHead):
    """The heads present in the step's global batch, and m extra ones drawn over all heads.

    With `negatives: batch` every sample sees all of these; with `own_plus` its own head and the
    extra ones; with `own` its own alone. The own heads of a sample with several labels are those of
    all of them. See `RowHead` for the arguments.
    """

    def __init__(self, spec: HeadSpec, topology: Topology) -> None:
        config = spec.config.mhs
        super().__init__(spec, topology, config.chosen_length, spec.repartition_steps)
        self.extra_heads = (
            0 if config.negatives == "own" else min(config.chosen_extra_heads, self.layout.heads)
        )
        self._shared = config.negatives == "batch"
        self._present = self._extra = torch.empty(0, dtype=torch.int64)

    def units_of_step(self, step: int, labels: Tensor) -> Tensor:
        """Own heads and extra ones; see `RowHead`."""
        heads = self.layout.locate(labels)[0].flatten()
        return torch.unique(torch.cat([heads, self.draw(step)]))

    def draw(self, step: int) -> Tensor:
        """The extra heads of a step, ascending, int64 on the host."""
        rng = seeds.generator(self.spec.seed, "extra heads", step)
        heads = self.layout.heads
        return torch.from_numpy(seeds.sample_without_replacement(heads, self.extra_heads, rng))

    def select(self, present: Tensor) -> Selection:
        """Present and extra heads; see `GatheredHead`."""
        self._present, self._extra = present, self.draw(self.step_number)
        heads = torch.from_numpy(np.union1d(present.numpy(), self._extra.numpy()))
        return Selection(heads[self.bank.held(heads)], int(self.classes_in(heads).sum()))

    def hidden(self, batch: GatheredBatch, units: Units) -> Tensor | None:
        """Without `batch`, hide heads that are neither extra nor the sample's own."""
        if self._shared:
            return None
        device = self.topology.device
        extra = to_device(_among(self._extra, torch.as_tensor(units)), device)
        return ~(self._own(batch, units) | extra)

    def offsets(self, batch: GatheredBatch, units: Units) -> Tensor | None:
        """`log(1 / q)` of sampled heads, if asked for.

        q is the share that was drawn of the heads that a sample would otherwise not see: of all
        absent heads with `batch`, else of all but its own.
        """
        if not self.spec.config.mhs.correction or not self.extra_heads:
            return None
        device, dtype = self.topology.device, self.spec.dtype
        if self._shared:
            drawn = int((~_among(self._present, self._extra)).sum())
            absent = ~_among(self._present, torch.as_tensor(units))
            q = drawn / max(1, self.layout.heads - len(self._present))
            log = -math.log(q) if drawn else 0.0
            return to_device(absent.to(dtype) * log, device)
        own = without_repetition(batch.units)
        seen = self.extra_heads - _among(self._extra, own).sum(1).to(dtype)
        others = (self.layout.heads - (own >= 0).sum(1)).clamp_min(1)
        # Not a quotient, which rounds otherwise: the bits are those of a number over a tensor.
        offset = (seen.clamp_min(1).reciprocal() * others).log()
        offset = to_device(offset, device).unsqueeze(1)
        return torch.where(self._own(batch, units), 0.0, offset)

    def classes_seen(self, units: Tensor) -> int:
        """Sum of the classes in the samples' softmax; see `GatheredHead`."""
        if self._shared:
            return super().classes_seen(units)
        heads = without_repetition(units)
        own = self.classes_in(heads[(heads >= 0) & ~_among(self._extra, heads)])
        return int(own.sum()) + len(units) * int(self.classes_in(self._extra).sum())

    def _own(self, batch: GatheredBatch, units: Units) -> Tensor:
        """Mask `[n, U]`: whether a unit is a sample's own head, or one of them."""
        device = self.topology.device
        heads = to_device(batch.units, device).unsqueeze(2)
        own = heads == to_device(torch.as_tensor(units), device)
        return own.squeeze(1) if own.shape[1] == 1 else own.any(1)


def _among(heads: Tensor, candidates: Tensor) -> Tensor:
    """Which of `candidates` are in the ascending `heads`."""
    if not len(heads):
        return torch.zeros_like(candidates, dtype=torch.bool)
    return heads[torch.searchsorted(heads, candidates).clamp_max(len(heads) - 1)] == candidates
