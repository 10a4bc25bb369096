"""Which rank scores which sample in the `route` exchange: index arithmetic on the host.

Every rank knows the labels of the whole step, so both sides of each exchange compute their split
sizes and the order of what they send and receive; neither sizes nor labels travel, and the device
is never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.distributed.topology import owner_of


@dataclass(frozen=True)
class GroupPart:
    """The samples of one canonical group in a dispatch, a slice of its sorted order.

    Attributes:
        group: number of the group.
        samples: the slice.
        inside: positions in the slice of samples whose own head is one of the extra heads.
        column: for each of these, the column of its class among the extra heads' rows.
    """

    group: int
    samples: slice
    inside: Tensor
    column: Tensor

    @property
    def size(self) -> int:
        """Number of the samples."""
        return int(self.samples.stop - self.samples.start)


@dataclass(frozen=True)
class Dispatch:
    """What one rank sends, receives and scores in one micro-batch.

    Attributes:
        send_order: positions in the rank's micro-batch, grouped by the rank that owns their head.
        send, receive: samples to and from each rank.
        order: sorts what arrived by group, and in a group by micro-batch and position in it.
        sample_numbers: canonical number of each sample in the step, in sorted order.
        heads, slots: own head (global) and slot of each sample in sorted order.
        groups: the parts of the sorted order.
        own: sorted positions of the samples whose own head is not among the extra heads.
    """

    send_order: Tensor
    send: list[int]
    receive: list[int]
    order: Tensor
    sample_numbers: Tensor
    heads: Tensor
    slots: Tensor
    groups: list[GroupPart]
    own: Tensor

    @property
    def own_heads(self) -> Tensor:
        """The own head of each of the samples `own`."""
        return self.heads[self.own]

    @property
    def own_numbers(self) -> Tensor:
        """The canonical number of each of them."""
        return self.sample_numbers[self.own]


def plan_dispatch(
    layout: LabelLayout,
    heads: Tensor,
    slots: Tensor,
    sample_numbers: Tensor,
    extra: dict[int, Tensor],
    rank: int,
) -> Dispatch:
    """Plan one micro-batch of every rank, seen from `rank`.

    Args:
        layout: where classes live.
        heads, slots: int64 `[W, B]`, where the classes of each rank's micro-batch live; a sample
            with head -1 stays out.
        sample_numbers: int64 `[W, B]`, canonical numbers of the samples in the step.
        extra: extra heads (ascending, global) of each group of this rank.
        rank: the rank that gets this plan.
    """
    world_size = heads.shape[0]
    groups = layout.group_of(heads)
    owner = owner_of(groups, layout.groups, world_size)
    mine = torch.argsort(owner[rank], stable=True)
    send = torch.bincount(owner[rank] + 1, minlength=world_size + 1)
    arriving = owner == rank
    head, slot, group = heads[arriving], slots[arriving], groups[arriving]
    column = columns_among_extra(head, slot, group, extra, layout.length)
    order = torch.argsort(group, stable=True)
    column, group = column[order], group[order]
    return Dispatch(
        send_order=mine[int(send[0]) :],
        send=send[1:].tolist(),
        receive=arriving.sum(1).tolist(),
        order=order,
        sample_numbers=sample_numbers[arriving][order],
        heads=head[order],
        slots=slot[order],
        groups=_parts(group, column, list(extra)),
        own=torch.nonzero(column < 0).squeeze(1),
    )


def columns_among_extra(
    head: Tensor, slot: Tensor, group: Tensor, extra: dict[int, Tensor], length: int
) -> Tensor:
    """Column of each sample's class among its group's extra rows, -1 if it is not there."""
    column = torch.full_like(head, -1)
    for number, heads in extra.items():
        if len(heads):
            index = torch.searchsorted(heads, head).clamp_(max=len(heads) - 1)
            found = (group == number) & (heads[index] == head)
            column[found] = (index * length + slot)[found]
    return column


def _parts(group: Tensor, column: Tensor, groups: list[int]) -> list[GroupPart]:
    """Cut samples, sorted by group, into the parts of `groups` (ascending)."""
    bounds = torch.searchsorted(group, torch.tensor([*groups, groups[-1] + 1] if groups else []))
    parts = []
    for number, start, stop in zip(groups, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own_column = column[start:stop]
        inside = torch.nonzero(own_column >= 0).squeeze(1)
        parts.append(GroupPart(number, slice(start, stop), inside, own_column[inside]))
    return parts
