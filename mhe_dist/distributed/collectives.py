"""Collectives that gradients flow through; each docstring states the scale of the gradient.

Alone (no process group, or one rank) every function is the identity and its gradient too.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.compat import all_gather_single, reduce_scatter_single
from mhe_dist.distributed.topology import Group, Topology

# Bytes that a rank sends at a time in `reduce_scatter`. C libraries take larger blocks of memory
# from the system anew each time, which takes as long as filling them.
PIECE: Final = 1 << 24


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], topology: Topology
    ) -> Tensor:
        """Exchange rows; see `all_to_all`."""
        ctx.send, ctx.receive, ctx.topology = send, receive, topology
        return _exchange(rows, send, receive, topology)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.topology), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], topology: Topology) -> Tensor:
    arrived = rows.new_empty(sum(receive), *rows.shape[1:])
    group = _group_of(rows, topology)
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
    return arrived


def all_to_all(rows: Tensor, send: list[int], receive: list[int], topology: Topology) -> Tensor:
    """Send consecutive rows to the ranks; what arrives is ordered by sender.

    The gradient of a row is what its receiver computed for it, sent back by the mirrored
    exchange, unscaled.

    Args:
        rows: `[sum(send), ...]`, on the device or on the host.
        send: rows for each rank, on the host, so that no device is waited for.
        receive: rows from each rank.

    Returns:
        `[sum(receive), ...]`.
    """
    if topology.world_size == 1:
        return rows
    return _AllToAll.apply(rows, send, receive, topology)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return gather_rows(rows, topology)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Sum every rank's gradients of this rank's rows."""
        topology, grad = ctx.topology, grads[0].contiguous()
        mine = grad.new_empty(grad.shape[0] // topology.world_size, *grad.shape[1:])
        reduce_scatter_single(mine, grad, topology.device_group)
        return mine, None


def all_gather(rows: Tensor, topology: Topology) -> Tensor:
    """Every rank's rows, ordered by rank; all ranks give the same number.

    The gradient of a row is the *sum* of what all ranks computed for it (one reduce-scatter).

    Args:
        rows: `[B, ...]` on the device.

    Returns:
        `[W * B, ...]`.
    """
    if topology.world_size == 1:
        return rows
    return _AllGather.apply(rows, topology)


def gather_rows(rows: Tensor, topology: Topology) -> Tensor:
    """`all_gather` without a gradient, for device or host tensors: `[B, ...]` -> `[W * B, ...]`."""
    if topology.world_size == 1:
        return rows
    group = _group_of(rows, topology)
    gathered = rows.new_empty(topology.world_size * rows.shape[0], *rows.shape[1:])
    all_gather_single(gathered, rows.contiguous(), group)
    return gathered


def all_reduce(values: Tensor, topology: Topology, op: str = "sum") -> Tensor:
    """Reduce `values` over the ranks in place, without a gradient; `op` is sum, max or mean."""
    if topology.world_size > 1:
        group = _group_of(values, topology)
        reduce_op = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        dist.all_reduce(values, op=reduce_op, group=group)
        if op == "mean":
            values /= topology.world_size
    return values


def reduce_scatter(values: Tensor, share: Tensor, topology: Topology) -> None:
    """Sum `values` over the ranks, of which each gets its share, without a gradient.

    On the host ranks send one another their shares and add up what arrives. There gloo's own
    reduce-scatter takes five times as long, since it sends everything twice and to everybody.

    Args:
        values: `[W * P]`, on the device or on the host.
        share: `[P]`, gets the sum; on the host its dtype, in which is summed, may be a wider one.
    """
    ranks = topology.world_size
    if ranks == 1:
        share.copy_(values)
    elif values.device.type != "cpu":
        reduce_scatter_single(share, values, topology.device_group)
    else:
        once, parts = [1] * ranks, values.view(ranks, -1)
        columns = max(1, PIECE // (ranks * values.element_size()))
        for sent, total in zip(parts.split(columns, 1), share.split(columns), strict=True):
            arrived = _exchange(sent, once, once, topology)
            torch.sum(arrived, 0, dtype=share.dtype, out=total)


def broadcast_from_first(value: Any, topology: Topology) -> Any:
    """Rank 0's value, anything that can be pickled, on every rank; all ranks must call."""
    box = [value]
    if topology.world_size > 1:
        dist.broadcast_object_list(box, src=0, group=topology.host_group)
    return box[0]


def broadcast(values: Tensor, source: int, topology: Topology) -> None:
    """Fill a host tensor of any dtype with that of rank `source`, in place; all ranks must call."""
    if topology.world_size > 1 and values.numel():
        # gloo does not know every dtype, and all know bytes.
        data = values.view(-1).view(torch.uint8)
        dist.broadcast(data, src=source, group=topology.host_group)


def sum_small(values: Tensor, topology: Topology) -> Tensor:
    """Sum a small host tensor over the ranks in place, in about log2(W) rounds.

    For few bytes and many ranks: gloo's own reduction takes 2 (W - 1) rounds, one after the other,
    and its gathering W - 1. In a round, ranks exchange what they have with a partner at twice the
    distance (recursive doubling). Ranks beyond the largest power of two let another speak for them.
    """
    rank, group = topology.rank, topology.host_group
    power = 1 << (topology.world_size.bit_length() - 1)
    if rank >= power:
        dist.send(values, rank - power, group=group)
        dist.recv(values, rank - power, group=group)
        return values
    arrived, speaks = torch.empty_like(values), rank + power < topology.world_size
    if speaks:
        dist.recv(arrived, rank + power, group=group)
        values += arrived
    for distance in (1 << bit for bit in range(power.bit_length() - 1)):
        sending = dist.isend(values, rank ^ distance, group=group)
        dist.recv(arrived, rank ^ distance, group=group)
        assert sending is not None, "this rank is in the group"
        sending.wait()
        values += arrived
    if speaks:
        dist.send(values, rank + power, group=group)
    return values


def _group_of(values: Tensor, topology: Topology) -> Group:
    """The process group that carries tensors of that device."""
    return topology.host_group if values.device.type == "cpu" else topology.device_group
