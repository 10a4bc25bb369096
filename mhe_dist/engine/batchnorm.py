"""BatchNorm's running statistics as a function of the step, not of the number of ranks.

Every micro-batch of a step updates the statistics once, from the values at the step's start; the
step's result is the mean over its micro-batches (docs/design.md section 5). The sum is taken in
float64, so its order does not show (exact_reduce.py says why that matters): one small reduction per
step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology


class RunningStatistics:
    """The BatchNorm buffers of a model, brought through the micro-batches of a step.

    Call `begin_micro_batch` before and `end_micro_batch` after each training forward,
    `finish_step` once per step.
    `num_batches_tracked` then counts steps.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.values: list[Tensor] = [
            b for m in norms for b in (m.running_mean, m.running_var) if b is not None
        ]
        self._counters = [
            (m, m.num_batches_tracked) for m in norms if m.num_batches_tracked is not None
        ]
        self._counts = [count for _, count in self._counters]
        self._counting: list[Tensor] = []  # of the norms that were not frozen in the micro-batch
        self._start = [torch.empty_like(b) for b in self.values]
        self._start_counts = [torch.empty_like(b) for b in self._counts]
        self._sums = [torch.empty_like(b, dtype=torch.float64) for b in self.values]
        self._seen = 0

    @property
    def in_step(self) -> bool:
        """Whether the buffers are those of a micro-batch: of this rank, in a step begun."""
        return self._seen > 0

    @torch.no_grad()
    def begin_micro_batch(self) -> None:
        """Before a training forward: back to the values at the step's start.

        Counters that the forward pass does not need are taken out of the model until
        `end_micro_batch`: each would be a launch of its own.
        """
        if not self.values:
            return
        if self._seen == 0:
            torch._foreach_copy_(self._start, self.values)
            torch._foreach_copy_(self._start_counts, self._counts)
        else:
            torch._foreach_copy_(self.values, self._start)
            torch._foreach_copy_(self._counts, self._start_counts)
        for norm, _ in self._counters:
            if _does_without_counter(norm):
                norm.num_batches_tracked = None

    @torch.no_grad()
    def end_micro_batch(self) -> None:
        """After a training forward: remember what it made of the statistics."""
        if not self.values:
            return
        if self._seen == 0:
            torch._foreach_copy_(self._sums, self.values)
        else:
            torch._foreach_add_(self._sums, self.values)
        for norm, count in self._counters:
            norm.num_batches_tracked = count
        self._counting = [count for norm, count in self._counters if norm.training]
        self._seen += 1

    @torch.no_grad()
    def finish_step(self, topology: Topology) -> None:
        """At the end of a step: the mean over the micro-batches of all ranks; all ranks must call.

        What a forward pass that was repeated in the backward pass (gradient checkpointing) made of
        the statistics is forgotten.
        """
        if self._seen and self.values:
            sums = all_reduce(torch.cat([s.flatten() for s in self._sums]), topology)
            sums /= self._seen * topology.world_size
            pieces = sums.split([b.numel() for b in self.values])
            torch._foreach_copy_(
                self.values, [p.view_as(b) for p, b in zip(pieces, self.values, strict=True)]
            )
            torch._foreach_copy_(self._counts, self._start_counts)
            if self._counting:
                torch._foreach_add_(self._counting, 1)
        self._seen = 0


def _does_without_counter(norm: _BatchNorm) -> bool:
    """Whether a training forward does without `num_batches_tracked`."""
    return norm.momentum is not None and not isinstance(norm, nn.SyncBatchNorm)
