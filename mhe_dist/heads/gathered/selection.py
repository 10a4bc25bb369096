"""Which rows are in a step's softmax, and where each sample of a micro-batch finds its own."""

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
class GatheredRound:
    """One micro-batch of every rank; all on the host.

    Attributes:
        samples: `[n]`, places of the samples with a label in the gathered batch `[W * B]`.
        mine: the slice of these samples that is this rank's.
        units: `[n]`, the unit of each one's class.
        local: `[t]`, the samples whose class is on this rank, by ascending column.
        columns: `[t]`, their classes' columns among the rows of this rank's selected units.
    """

    samples: Tensor
    mine: slice
    units: Tensor
    local: Tensor
    columns: Tensor


def places(units: Units, wanted: Tensor) -> Tensor:
    """Where each of `wanted`, all of which are there, is in the ascending `units`."""
    if isinstance(units, range):
        return wanted - units.start
    return torch.searchsorted(units, wanted)
