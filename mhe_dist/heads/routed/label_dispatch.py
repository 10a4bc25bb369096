"""Which rank scores which sample in the `route` exchange, if samples have several labels.

As in `dispatch.py`, all of it is index arithmetic on the host. An embedding travels once to each
rank that owns one of the sample's labels. A few numbers for each label travel back and forth, since
the loss of a sample joins the sums of all its heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.distributed.topology import owner_of
from mhe_dist.heads.base import without_repetition
from mhe_dist.heads.routed.dispatch import columns_among_extra


class Meetings(NamedTuple):
    """Distinct pairs of a unit (an own head, or a group) and an arrived sample, sorted by both.

    Attributes:
        units: `[p]`.
        samples: `[p]`, positions among the arrived samples.
        first: `[p]`, the first of the arrived labels that led to each pair.
        labels: `[q]`, those of the arrived labels that led to some pair, ascending.
        of_labels: `[q]`, the pair of each.
    """

    units: Tensor
    samples: Tensor
    first: Tensor
    labels: Tensor
    of_labels: Tensor

    @staticmethod
    def of(units: Tensor, samples: Tensor, chosen: Tensor) -> Meetings:
        """Those of the arrived labels that the mask `chosen` `[T]` names.

        Args:
            units, samples: of the arrived labels `[T]`.
            chosen: which of them count.
        """
        labels = torch.nonzero(chosen).squeeze(1)
        count = int(samples[-1]) + 1 if len(samples) else 1
        keys = units[labels] * count + samples[labels]
        found = np.unique(keys.numpy(), return_index=True, return_inverse=True)
        unique, first, inverse = map(torch.from_numpy, found)
        return Meetings(unique // count, unique % count, labels[first], labels, inverse)

    def source(self, total: int) -> Tensor:
        """For each of `total` arrived labels, the pair that it is the first one of, else `p`."""
        source = torch.full((total,), len(self.units))
        source[self.first] = torch.arange(len(self.units))
        return source

    def table(self) -> Tensor:
        """The labels of each pair `[p, k]`, -1 where it has fewer than others."""
        order = torch.argsort(self.of_labels, stable=True)
        pair = self.of_labels[order]
        counts = torch.bincount(pair, minlength=len(self.units))
        rank = torch.arange(len(pair)) - (counts.cumsum(0) - counts)[pair]
        table = torch.full((len(self.units), int(counts.max()) if len(pair) else 1), -1)
        table[pair, rank] = self.labels[order]
        return table


@dataclass(frozen=True)
class GroupVisits:
    """The samples that meet the extra heads of one group, a slice of the visits.

    Attributes:
        group: number of the group.
        visits: the slice.
        labels: the arrived labels `[q]` whose own head is one of the extra heads.
        rows, columns: of each of these, its visit in the slice, and the column of its class among
            the extra heads' rows.
    """

    group: int
    visits: slice
    labels: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def size(self) -> int:
        """Number of the samples."""
        return int(self.visits.stop - self.visits.start)


@dataclass(frozen=True)
class LabelDispatch:
    """What one rank sends, receives and scores in one micro-batch; all on the host.

    Attributes:
        size: K, entries of a sample's list, and `batch`: B.
        samples: positions in the rank's micro-batch, in the order in which their embeddings leave.
        send, receive: embeddings to and from each rank.
        labels: positions in the lists `[B * K]` of this rank's labels, grouped by owner.
        labels_send, labels_receive: labels to and from each rank.
        sample_numbers: canonical number of each sample that arrives `[n]`, ascending.
        offsets: `log(1 / q)` of its sampled negatives `[n]`; None: there is no correction.
        label_samples, slots: of each label that arrives `[T]`, its sample and its class's slot.
        pairs: own heads that are not among the extra ones, with their samples.
        visits: groups that have extra heads, with their samples.
        groups: parts of the visits.
    """

    size: int
    batch: int
    samples: Tensor
    send: list[int]
    receive: list[int]
    labels: Tensor
    labels_send: list[int]
    labels_receive: list[int]
    sample_numbers: Tensor
    offsets: Tensor | None
    label_samples: Tensor
    slots: Tensor
    pairs: Meetings
    visits: Meetings
    groups: list[GroupVisits]

    @property
    def own_heads(self) -> Tensor:
        """The head of each pair."""
        return self.pairs.units

    @property
    def own_numbers(self) -> Tensor:
        """The canonical number of each pair's sample."""
        return self.sample_numbers[self.pairs.samples]


def plan_label_dispatch(
    layout: LabelLayout,
    heads: Tensor,
    slots: Tensor,
    sample_numbers: Tensor,
    extra: dict[int, Tensor],
    drawn: dict[int, Tensor] | None,
    rank: int,
) -> LabelDispatch:
    """Plan one micro-batch of every rank, seen from `rank`.

    Args:
        layout: where classes live.
        heads, slots: int64 `[W, B, K]`, where the classes of each rank's micro-batch live; -1 where
            a sample has no label more.
        sample_numbers: int64 `[W, B]`, canonical numbers of the samples in the step.
        extra: extra heads (ascending, global) of each group of this rank.
        drawn: those of every group that is present, by which sampled negatives are corrected; None:
            they are not.
        rank: the rank that gets this plan.
    """
    world_size, batch, size = heads.shape
    groups = layout.group_of(heads)
    owner = owner_of(groups, layout.groups, world_size)
    labels, labels_send = _by_owner(owner[rank].flatten(), world_size)
    sample, to = labels // size, owner[rank].flatten()[labels]
    leaves = torch.ones_like(labels, dtype=torch.bool)
    leaves[1:] = (sample.diff() != 0) | (to.diff() != 0)
    arriving = owner == rank
    here = arriving.any(-1)
    position = (here.flatten().cumsum(0) - 1).view(world_size, batch, 1).expand_as(heads)
    head, slot, group = heads[arriving], slots[arriving], groups[arriving]
    column = columns_among_extra(head, slot, group, extra, layout.length)
    arrived = position[arriving]
    has_extra = torch.tensor([g for g, drawn_heads in extra.items() if len(drawn_heads)])
    visits = Meetings.of(group, arrived, torch.isin(group, has_extra))
    return LabelDispatch(
        size=size,
        batch=batch,
        samples=sample[leaves],
        send=torch.bincount(to[leaves], minlength=world_size).tolist(),
        receive=here.sum(1).tolist(),
        labels=labels,
        labels_send=labels_send,
        labels_receive=arriving.sum((1, 2)).tolist(),
        sample_numbers=sample_numbers[here],
        offsets=None if drawn is None else sampled_offsets(layout, heads[here], drawn),
        label_samples=arrived,
        slots=slot,
        pairs=Meetings.of(head, arrived, column < 0),
        visits=visits,
        groups=_parts(visits, column, has_extra.tolist()),
    )


def sampled_offsets(layout: LabelLayout, heads: Tensor, drawn: dict[int, Tensor]) -> Tensor:
    """`log(1 / q)` of samples `[n]`, float64; q is the share of the other heads that each sees.

    Args:
        layout: where classes live.
        heads: own heads `[n, K]`, -1 for none.
        drawn: the extra heads of every group of theirs, groups and heads ascending.
    """
    own, groups = without_repetition(heads), without_repetition(layout.group_of(heads))
    counts = torch.tensor([*(len(drawn.get(g, ())) for g in range(layout.groups)), 0])
    table = torch.cat([torch.empty(0, dtype=torch.int64), *drawn.values()])
    index = torch.searchsorted(table, own).clamp_max_(max(0, len(table) - 1))
    among = table[index] == own if len(table) else torch.zeros_like(own, dtype=torch.bool)
    seen = counts[groups].sum(1) - among.sum(1)
    others = layout.heads - (own >= 0).sum(1)
    return (others.clamp_min(1).double() / seen.clamp_min(1)).log()


def _by_owner(owner: Tensor, world_size: int) -> tuple[Tensor, list[int]]:
    """Positions in `owner`, -1 left out, grouped by owner; and how many each has."""
    counts = torch.bincount(owner + 1, minlength=world_size + 1)
    return torch.argsort(owner, stable=True)[int(counts[0]) :], counts[1:].tolist()


def _parts(visits: Meetings, column: Tensor, groups: list[int]) -> list[GroupVisits]:
    """Cut the visits, sorted by group, into those of `groups` (ascending)."""
    inside = torch.nonzero(column[visits.labels] >= 0).squeeze(1)
    inside = inside[torch.argsort(visits.of_labels[inside], stable=True)]
    labels, rows = visits.labels[inside], visits.of_labels[inside]
    bounds = torch.searchsorted(visits.units, torch.tensor([*groups, 1 << 62]))
    cuts = torch.searchsorted(rows, bounds).tolist()
    parts = []
    for number, group in enumerate(groups):
        start, stop = int(bounds[number]), int(bounds[number + 1])
        here = slice(cuts[number], cuts[number + 1])
        chosen = labels[here]
        parts.append(
            GroupVisits(group, slice(start, stop), chosen, rows[here] - start, column[chosen])
        )
    return [part for part in parts if part.visits.stop > part.visits.start]
