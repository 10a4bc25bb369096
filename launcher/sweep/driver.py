"""The process that runs a sweep: it hands on results, and ends in order when it is asked to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from launcher.ray_cluster.mailbox import mailbox_name
from launcher.ray_cluster.train import GRACE_S
from launcher.signals import signals_handled_by
from launcher.sweep.trial_run import SweepSettings
from pipelines.runs.folder import absolute_path
from pipelines.runs.lock import is_locked

POLL_S: Final = 0.2

Report = Callable[[str, dict[str, Any], dict[str, Any]], None]
"""Takes the id of a trial, what was drawn for it, and the figures of an evaluation."""


class SweepDriver:
    """The driver of a sweep.

    Args:
        settings: of the trials.
        report: called with each result.

    Attributes:
        signals: numbers of those that asked it to stop.
    """

    def __init__(self, settings: SweepSettings, report: Report) -> None:
        self._settings, self._report = settings, report
        self.signals: list[int] = []
        self._stopped = False

    def take(self, trial_id: str, drawn: dict[str, Any], result: dict[str, Any]) -> None:
        """A trial has a result."""
        self._report(trial_id, drawn, result)

    def check(self, training: Iterable[str]) -> None:
        """Called all the time: if it was asked to stop, let the runs save themselves, then end.

        Args:
            training: ids of the trials that train.
        """
        if not self.signals or self._stopped:
            return
        self._stopped = True
        paths = [f"{self._settings.out}/{self._settings.trial_name(each)}" for each in training]
        for path in paths:
            _ask_to_save(path)
        deadline = time.monotonic() + GRACE_S
        while any(map(is_locked, paths)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGUSR1)  # by which Ray Tune ends a sweep


def _ask_to_save(path: str) -> None:
    import ray

    try:
        ray.get(ray.get_actor(mailbox_name(absolute_path(path))).stop.remote())
    except (ValueError, ray.exceptions.RayError):
        return  # it has not begun, or has just ended


_drivers: list[SweepDriver] = []  # of this process; one at most


@contextmanager
def driving(driver: SweepDriver) -> Iterator[None]:
    """Let Ray Tune find the driver, and signals reach it; for the main thread."""

    def receive(signum: int, frame: FrameType | None) -> None:
        driver.signals.append(signum)

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    _drivers.append(driver)
    try:
        with signals_handled_by(receive):
            yield
    finally:
        _drivers.remove(driver)


def create_callback() -> Any:
    """What Ray Tune calls.

    Tune writes it to disk with the sweep and reads it again to go on, so it looks for the driver
    where it is called.
    """
    from ray import tune

    class Callback(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            """Hand on a result."""
            current_driver().take(trial.trial_id, trial.config, result)

        def on_step_end(self, iteration: int, trials: Any, **_: Any) -> None:
            """See whether the sweep was asked to stop."""
            training = (trial.trial_id for trial in trials if trial.status == "RUNNING")
            current_driver().check(training)

    return Callback()


def current_driver() -> SweepDriver:
    """The driver of this process."""
    return _drivers[-1]
