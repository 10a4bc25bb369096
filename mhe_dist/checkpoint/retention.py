"""Which checkpoints to delete: a pure function of the history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RetentionPolicy:
    """Which complete checkpoints stay.

    Attributes:
        last: the newest ones, at least 1.
        every: those of steps that this divides; 0: none for that reason.
        best: name of a score whose best checkpoint stays, `-name` where the lowest is the best;
            empty: none for that reason.
    """

    last: int = 1
    every: int = 0
    best: str = ""

    def score(self, scores: Mapping[str, float]) -> float | None:
        """The score that `best` names, higher is better; None: the checkpoint has none."""
        value = scores.get(self.best.removeprefix("-")) if self.best else None
        if value is None or math.isnan(value):
            return None
        return -value if self.best.startswith("-") else value


def steps_to_delete(
    history: Mapping[int, bool], policy: RetentionPolicy, scores: Mapping[int, float] | None = None
) -> list[int]:
    """Steps whose checkpoints are to be deleted, oldest first.

    The newest complete one always stays, so none is deleted before a newer one is complete. An
    incomplete one is deleted when a complete one is newer: a process died while it wrote it.
    Otherwise it may still be written to, and stays.

    Args:
        history: step -> whether its checkpoint is complete.
        policy: which complete ones stay.
        scores: step -> `RetentionPolicy.score`, where there is one; of equal ones the newest stays.
    """
    complete = sorted(step for step, done in history.items() if done)
    if not complete:
        return []
    kept = set(complete[-max(policy.last, 1) :])
    if policy.every:
        kept |= {step for step in complete if step % policy.every == 0}
    ranked = [(score, step) for step, score in (scores or {}).items() if step in complete]
    if ranked:
        kept.add(max(ranked)[1])
    return sorted(step for step in history if step < complete[-1] and step not in kept)
