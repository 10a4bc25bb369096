"""`mhe sweep`: runs of one config with other settings, the bad ones stopped early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import typer
from rich.markup import escape
from rich.table import Table

from launcher import execute
from launcher.preflight.checks import (
    check_data,
    check_names,
    check_selection,
    explain_unknown_figure,
)
from launcher.signals import Interrupted, interruptible
from launcher.sweep.space import (
    as_overrides,
    count_trials,
    example_overrides,
    has_ranges,
    read_space,
)
from launcher.sweep.trial_run import COMPLETE, TRAIN_STEP, SweepSettings
from launcher.sweep.tuner import SweepPlan, TrialResult, check_same_sweep, run_sweep
from launcher.terminal import console
from launcher.terminal.commands import invoked_command
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.options import ConfigFile, Overrides
from launcher.verbs.outputs import usable_folder
from launcher.verbs.studies.run_keys import mistakes_named, refuse_run_keys
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from pipelines.storage.urls import atomic_write, is_local_url

RESULTS_FILE = "trials.csv"


def sweep(
    config: ConfigFile,
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE", help="YAML of keys, each with a list of values or one range."
        ),
    ],
    overrides: Overrides = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Draws from the ranges for every combination of the lists.")
    ] = 1,
    metric: Annotated[
        str, typer.Option(help="Held-out figure to compare by, by its name in metrics.jsonl.")
    ] = "rank1",
    mode: Annotated[Literal["max", "min"], typer.Option(help="Which is better.")] = "max",
    early: Annotated[
        bool,
        typer.Option(
            "--stop-early/--no-stop-early",
            help="At the first evaluation, and at 3, 9, ... times its step, only the best third "
            "of the trials goes on (ASHA).",
        ),
    ] = True,
    parallel: Annotated[int, typer.Option(min=1, help="Trials that train at the same time.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draws.")] = 0,
    out: Annotated[
        str, typer.Option(help="Folder of the runs.", callback=usable_folder)
    ] = "runs/sweep",
) -> None:
    """Try settings: train a config with many of them, and compare the runs.

    SPACE holds a key of the config on each line, and the values to try or a range to draw from
    (uniform, loguniform, randint, lograndint), such as `optim.lr: {loguniform: [0.05, 0.5]}`. Each
    trial is an ordinary run in the output folder; one that is stopped early keeps its
    checkpoint. The same command goes on with a sweep that was interrupted.

    Example: mhe sweep quickstart space.yaml --samples 8
    """
    settings = SweepSettings(
        config, tuple(overrides or []), out.rstrip("/"), Path(out).name, str(Path.cwd())
    )
    plan = SweepPlan(settings, read_space(space), samples, metric, mode, early, parallel, seed)
    base = _check(plan, space)
    done = _train(plan, base)
    _save(plan, done)
    _show(plan, done)
    if not any(trial.value is not None for trial in done):
        raise RunError("no trial has a figure; the reasons are in the table above")


def _check(plan: SweepPlan, file: str) -> Config:
    """The config that the trials share, once every mistake is excluded that can be known now.

    Raises:
        UserError: see the messages.
    """
    settings = plan.settings
    if not is_local_url(settings.out):
        raise UserError(f"--out {settings.out}: a sweep keeps its state on this machine")
    if plan.samples > 1 and not has_ranges(plan.space):
        raise UserError(
            f"--samples {plan.samples}: {file} has lists only, so every sample would be the same; "
            "leave --samples out, or give a line run.seed: [0, 1, 2]"
        )
    refuse_run_keys(plan.space, file)
    refuse_run_keys(settings.overrides, "command line")
    for drawn in example_overrides(plan.space):
        with mistakes_named(dict.fromkeys(plan.space, file)):
            load_config(settings.config, [*settings.overrides, *drawn], [check_names])
    named = [f"run.name={settings.name}", f"run.dir={Path(settings.out).parent}"]
    with mistakes_named({"run.name": "the end of --out"}):
        base = load_config(settings.config, [*settings.overrides, *named], [check_data])
    if not base.evaluate.has_sets:
        raise UserError(
            "nothing is evaluated: trials are compared by held-out figures; set evaluate.shards, "
            "verification, classification or labels"
        )
    if problem := explain_unknown_figure(plan.metric, base.evaluate):
        raise UserError(f"--metric {plan.metric}: {problem}")
    if plan.stop_early and not base.evaluate.every_steps:
        raise UserError(
            "evaluate.every_steps=0: there is nothing to stop a trial early by; set it, or give "
            "--no-stop-early"
        )
    check_same_sweep(plan)
    return base


def _train(plan: SweepPlan, base: Config) -> list[TrialResult]:
    trials = count_trials(plan.space, plan.samples)
    display = ProgressDisplay()

    def _report(trial_id: str, drawn: dict[str, Any], figures: dict[str, Any]) -> None:
        run = escape(plan.settings.trial_name(trial_id))
        if figures[COMPLETE]:
            console.say(f"{run}  complete")
            return
        value = figures.get(plan.metric)
        console.say(
            f"{run}  step {figures[TRAIN_STEP]:,}  "
            f"{plan.metric} {'none' if value is None else f'{value:.4f}'}  "
            f"[dim]{escape(' '.join(as_overrides(drawn)))}[/]"
        )

    try:
        with interruptible(), console.capture_logs(Path(plan.settings.out) / "driver.log"):
            execute.make_data(base, display)
            check_selection(base)
            console.say(f"{trials:,} trials, {plan.parallel} at a time; Ray starts in about 10 s")
            return run_sweep(plan, base, _report)
    except Interrupted as stop:
        console.say(
            "[yellow]Stopped.[/] The runs that were under way are saved. The same command goes "
            f"on:\n  [cyan]{escape(invoked_command())}[/]"
        )
        raise typer.Exit(stop.run_exit_code) from None


def _rank(plan: SweepPlan, trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Complete ones first, then by their figure; those without one last, equal ones by name.

    A sweep that goes on gives its trials in another order.
    """
    sign = 1 if plan.mode == "max" else -1

    def order(trial: TrialResult) -> tuple[bool, bool, float]:
        value = trial.value
        return (value is not None, trial.complete, sign * (value if value is not None else 0.0))

    named = sorted(trials, key=lambda trial: trial.run)
    return sorted(named, key=order, reverse=True)


def _save(plan: SweepPlan, trials: list[TrialResult]) -> None:
    """One line for each trial, the best first."""
    frame = pd.DataFrame(
        [
            {"run": t.run, **t.drawn, "step": t.step, plan.metric: t.value, "state": t.state}
            for t in _rank(plan, trials)
        ]
    )
    with atomic_write(f"{plan.settings.out}/{RESULTS_FILE}") as stream:
        stream.write(frame.to_csv(index=False).encode())


def _show(plan: SweepPlan, trials: list[TrialResult]) -> None:
    table = Table("run", *map(escape, plan.space), "step", plan.metric, "", box=None)
    ranked = _rank(plan, trials)
    for trial in ranked:
        drawn = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in trial.drawn.values()]
        value = "" if trial.value is None else f"{trial.value:.4f}"
        cells = [trial.run, *drawn, f"{trial.step:,}", value, trial.state]
        table.add_row(*map(escape, cells))
    console.show_table("Trials, the best first", table)
    out = plan.settings.out
    console.list_rows("Where it is", [("table", f"{out}/{RESULTS_FILE}"), ("runs", out)])
    finished = [f"{out}/{trial.run}" for trial in ranked if trial.complete]
    steps = []
    if ranked[0].value is not None:
        settings = [*plan.settings.overrides, *as_overrides(ranked[0].drawn), "run.name=best"]
        steps.append(("train the best", ["mhe", "train", plan.settings.config, *settings]))
    if finished:
        steps.append(("look at the best", ["mhe", "report", *finished[:3]]))
    console.list_next(steps)
