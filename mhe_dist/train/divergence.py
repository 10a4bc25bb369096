"""Whether a run still learns: pure, fed with what a window of steps recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mhe_dist.config.schema import GuardConfig
from mhe_dist.errors import RunError

Record = tuple[int, Mapping[str, float]]

_WARM = 20  # losses before a spike can be told from a beginning
_WEIGHT = 0.05  # of a new loss in the running mean


class Divergence(Exception):
    """A step showed that the run no longer learns; whoever runs it decides what follows.

    Attributes:
        step: its number, from 0.
        reason: in words.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason = step, reason


class Diverged(RunError):
    """The run stopped because it no longer learns; what is needed to see why is on disk."""


class Guard:
    """Looks at the records of each window; the same on all ranks, as the records are.

    It begins anew with each process: a spike is told from the losses that this process saw.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._spike, self._off = config.spike, config.on_divergence == "ignore"
        self._mean, self._seen = 0.0, 0

    def check(self, records: Sequence[Record]) -> None:
        """See whether a window's records are sound.

        Raises:
            Divergence: the first step that is not.
        """
        if self._off:
            return
        for step, record in records:
            loss = record["loss"]
            if not math.isfinite(loss):
                raise Divergence(step, f"the loss is {loss}")
            if self._spike and self._seen >= _WARM and loss > self._spike * self._mean:
                raise Divergence(
                    step,
                    f"the loss is {loss:.4g}, more than guard.spike={self._spike:g} times the "
                    f"running mean {self._mean:.4g}",
                )
            self._seen += 1
            self._mean += max(_WEIGHT, 1 / self._seen) * (loss - self._mean)
        for step, record in records[-1:]:  # had it been an earlier one, a later loss would show it
            if not math.isfinite(norm := record.get("grad_norm", 0.0)):
                raise Divergence(step, f"the norm of the gradient is {norm}")
