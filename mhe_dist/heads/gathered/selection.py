"""Which rows are in a step's softmax, and where each sample's own row is among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.bank.bank import Units


class Selection(NamedTuple):
    """What is in a step's softmax.

    Attributes:
        units: this rank's units, ascending global numbers.
        classes: number of classes over all ranks.
    """

    units: Units
    classes: int


@dataclass(frozen=True)
class GatheredBatch:
    """One micro-batch of every rank; all on the host.

    Attributes:
        samples: `[n]`, positions of the samples that count in the gathered batch `[W * B]`, see
            `mhe_dist.heads.base.sample_labels`.
        mine: the slice of these samples that is this rank's.
        units: `[n, K]`, the units of each one's labels; -1 where it has fewer than K. Its entries
            in order are the *targets*.
        local: `[t]`, numbers of the targets whose class is on this rank, by ascending column.
        columns: `[t]`, their classes' columns among the rows of this rank's selected units.
    """

    samples: Tensor
    mine: slice
    units: Tensor
    local: Tensor
    columns: Tensor


def positions_in(units: Units, members: Tensor) -> Tensor:
    """Position in the ascending `units` of each of `members`, all of which are in it."""
    if isinstance(units, range):
        return members - units.start
    return torch.searchsorted(units, members)
