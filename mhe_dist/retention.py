"""Which checkpoints to delete: pure policy, from history to decision."""

from __future__ import annotations

from collections.abc import Mapping


def to_delete(history: Mapping[int, bool], keep_last: int) -> list[int]:
    """Steps whose checkpoints may go, oldest first.

    The newest `keep_last` complete ones stay, so the newest complete one always does. An incomplete
    one goes when a complete one is newer: it is the remains of a process that died. Otherwise it
    may be in the making and stays.

    Args:
        history: step -> whether its checkpoint is complete.
        keep_last: complete checkpoints to keep, at least 1.
    """
    complete = sorted(step for step, done in history.items() if done)
    if not complete:
        return []
    kept = complete[-max(keep_last, 1) :]
    return sorted(step for step in history if step < kept[-1] and step not in kept)
