"""Checkpoints of a run: when one is due, and how each one ended, when it has ended.

A save that fails is loud and ends nothing: the last good checkpoint stands, the next save is due
as ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from mhe_dist.checkpoint.entry import Entry
from mhe_dist.checkpoint.retention import RetentionPolicy
from mhe_dist.checkpoint.store import CheckpointStore, SaveResult
from mhe_dist.config.schema import CheckpointConfig
from mhe_dist.redact import scrub
from pipelines.pretrain.recorder import Recorder

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves through a store and reports to the recorder; all ranks must make the same calls.

    Attributes:
        written: checkpoints that this process completed.
        failures: a sentence for each save that failed.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        store: CheckpointStore,
        recorder: Recorder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._store, self._recorder, self._clock = config, store, recorder, clock
        self._last_save = clock()
        self.written = 0
        self.failures: list[str] = []

    @property
    def status(self) -> str:
        """How the newest save of this process ended, in words."""
        if self.failures:
            return f"the last good checkpoint stands ({self.failures[-1]})"
        return "everything is saved" if self.written else "nothing was saved"

    def overdue(self) -> bool:
        """Whether the clock of this rank asks for a save (`checkpoint.every_minutes`)."""
        minutes = self._config.every_minutes
        return minutes > 0 and self._clock() - self._last_save >= 60 * minutes

    def due(self, step: int, evaluated: bool) -> bool:
        """Whether a save after `step` steps is due, whatever the clock says.

        Args:
            step: completed steps.
            evaluated: whether the model was evaluated as it is now.
        """
        every = self._config.every_steps
        is_scored = evaluated and bool(self._config.keep_best)
        return is_scored or (every > 0 and step % every == 0)

    def save(
        self,
        step: int,
        replicated: Mapping[str, Entry],
        owned: Mapping[str, Entry],
        run: dict[str, Any],
    ) -> None:
        """Copy the tensors; they are written while training goes on: `CheckpointStore.save`."""
        self._last_save = self._clock()
        self._report(self._store.save(step, replicated, owned, run))

    def poll(self) -> None:
        """Report how the last save ended, if it has."""
        self._report(self._store.poll())

    def wait(self) -> None:
        """Wait for the last save and report how it ended."""
        self._report(self._store.wait())

    def _report(self, saved: SaveResult | None) -> None:
        if saved is None:
            return
        if saved.error is None:
            self.written += 1
            figures = {"checkpoint_seconds": saved.seconds, "checkpoint_bytes": float(saved.bytes)}
            self._recorder.record_state(saved.step, figures)
            self._recorder.emit(
                "checkpoint",
                step=saved.step,
                path=saved.path,
                seconds=saved.seconds,
                bytes=saved.bytes,
            )
            return
        message = scrub(saved.error)
        self.failures.append(f"step {saved.step}: {message}")
        logger.error("checkpoint of step %d failed: %s", saved.step, message)
        self._recorder.record_state(saved.step, {"checkpoint_failures": float(len(self.failures))})
        self._recorder.emit("checkpoint_failed", step=saved.step, path=saved.path, message=message)


def retention_policy(config: CheckpointConfig) -> RetentionPolicy:
    """Which checkpoints a run keeps."""
    return RetentionPolicy(config.keep_last, config.keep_every, config.keep_best)
