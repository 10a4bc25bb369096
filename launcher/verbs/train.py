"""`mhe train`: the whole job on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from launcher import execute
from launcher.preflight.checks import check_data, check_names
from launcher.signals import Interrupted, interruptible
from launcher.terminal import console
from launcher.terminal.commands import invoked_command
from launcher.terminal.progress import ProgressDisplay
from launcher.terminal.run_log import RUN_LOG, RunLog
from launcher.terminal.summary import show_summary
from launcher.verbs.options import ConfigFile, Overrides
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.errors import Preempted, RunError, UserError
from pipelines.runs.folder import (
    logs_folder,
    make_run_folder,
    newest_checkpoint,
    read_summary,
)
from pipelines.runs.resume import refuse_changed_config


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Also start Ray's dashboard, on loopback.")
    ] = False,
) -> None:
    """Train, evaluate and export a run on this machine.

    Starts Ray on the loopback interface with `scale.workers` workers, shows a progress bar, and
    ends with a summary of what was reached and where it is. The same command goes on with a run
    that was interrupted, from its newest complete checkpoint, and says so; a run that is complete
    it leaves alone. SIGTERM makes the run save itself first; the exit code is then 75. Logs of the
    workers and of Ray are in `logs/` of the run; mhe logs shows what it did, from another terminal
    what it does.

    With --dashboard the link of Ray's dashboard is printed. It answers on this machine alone, and
    whoever reaches it there can run code as you.

    Example: mhe train quickstart run.name=wide head.mhs.extra_heads=16
    """
    try:
        with interruptible():
            settings = load_config(config, overrides or [], [check_data, check_names])
            changes = refuse_changed_config(settings)
            done = None if changes else read_summary(settings.run.path)
    except Interrupted as stop:
        console.say("[yellow]Stopped[/] before the run began.")
        raise typer.Exit(stop.run_exit_code) from None
    if done is not None:
        console.say(f"Run [bold]{escape(settings.run.name)}[/] is complete.")
    show_summary(settings, train_to_end(settings, dashboard) if done is None else done)


def train_to_end(config: Config, dashboard: bool = False) -> dict[str, Any]:
    """Train a run on this machine, or go on with it, and give its summary.

    Args:
        config: of the run.
        dashboard: whether Ray's dashboard is started, and its link told.

    Raises:
        typer.Exit: it was asked to stop, and the command that continues it was printed.
    """
    make_run_folder(config)  # the logs of this command go there
    display = ProgressDisplay()
    logs = logs_folder(config)
    with RunLog(display, logs / RUN_LOG) as log:
        try:
            with interruptible(), console.capture_logs(logs / "driver.log"), display:
                execute.run(config, log, dashboard=dashboard)
        except (Interrupted, Preempted) as stop:
            console.say(_how_to_go_on(config))
            code = stop.run_exit_code if isinstance(stop, Interrupted) else stop.exit_code
            raise typer.Exit(code) from None
    return display.summary or {}


def _how_to_go_on(settings: Config) -> str:
    try:
        newest = newest_checkpoint(settings.run.path)
    except (UserError, RunError):  # a store that does not answer now
        start = "goes on from its newest complete checkpoint, if there is one"
    else:
        none = "starts again: no checkpoint was complete yet"
        start = f"goes on from {newest}" if newest else none
    return (
        f"[yellow]Stopped.[/] No process is left behind. The same command {escape(start)}:\n"
        f"  [cyan]{escape(invoked_command())}[/]"
    )
