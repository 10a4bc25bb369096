"""Which permutation of the classes applies, and how rows move when it changes.

With `mhs.repartition_every` a class gets other neighbours in its head every N epochs. Rows and
optimizer state move bit for bit; a row that no step touched is drawn from its class as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mhe_dist import seeds
from mhe_dist.bank.bank import Bank
from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.distributed.collectives import all_reduce, all_to_all
from mhe_dist.distributed.topology import Topology, owner_of

MOVED_BYTES: Final = 1 << 26  # of rows in one exchange


@dataclass(frozen=True)
class Permutations:
    """The permutations of a run, by number.

    Attributes:
        num_classes, length, groups: of the layout.
        seed: of the run.
        every: steps after which the permutation changes; 0: never.
        steps: of the run, whose last permutation holds for `every` steps at least, so that no class
            ends among neighbours that it has hardly seen; 0: without an end.
    """

    num_classes: int
    length: int
    groups: int
    seed: int
    every: int
    steps: int = 0

    def number(self, step: int) -> int:
        """Number of the permutation at a step."""
        if not self.every:
            return 0
        last = max(0, self.steps // self.every - 1) if self.steps else step
        return min(step // self.every, last)

    def layout(self, number: int) -> LabelLayout:
        """Where each class lives under a permutation."""
        key = seeds.derive(self.seed, "class permutation", number)
        return LabelLayout(self.num_classes, self.length, self.groups, key)


def move_rows(
    old: Bank, new: Bank, before: LabelLayout, after: LabelLayout, topology: Topology
) -> None:
    """Move the touched rows of all ranks from `old` banks, laid out as `before`, to `new` ones.

    All ranks must call. Cost: the touched rows travel once through the host and the exchange; both
    banks are in memory meanwhile.
    """
    units = old.touched
    per_chunk = max(1, MOVED_BYTES // old.unit_bytes)
    chunks = torch.tensor([-(-len(units) // per_chunk)])
    for number in range(int(all_reduce(chunks, topology, "max"))):
        chunk = units[number * per_chunk : (number + 1) * per_chunk]
        _exchange(old, new, chunk, before, after, topology)


def _exchange(
    old: Bank,
    new: Bank,
    units: Tensor,
    before: LabelLayout,
    after: LabelLayout,
    topology: Topology,
) -> None:
    """Move the rows of some of this rank's units, and store the rows that arrive here."""
    classes = before.classes(units[:, None], torch.arange(before.length)).flatten()
    known = classes >= 0
    heads, slots = after.locate(classes[known])
    owner = owner_of(after.group_of(heads), after.groups, topology.world_size)
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=topology.world_size)
    ones = [1] * topology.world_size
    send, receive = counts.tolist(), all_to_all(counts, ones, ones, topology).tolist()
    arrived = all_to_all(torch.stack([heads, slots], 1)[order], send, receive, topology)
    heads, slots = arrived.unbind(1)
    new.touch(torch.unique(heads))
    saved = old.saved(units)
    for field in filter(saved.__contains__, new.fields):  # state that one of them lacks stays zero
        rows = saved[field]
        leaving = rows.tensor().flatten(0, 1)[known][order].contiguous()
        # As bytes: not every backend carries every type.
        moved = all_to_all(leaving.view(torch.uint8), send, receive, topology).view(rows.dtype)
        new.put_rows(field, heads, slots, moved)
