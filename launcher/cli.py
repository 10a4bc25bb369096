"""The `mhe` command: one function per verb, each in `launcher/verbs/`, and what errors look like.

Exit codes: 0 done, 1 a failure, 2 a mistake that the user can cure, 75 a run that was asked to stop
and has saved, 130 interrupted by Ctrl-C. Commands that follow a job exit as it does.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from launcher.terminal import console
from launcher.verbs import config as settings
from launcher.verbs import doctor, jobs, k8s, preflight, reproduce, results, train
from launcher.verbs.bench import app as bench
from launcher.verbs.checkpoint import app as checkpoint
from launcher.verbs.data import app as data
from launcher.verbs.evaluate import app as evaluate
from mhe_dist.errors import UserError

HELP = """Pretrain image backbones against label spaces of 10^5 to 10^9 classes.

A run is one YAML file. `mhe train` trains, evaluates and exports it on this machine, and
goes on where it stopped when the same command is typed again.

Begin with `mhe train quickstart`: it makes its own data and needs no GPU.
"""

app = typer.Typer(
    name="mhe",
    help=HELP,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("submit")(jobs.submit)
app.command("preflight")(preflight.preflight)
app.command("jobs")(jobs.list_jobs)
app.command("status")(jobs.status)
app.command("logs")(jobs.logs)
app.command("stop")(jobs.stop)
app.command("config")(settings.show)
app.command("export")(results.export)
app.command("embed")(results.embed)
app.command("report")(results.report)
app.command("reproduce")(reproduce.reproduce)
app.command("sync")(results.sync)
app.command("doctor")(doctor.doctor)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(bench.app, name="bench")
app.add_typer(k8s.app, name="k8s")


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, too; anywhere.")
    ] = False,
) -> None:
    """The option that every verb takes is read by `main`; here it is only explained."""


def main() -> None:
    """Entry point of the `mhe` command; ends the process."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    sys.exit(run([word for word in arguments if word != "--debug"], debug))


def run(arguments: list[str], debug: bool = False) -> int:
    """Run one command line, turn what it raises into a message, and give its exit code."""
    try:
        app(arguments, prog_name="mhe")
    except SystemExit as exit_:  # Typer's way to say that it is done, or that usage was wrong
        return int(exit_.code or 0)
    except Exception as error:
        if debug:
            console.err.print_exception()
        console.error(_message(error))
        if not debug and not isinstance(error, UserError):
            console.err.print("The same command with --debug shows where it happened.")
        return 2 if isinstance(error, UserError) else 1
    return 0


def _message(error: Exception) -> str:
    known = isinstance(error, UserError) or type(error).__module__ == "mhe_dist.errors"
    return str(error) if known else f"{type(error).__name__}: {error}"
