"""Whether a run still learns: pure, fed with what a window of steps recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mhe_dist.config.schema import GuardConfig
from mhe_dist.errors import RunError

Record = tuple[int, Mapping[str, float]]

LARGE_NORM, HUGE_NORM = 1e3, 1e8  # of the gradients of a run's first window of steps
_TINY_NORM = 1e-12
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

    Args:
        config: `guard` of the config.
        clip_norm: `optim.clip_norm` of the config.
    """

    def __init__(self, config: GuardConfig, clip_norm: float = 0.0) -> None:
        self._spike, self._off = config.spike, config.on_divergence == "ignore"
        self._clips = clip_norm > 0
        self._mean, self._seen = 0.0, 0
        self._said_zero = False

    def check(self, records: Sequence[Record]) -> list[str]:
        """See whether a window's records are sound.

        Returns:
            What should be said of them, although the run goes on.

        Raises:
            Divergence: the first step that is not.
        """
        if not self._off:
            self._refuse_unsound(records)
        return self._zero_loss(records) + self._first_gradients(records)

    def _refuse_unsound(self, records: Sequence[Record]) -> None:
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

    def _zero_loss(self, records: Sequence[Record]) -> list[str]:
        """Said once: a loss of exactly 0 has no gradient."""
        step = next((step for step, record in records if record["loss"] == 0), None)
        if step is None or self._said_zero:
            return []
        self._said_zero = True
        return [
            f"the loss of step {step} is exactly 0, and nothing is learnt from that: is there one "
            "class only, or does head.margin.filter drop every other class?"
        ]

    def _first_gradients(self, records: Sequence[Record]) -> list[str]:
        """What the gradients of a run's first window say; they are averaged over its steps.

        Raises:
            Divergence: there are none, or they would throw the weights far away.
        """
        if not records or records[0][0] > 0:
            return []
        step, record = records[-1]
        norm, loss = record.get("grad_norm"), record["loss"]
        if norm is None or loss == 0:
            return []
        if norm < _TINY_NORM and not self._off:
            raise Divergence(
                step,
                f"the first gradients of the backbone vanish (norm {norm:.1e}): no weight of it "
                "learns. Do its embeddings differ between images?",
            )
        if norm <= LARGE_NORM or self._clips:
            return []
        cure = "clip them (optim.clip_norm=5 is usual), or warm up (optim.warmup_steps)"
        if norm > HUGE_NORM and not self._off:
            raise Divergence(step, f"the first gradients explode (norm {norm:.1e}): {cure}")
        return [f"the first gradients are large (norm {norm:.1e}): {cure}"]
