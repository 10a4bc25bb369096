"""Gradients summed in float64, so that the sum does not depend on the number of ranks.

Micro-batches are canonical (docs/design.md section 5), so the gradient of each is the same at any
W. The order in which they are summed is not, and in float32 that shows: a young network makes 1e-4
of a difference of 1e-7 within a few steps (docs/survival.md). The sum of float32 numbers in float64
is exact, unless one is some 2^26 times another, so any order gives the same bits. The division by
the number of micro-batches and the rounding to float32 come after it, once.

At ZeRO 0 and 1 the sum is ours (gradient_sums.py). At ZeRO 2 and 3 DeepSpeed's optimizers sum, in
any dtype, and its config names none above float32: they are told here. The price is twice the
memory and traffic of the gradients.
"""

from __future__ import annotations

from typing import Any

import torch

EXACT_DTYPE = torch.float64


def sum_dtype(precision: str) -> torch.dtype:
    """What the gradients of a step are summed in, at the precision "bf16" or "float32"."""
    return EXACT_DTYPE if precision == "float32" else torch.float32


def sum_in_float64(optimizer: Any, stage: int) -> None:
    """Let DeepSpeed's optimizer of ZeRO 2 or 3, not used so far, sum gradients in float64.

    Its own division by the number of ranks must be off (`gradient_allreduce_op`) at stage 2; at
    stage 3 it is turned off here: it would round before the sum.
    """
    optimizer.gradient_accumulation_dtype = EXACT_DTYPE
    optimizer.communication_data_type = EXACT_DTYPE
    optimizer.get_param_comm_dtype = lambda parameter: EXACT_DTYPE
    (bucket,) = optimizer.ipg_buckets.values()
    optimizer.ipg_buckets = {EXACT_DTYPE: bucket}
    if stage == 2:
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
