"""A sweep on Ray Tune: its trials, which of them are stopped early, and how it goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final, NamedTuple

from launcher.ray_cluster.connection import local_cluster
from launcher.signals import Interrupted
from launcher.sweep.driver import Report, SweepDriver, create_callback, driving
from launcher.sweep.space import Space, to_tune
from launcher.sweep.trial_run import (
    TRAIN_STEP,
    SweepSettings,
    create_trainable,
    past_results,
)
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError, first_line, last_line
from mhe_dist.redact import masked
from pipelines.runs.folder import read_summary
from pipelines.storage.urls import atomic_write

STATE_FOLDER: Final = "tune"
_SETTINGS_FILE: Final = "sweep.json"
_TRIAL_NEEDS: Final = {"memory": 1.0}  # a byte: its workers have needs, and Tune wants some
_REDUCTION: Final = 3  # of the trials at each look, one in so many goes on
_LAST_LOOK: Final = 10**9  # steps; a run ends before


class SweepPlan(NamedTuple):
    """What a sweep looks for.

    Attributes:
        settings: of all trials.
        space: what is tried.
        samples: how often every combination is drawn.
        metric: held-out figure by which trials are compared, such as "rank1".
        mode: "max" or "min": which is better.
        stop_early: whether only the best third of the trials goes on at each look.
        parallel: trials that train at the same time.
        seed: of what is drawn.
    """

    settings: SweepSettings
    space: Space
    samples: int
    metric: str
    mode: str
    stop_early: bool
    parallel: int
    seed: int


class TrialResult(NamedTuple):
    """A trial as it ended.

    Attributes:
        run: name of its run.
        drawn: its settings, by key of the config.
        step: of its last evaluation; 0: there was none.
        value: of the metric; None: there is none.
        complete: whether its run came to its end.
        error: what ended it; empty: nothing did.
    """

    run: str
    drawn: dict[str, Any]
    step: int
    value: float | None
    complete: bool
    error: str

    @property
    def state(self) -> str:
        """How it ended, in words."""
        return self.error or ("complete" if self.complete else "stopped early")


def check_same_sweep(plan: SweepPlan) -> None:
    """Refuse to go on with another sweep than the one that has begun in the folder, if one has.

    Raises:
        UserError: names what differs, with both values.
    """
    file = Path(plan.settings.out) / _SETTINGS_FILE
    if not file.exists() or not file.with_name(STATE_FOLDER).is_dir():
        return
    before, now = _identity(json.loads(file.read_text())), _identity(_kept(plan))
    if changed := [key for key in now if now[key] != before.get(key)]:
        rows = "\n".join(f"  {key}: {before.get(key)!r} there, {now[key]!r} now" for key in changed)
        raise UserError(
            f"{plan.settings.out} holds a sweep with another {', '.join(changed)}: name "
            f"another folder with --out, or remove that one\n{rows}"
        )


def _keep(plan: SweepPlan) -> None:
    """Keep what a sweep is about beside its runs, when its first trial is about to begin."""
    with atomic_write(f"{plan.settings.out}/{_SETTINGS_FILE}") as stream:
        stream.write(json.dumps(_kept(plan), indent=2).encode())


def _kept(plan: SweepPlan) -> dict[str, Any]:
    """A sweep as JSON holds it, without secrets."""
    words = (word.partition("=") for word in plan.settings.overrides)
    overrides = [f"{key}{sign}{masked(value, key)}" for key, sign, value in words]
    settings = {**plan.settings._asdict(), "overrides": overrides}
    return dict(json.loads(json.dumps(masked({**plan._asdict(), "settings": settings}))))


def _identity(kept: dict[str, Any]) -> dict[str, Any]:
    """What makes a sweep another one; what it may use of the machine does not."""
    settings = kept["settings"]
    words = [word for word in settings["overrides"] if not word.startswith(("scale.", "scale="))]
    values = masked({**kept, **settings, "overrides": words})
    return {key: value for key, value in values.items() if key not in ("settings", "parallel")}


def run_sweep(plan: SweepPlan, config: Config, report: Report) -> list[TrialResult]:
    """Train all trials on a Ray cluster of this machine, or go on with them.

    Args:
        plan: of the sweep.
        config: shared by the trials; its workers, times `parallel`, are what the machine must hold.
        report: called with each evaluation of a trial.

    Raises:
        Interrupted: it was told to stop; the runs that were under way are saved.
    """
    scaled = config.model_copy(deep=True)
    scaled.scale.workers = plan.parallel * config.scale.workers
    driver = SweepDriver(plan.settings, report)
    with local_cluster(scaled), driving(driver):
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        _keep(plan)  # not before: what Ray refuses may be typed otherwise
        results = _fit(plan, config.evaluate.every_steps)
    if driver.signals:
        raise Interrupted(driver.signals[0])
    return results


def _fit(plan: SweepPlan, first_look: int) -> list[TrialResult]:
    from ray import tune

    folder = Path(plan.settings.out).absolute() / STATE_FOLDER
    trainable = tune.with_resources(
        tune.with_parameters(create_trainable(), settings=plan.settings), _TRIAL_NEEDS
    )
    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(
            str(folder), trainable=trainable, param_space=to_tune(plan.space), resume_errored=True
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=to_tune(plan.space),
            tune_config=_tune_config(plan, first_look),
            run_config=tune.RunConfig(
                name=STATE_FOLDER,
                storage_path=str(folder.parent),
                verbose=0,
                callbacks=[create_callback()],
            ),
        )
    grid = tuner.fit()
    return [_read_result(plan, grid[number]) for number in range(len(grid))]


def _tune_config(plan: SweepPlan, first_look: int) -> Any:
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    settings = plan.settings._replace(overrides=())  # Tune writes what follows to disk

    def name(trial: Any) -> str:
        return settings.trial_name(trial.trial_id)

    return tune.TuneConfig(
        metric=plan.metric,
        mode=plan.mode,
        num_samples=plan.samples,
        search_alg=BasicVariantGenerator(max_concurrent=plan.parallel, random_state=plan.seed),
        scheduler=create_scheduler(settings, first_look) if plan.stop_early else None,
        trial_name_creator=name,
        trial_dirname_creator=name,
    )


def create_scheduler(settings: SweepSettings, first_look: int) -> Any:
    """Asynchronous successive halving (arXiv 1810.05934): looks at 1, 3, 9, ... times a step.

    Ray Tune forgets what a scheduler has seen when a sweep goes on; here it reads in the records of
    the runs what they had reached.
    """
    from ray.tune.schedulers import ASHAScheduler

    class Halving(ASHAScheduler):
        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            """Take a trial in, with what it has reached before."""
            super().on_trial_add(tune_controller, trial)
            run = f"{settings.out}/{settings.trial_name(trial.trial_id)}"
            for result in past_results(run):
                self.on_trial_result(tune_controller, trial, result)

    return Halving(
        time_attr=TRAIN_STEP,
        grace_period=first_look,
        reduction_factor=_REDUCTION,
        max_t=_LAST_LOOK,
    )


def _read_result(plan: SweepPlan, result: Any) -> TrialResult:
    figures = result.metrics or {}
    run = Path(result.path).name
    return TrialResult(
        run,
        dict(result.config or {}),
        figures.get(TRAIN_STEP, 0),
        figures.get(plan.metric),
        read_summary(f"{plan.settings.out}/{run}") is not None,
        _describe_error(result.error),
    )


def _describe_error(error: Exception | None) -> str:
    """What ended a trial, in one line: the worker's own error where Ray kept it."""
    if error is None:
        return ""
    if cause := getattr(error, "cause", None):
        return first_line(cause)
    return last_line(error)
