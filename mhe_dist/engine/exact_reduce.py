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

from collections.abc import Iterable, Sequence
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
        if stage == 1:
            sums = _SumsInPlace(optimizer)
            optimizer._fill_param_grad_accum_attribute = sums.accumulate
            optimizer.flatten, optimizer.unflatten = sums.flatten, sums.unflatten
        return
    # Of the two ways to reduce, the other divides.
    optimizer.reduce_scatter = False
    optimizer._gradient_averaging_world_size = lambda parameters, world_size: 1
    partitions = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    flat = optimizer.grad_partitions_flat_buffer.to(EXACT_DTYPE)
    optimizer.grad_partitions_flat_buffer = flat
    pieces = flat.split([partition.numel() for partition in partitions.values()])
    partitions.update(zip(partitions, pieces, strict=True))


class _SumsInPlace:
    """What ZeRO 1 sums, where it is reduced: nothing is gathered for the reduction or copied back.

    DeepSpeed makes a float64 gradient for each parameter, puts them one after the other, reduces
    that, copies it back, and puts its share of them one after the other again. Here each gradient
    is summed at its place in one buffer, in the order in which they are reduced.
    """

    def __init__(self, optimizer: Any) -> None:
        self._flatten, self._unflatten = optimizer.flatten, optimizer.unflatten
        self.flat, self._sums = _sums_of(p for group in optimizer.bit16_groups for p in group)

    def accumulate(self, parameter: Any) -> None:
        """Take the gradient that autograd left; `grad_accum` is None before the first of a step."""
        if parameter.grad is None:
            return
        total = self._sums[parameter]
        if parameter.grad_accum is None:
            parameter.grad_accum = total.copy_(parameter.grad)
        else:
            total.add_(parameter.grad)
        parameter.grad = None

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors one after the other; the part of the buffer, if they are that already."""
        begin = end = tensors[0].storage_offset()
        for tensor in tensors:
            is_next = tensor._base is self.flat and tensor.storage_offset() == end
            if not (is_next and tensor.is_contiguous()):
                flat: Tensor = self._flatten(tensors)
                return flat
            end += tensor.numel()
        return self.flat[begin:end]

    def unflatten(self, flat: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parts of what `flatten` gave: the tensors themselves, if it was the buffer's."""
        if flat._base is self.flat:
            return tensors
        parts: Sequence[Tensor] = self._unflatten(flat, tensors)
        return parts


def _sums_of(parameters: Iterable[Tensor]) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """A buffer of zeros for the sums of gradients, and the place of each in it."""
    trained = list(parameters)
    sizes = [p.numel() for p in trained]
    flat = trained[0].new_zeros(sum(sizes), dtype=EXACT_DTYPE)
    pieces = flat.split(sizes)
    return flat, {p: piece.view(p.shape) for p, piece in zip(trained, pieces, strict=True)}


class ExactSum:
    """The gradients of `parameters`, taken from each as autograd leaves them there.

    Attributes:
        flat: float64, the gradients one after the other.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.flat, self._sums = _sums_of(parameters)
        for parameter in self._sums:
            parameter.register_post_accumulate_grad_hook(self._accumulate)

    def _accumulate(self, parameter: Tensor) -> None:
        self._sums[parameter].add_(parameter.grad)  # type: ignore[arg-type]
        parameter.grad = None

    def reduce(self, topology: Topology) -> None:
        """Add up over the ranks; all ranks must call, once per step."""
        all_reduce(self.flat, topology)

    def write_grads(self) -> None:
        """Round the sums into the parameters' `grad` and start again from zero."""
        for parameter, total in self._sums.items():
            parameter.grad = torch.empty_like(parameter).copy_(total)
        self.flat.zero_()
