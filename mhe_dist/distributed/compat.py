"""Collectives that torch 2.14 renamed, by whichever name this torch has."""

from __future__ import annotations

from typing import Final

import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.topology import Group

_OLD_NAMES: Final = {
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
}


def collective_name(name: str) -> str:
    """What `torch.distributed` calls a collective; torch before 2.14 has the old names only."""
    return name if hasattr(dist, name) else _OLD_NAMES[name]


def all_gather_single(gathered: Tensor, rows: Tensor, group: Group) -> None:
    """Every rank's `rows` `[B, ...]` into `gathered` `[W * B, ...]`, ordered by rank."""
    getattr(dist, collective_name("all_gather_single"))(gathered, rows, group=group)


def reduce_scatter_single(mine: Tensor, rows: Tensor, group: Group) -> None:
    """This rank's part of the sum of all ranks' `rows` `[W * B, ...]` into `mine` `[B, ...]`."""
    getattr(dist, collective_name("reduce_scatter_single"))(mine, rows, group=group)
