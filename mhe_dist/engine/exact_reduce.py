"""The sum of a step's gradients, exact, so that it does not depend on the number of ranks.

Micro-batches are canonical (docs/design.md section 5), so the gradient of each is the same at any
W. The order in which they are summed is not, and in float32 that shows: a young network makes 1e-4
of a difference of 1e-7 within a few steps (docs/survival.md). The sum of float32 numbers in float64
is exact, unless one is some 2^26 times another, so any order gives the same bits. The division by
the number of micro-batches and the rounding to float32 come after it, once. The price: twice the
memory and traffic of the gradients.

DeepSpeed's optimizers sum in any dtype, its config names none above float32: at ZeRO 1 to 3 they
are told here. At ZeRO 0 it lets autograd sum in the parameters' dtype; there the sum is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology

EXACT_DTYPE = torch.float64


def sum_dtype(precision: str) -> torch.dtype:
    """What the gradients of a step are summed in, at the precision "bf16" or "float32"."""
    return EXACT_DTYPE if precision == "float32" else torch.float32


def sum_in_float64(optimizer: Any, stage: int) -> None:
    """Let DeepSpeed's ZeRO `optimizer`, not used so far, sum gradients in float64.

    Its own division by the number of ranks must be off (`gradient_allreduce_op`) below stage 3,
    where it is turned off here: it would round before the sum.
    """
    optimizer.gradient_accumulation_dtype = EXACT_DTYPE
    optimizer.communication_data_type = EXACT_DTYPE
    optimizer.get_param_comm_dtype = lambda parameter: EXACT_DTYPE
    (bucket,) = optimizer.ipg_buckets.values()
    optimizer.ipg_buckets = {EXACT_DTYPE: bucket}
    if stage < 3:
        optimizer.use_grad_accum_attribute = True
        optimizer.contiguous_gradients = False  # the contiguous copy has the parameters' dtype
        return
    # Of the two ways to reduce, the other divides.
    optimizer.reduce_scatter = False
    optimizer._gradient_averaging_world_size = lambda parameters, world_size: 1
    partitions = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    flat = optimizer.grad_partitions_flat_buffer.to(EXACT_DTYPE)
    optimizer.grad_partitions_flat_buffer = flat
    pieces = flat.split([partition.numel() for partition in partitions.values()])
    partitions.update(zip(partitions, pieces, strict=True))


class ExactSum:
    """The gradients of `parameters`, taken from each as autograd leaves them there.

    Attributes:
        flat: float64, the gradients one after the other.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        trained = list(parameters)
        sizes = [p.numel() for p in trained]
        self.flat = trained[0].new_zeros(sum(sizes), dtype=EXACT_DTYPE)
        pieces = self.flat.split(sizes)
        self._sums = {p: piece.view_as(p) for p, piece in zip(trained, pieces, strict=True)}
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._accumulate)

    def _accumulate(self, parameter: Tensor) -> None:
        self._sums[parameter].add_(parameter.grad)
        parameter.grad = None

    def reduce(self, topology: Topology) -> None:
        """Add up over the ranks; all ranks must call, once per step."""
        all_reduce(self.flat, topology)

    def write_grads(self) -> None:
        """Round the sums into the parameters' `grad` and start again from zero."""
        for parameter, total in self._sums.items():
            parameter.grad = torch.empty_like(parameter).copy_(total)
        self.flat.zero_()
