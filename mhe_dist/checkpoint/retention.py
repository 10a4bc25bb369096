"""Which checkpoints to delete: pure policy, from history to decision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
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
        """What `best` makes of a checkpoint's scores, higher is better; None: it has no score."""
        value = scores.get(self.best.removeprefix("-")) if self.best else None
        if value is None or math.isnan(value):
            return None
        return -value if self.best.startswith("-") else value


def to_delete(
    history: Mapping[int, bool], keep: Keep, scores: Mapping[int, float] | None = None
) -> list[int]:
    """Steps whose checkpoints may go, oldest first.

    The newest complete one always stays, so nothing goes before a newer one is complete. An
    incomplete one goes when a complete one is newer: it is the remains of a process that died.
    Otherwise it may be in the making and stays.

    Args:
        history: step -> whether its checkpoint is complete.
        keep: which complete ones stay.
        scores: step -> `Keep.score`, of those that have one; of equal ones the newest stays.
    """
    complete = sorted(step for step, done in history.items() if done)
    if not complete:
        return []
    kept = set(complete[-max(keep.last, 1) :])
    if keep.every:
        kept |= {step for step in complete if step % keep.every == 0}
    ranked = [(score, step) for step, score in (scores or {}).items() if step in complete]
    if ranked:
        kept.add(max(ranked)[1])
    return sorted(step for step in history if step < complete[-1] and step not in kept)
