"""The sum of a step's gradients over micro-batches and ranks, where it is ours: at ZeRO 0 and 1.

In float32 it is exact (exact_reduce.py): of several micro-batches it is made in float64. The
gradient of one micro-batch is exact as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from mhe_dist.distributed.collectives import all_reduce, reduce_scatter
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.exact_reduce import EXACT_DTYPE, sum_dtype


def kept_dtype(precision: str, micro_batches: int, on_gpu: bool) -> torch.dtype:
    """In which a rank at ZeRO 1 keeps the sum of its own micro-batches' gradients.

    NCCL sums in the dtype of what it is given, so there it is that of the sum.
    """
    return torch.float32 if micro_batches == 1 and not on_gpu else sum_dtype(precision)


class GradientSum(Protocol):
    """Takes the gradients of some parameters, each as autograd leaves it there."""

    @property
    def sums(self) -> list[Tensor]:
        """What this rank has of the sum after `reduce`, one-dimensional."""

    def reduce(self) -> None:
        """Add up over the ranks; all ranks must call, once per step."""

    def hand_over(self) -> None:
        """Give `sums` to the optimizer."""


class _OwnGradients:
    """The sum of a rank's own gradients, each parameter's in a segment of memory."""

    def __init__(self, segments: dict[Tensor, Tensor]) -> None:
        """Take the gradients of the keys of `segments`, as soon as autograd has them."""
        self.segments = segments
        self._taken: set[Tensor] = set()
        for parameter in segments:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        segment = self.segments[parameter]
        if parameter in self._taken:
            segment.add_(parameter.grad)  # type: ignore[arg-type]
        else:
            segment.copy_(parameter.grad)  # type: ignore[arg-type]
            self._taken.add(parameter)
        parameter.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """End the step: what had no part in the loss is zero. The next gradient begins anew."""
        for parameter, segment in self.segments.items():
            if parameter not in self._taken:
                segment.zero_()
        self._taken.clear()


class WholeSum:
    """All of the sum, on every rank, in float64: ZeRO 0."""

    def __init__(self, parameters: Iterable[Tensor], topology: Topology) -> None:
        trained = list(parameters)
        sizes = [p.numel() for p in trained]
        self._topology = topology
        self._flat = trained[0].new_zeros(sum(sizes), dtype=EXACT_DTYPE)
        segments = zip(trained, self._flat.split(sizes), strict=True)
        self._own = _OwnGradients({p: segment.view(p.shape) for p, segment in segments})

    @property
    def sums(self) -> list[Tensor]:
        """float64, the gradients one after the other."""
        return [self._flat]

    def reduce(self) -> None:
        """Add up over the ranks; all ranks must call, once per step."""
        self._own.finish()
        all_reduce(self._flat, self._topology)

    def hand_over(self) -> None:
        """Round the sums into the parameters' `grad`."""
        for parameter, total in self._own.segments.items():
            parameter.grad = torch.empty_like(parameter).copy_(total)


class SharedSum:
    """Of the sum, the share that a rank's optimizer updates: ZeRO 1, in either precision.

    DeepSpeed would give every rank all of it, in the dtype of the exact sum, and copy it into a
    buffer and back. Here it gets its share alone, and nothing is copied for that.
    """

    def __init__(
        self, optimizer: Any, micro_batches: int, precision: str, topology: Topology
    ) -> None:
        """Take over from DeepSpeed's `optimizer`, whose engine must not reduce gradients itself.

        Args:
            optimizer: of ZeRO 1, not used so far.
            micro_batches: of a step, on this rank.
            precision: "bf16" or "float32".
            topology: this rank's position.
        """
        self._optimizer, self._topology = optimizer, topology
        dtype, on_gpu = sum_dtype(precision), topology.device.type != "cpu"
        kept = kept_dtype(precision, micro_batches, on_gpu)
        weights = optimizer.bit16_groups_flat  # padded, so that all shares are equal
        self._flats = [flat.new_zeros(flat.shape, dtype=kept) for flat in weights]
        shares = [len(flat) // topology.world_size for flat in weights]
        self._shares = [
            flat.new_empty(size, dtype=dtype) for flat, size in zip(weights, shares, strict=True)
        ]
        self._own = _OwnGradients(dict(self._find_segments()))
        optimizer.contiguous_gradients = False  # else it would allocate a buffer for its own sums

    @property
    def sums(self) -> list[Tensor]:
        """This rank's share of each of the optimizer's groups."""
        return self._shares

    def _find_segments(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter and its part of `_flats`, where DeepSpeed has its weights."""
        optimizer = self._optimizer
        for flat, parameters, offsets in zip(
            self._flats,
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        ):
            for parameter, offset in zip(parameters, offsets, strict=True):
                segment = flat.narrow(0, offset, parameter.numel())
                yield parameter, segment.view(parameter.shape)

    def reduce(self) -> None:
        """Add up this rank's share; all ranks must call, once per step."""
        self._own.finish()
        for flat, share in zip(self._flats, self._shares, strict=True):
            reduce_scatter(flat, share, self._topology)

    def hand_over(self) -> None:
        """Give the shares to the optimizer, which rounds them to float32."""
        for number, share in enumerate(self._shares):
            self._optimizer.averaged_gradients[number] = [share]
