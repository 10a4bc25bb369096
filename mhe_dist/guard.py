"""Whether a run still learns: pure, fed with what a window of steps recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mhe_dist.config import GuardConfig
from mhe_dist.errors import RunError

Record = tuple[int, Mapping[str, float]]

_WARM = 20  # losses before a spike can be told from a beginning
_WEIGHT = 0.05  # of a new loss in the running mean


class Trouble(NamedTuple):
    """What went wrong, and at which step it showed.

    Attributes:
        step: its number, from 0.
        what: in words.
    """

    step: int
    what: str


class Diverged(RunError):
    """The run stopped because it no longer learns; what is needed to see why is on disk."""


class Guard:
    """Looks at the records of each window; the same on all ranks, as the records are.

    It begins anew with each process: a spike is told from the losses that this process saw.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._spike, self._off = config.spike, config.on_divergence == "ignore"
        self._mean, self._seen = 0.0, 0

    def look(self, records: Sequence[Record]) -> Trouble | None:
        """The first trouble in a window's records; None: all is well."""
        if self._off:
            return None
        for step, record in records:
            loss = record["loss"]
            if not math.isfinite(loss):
                return Trouble(step, f"the loss is {loss}")
            if self._spike and self._seen >= _WARM and loss > self._spike * self._mean:
                return Trouble(
                    step,
                    f"the loss is {loss:.4g}, more than guard.spike={self._spike:g} times the "
                    f"running mean {self._mean:.4g}",
                )
            self._seen += 1
            self._mean += max(_WEIGHT, 1 / self._seen) * (loss - self._mean)
        for step, record in records[-1:]:  # had it been an earlier one, a later loss would show it
            if not math.isfinite(norm := record.get("grad_norm", 0.0)):
                return Trouble(step, f"the norm of the gradient is {norm}")
        return None
