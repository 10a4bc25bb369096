"""Which permutation of the classes is in force, and moving rows when another one comes.

With `mhs.repartition_every` a class meets other neighbours in its head every N epochs. Rows and
optimizer state move as they are, bit for bit; a row that no step met stays what its class says.
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
        every: steps after which the next permutation comes; 0: never.
    """

    num_classes: int
    length: int
    groups: int
    seed: int
    every: int

    def number(self, step: int) -> int:
        """Number of the permutation at a step."""
        return step // self.every if self.every else 0

    def layout(self, number: int) -> LabelLayout:
        """Where each class lives under a permutation."""
        key = seeds.derive(self.seed, "class permutation", number)
        return LabelLayout(self.num_classes, self.length, self.groups, key)


def move(
    old: Bank, new: Bank, layouts: tuple[LabelLayout, LabelLayout], topology: Topology
) -> None:
    """Bring the touched rows of all ranks' `old` banks to where the second layout has them.

    All ranks must call. Cost: the touched rows once through the host and the exchange; both banks
    are in memory meanwhile.
    """
    units = old.touched
    unit_bytes = sum(rows.nbytes for rows in old.saved(units[:1]).values()) or 1
    at_once = max(1, MOVED_BYTES // unit_bytes)
    turns = torch.tensor([-(-len(units) // at_once)])
    for turn in range(int(all_reduce(turns, topology, "max"))):
        part = units[turn * at_once : (turn + 1) * at_once]
        _exchange(old, new, part, layouts, topology)


def _exchange(
    old: Bank,
    new: Bank,
    units: Tensor,
    layouts: tuple[LabelLayout, LabelLayout],
    topology: Topology,
) -> None:
    """Move the rows of some of this rank's units, and take what the others move here."""
    before, after = layouts
    classes = before.classes(units[:, None], torch.arange(before.length)).flatten()
    known = classes >= 0
    heads, slots = after.locate(classes[known])
    owner = owner_of(after.group_of(heads), after.groups, topology.world_size)
    order = torch.argsort(owner, stable=True)
    send = torch.bincount(owner, minlength=topology.world_size)
    ones = [1] * topology.world_size
    sizes = send.tolist(), all_to_all(send, ones, ones, topology).tolist()
    where = all_to_all(torch.stack([heads, slots], 1)[order], *sizes, topology)
    new.touch(torch.unique(where[:, 0]))
    for field, rows in old.saved(units).items():
        mine = rows.flatten(0, 1)[known][order].contiguous()
        # As bytes: not every backend carries every type.
        arrived = all_to_all(mine.view(torch.uint8), *sizes, topology).view(rows.dtype)
        new.place(field, where[:, 0], where[:, 1], arrived)
