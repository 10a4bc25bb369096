"""A trial of a sweep: an ordinary run that is followed from one evaluation to the next."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from launcher.events import Event
from launcher.ray_cluster.train import GRACE_S, TrainTask
from launcher.sweep.space import as_overrides
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.write import save_config
from mhe_dist.errors import RunError
from mhe_dist.tracking.base import HELDOUT
from mhe_dist.tracking.jsonl import read_records
from pipelines.runs.folder import read_run_config, read_summary
from pipelines.runs.lock import refuse_locked

TRAIN_STEP: Final = "train_step"
"""Name of the step at which the figures of a result were measured."""
COMPLETE: Final = "run_complete"
"""Whether a result is that of a run's end; Tune's `done` also says that it stopped one."""


class SweepSettings(NamedTuple):
    """What all trials of a sweep share.

    Attributes:
        config: YAML file, or the name of a config that comes with mhe.
        overrides: of the command line.
        out: folder or URL of the runs.
        name: of the sweep; its runs' names begin with it.
        folder: working directory of the command, to which paths refer.
    """

    config: str
    overrides: tuple[str, ...]
    out: str
    name: str
    folder: str

    def trial_name(self, trial_id: str) -> str:
        """Name of the run of a trial, from the number that Ray Tune's id ends with."""
        return f"{self.name}-{trial_id.rpartition('_')[2]}"

    def load(self, drawn: Mapping[str, Any], run: str) -> Config:
        """The config of a run of that name, with what was drawn for it."""
        named = [f"run.name={run}", f"run.dir={self.out}"]
        return load_config(self.config, [*self.overrides, *as_overrides(drawn), *named])


class TrialRun:
    """A run on the cluster of this process, begun or continued.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._events: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._summary = read_summary(config.run.path)
        if self._summary is not None:
            return
        refuse_locked(config.run.path, lambda what: None)
        if read_run_config(config.run.path) is None:  # else rank 0 compares it first
            save_config(config, f"{config.run.path}/config.yaml")
        # Nobody but this sweep uses the cluster, and it has room for every trial that trains.
        self._task = TrainTask(config, is_alone=True)
        self._thread = threading.Thread(target=self._watch, name="watch run", daemon=True)
        self._thread.start()

    def next_result(self) -> tuple[dict[str, Any], bool]:
        """Wait for the next evaluation, or for the end of the run.

        Returns:
            Its figures with `TRAIN_STEP`, and whether the run is complete.

        Raises:
            UserError, RunError, Preempted: see `launcher.ray_cluster.train.train_locally`.
        """
        while self._summary is None:
            event = self._events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                raise RunError("the run ended without a summary")
            if event["event"] == "evaluation":
                return _result(event, event["step"]), False
            if event["event"] == "end":
                self._thread.join()
                self._summary = event["summary"]
        return _result(self._summary["heldout"], self._summary["steps"]), True

    def stop(self) -> None:
        """Let the run save itself, if it is under way; `mhe train` can go on with it."""
        if self._summary is None and self._thread.is_alive():
            self._stopping.set()
            self._task.stop()
            self._thread.join(GRACE_S)

    def _watch(self) -> None:
        """Hand on events until nothing of the run is left: the next trial needs its room."""
        try:
            self._task.watch(self._task.has_ended, self._events.put, self._stopping.is_set)
            self._events.put(None)
        except Exception as error:  # for whoever waits for results
            self._events.put(error)
        while not self._task.has_ended():
            pass


def _result(values: Mapping[str, Any], step: int) -> dict[str, Any]:
    figures = {key: value for key, value in values.items() if isinstance(value, float)}
    return {**figures, TRAIN_STEP: step}


def past_results(path: str) -> list[dict[str, Any]]:
    """What `TrialRun.next_result` gave, from the records of the run at a path or URL."""
    records = read_records(f"{path}/metrics.jsonl")
    return [
        _result({key.removeprefix(HELDOUT): value for key, value in record.items()}, step)
        for record in records
        if any(key.startswith(HELDOUT) for key in record)
        for step in [record["step"] + 1]  # records count steps from 0
    ]


def create_trainable() -> Any:
    """The class that Ray Tune makes of every trial; Ray is imported here.

    `RAY_CHDIR_TO_TRIAL_DIR=0` has to hold where it runs.
    """
    from ray import tune

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any], settings: SweepSettings) -> None:  # type: ignore[override]
            """Begin the run, or go on with it from its own checkpoint."""
            os.chdir(settings.folder)
            self._run = TrialRun(settings.load(config, settings.trial_name(self.trial_id)))

        def step(self) -> dict[str, Any]:
            """The figures of the next evaluation."""
            result, done = self._run.next_result()
            return {**result, COMPLETE: done, "done": done}

        def cleanup(self) -> None:
            """Stop the run in order."""
            self._run.stop()

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Keep nothing: the run has checkpoints of its own."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Read nothing, for the same reason."""

    return Trial
