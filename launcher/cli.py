"""The `mhe` command: one function per verb, each in `launcher/verbs/`, and what errors look like.

Exit codes: 0 done, 1 a failure, 2 a mistake that the user can cure, 75 a run that was asked to stop
and has saved, 130 interrupted by Ctrl-C. Commands that follow a job exit as it does.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from launcher.terminal import console
from mhe_dist.errors import INTERRUPTED, UserError

HELP = """Pretrain image backbones against label spaces of 10^5 to 10^9 classes.

A run is one YAML file. `mhe train` trains, evaluates and exports it on this machine, and
goes on where it stopped when the same command is typed again.

Begin with `mhe train quickstart`: it makes its own data and needs no GPU. With data of your own,
begin with `mhe init DATA`.
"""

VERBS = {  # name: where it is, and the first sentence of its help
    "init": (
        "launcher.verbs.init:init",
        "Write a first YAML for what you have, with the reason of each value beside it.",
    ),
    "train": ("launcher.verbs.train:train", "Train, evaluate and export a run on this machine."),
    "submit": (
        "launcher.verbs.jobs:submit",
        "Train, evaluate and export a run as a job of a Ray cluster.",
    ),
    "preflight": (
        "launcher.verbs.preflight:preflight",
        "Say whether a run would work, with every reason why not, and what it would cost.",
    ),
    "jobs": ("launcher.verbs.jobs:list_jobs", "List the jobs of a cluster, newest first."),
    "status": (
        "launcher.verbs.jobs:status",
        "Say how a job is doing, and exit as it did: 0 also while it runs, 75 if it was stopped.",
    ),
    "logs": (
        "launcher.verbs.jobs:logs",
        "Show what a run did, and with -f what it does; its workers' own logs are in its folder.",
    ),
    "stop": (
        "launcher.verbs.jobs:stop",
        "Let a run save a checkpoint and stop; the same `mhe submit` goes on with it.",
    ),
    "config": (
        "launcher.verbs.config:show",
        "Show every setting of a run, with its meaning; those that are not the default stand out.",
    ),
    "export": (
        "launcher.verbs.results:export",
        "Export the backbone of a run's newest checkpoint, and compare the files with it.",
    ),
    "embed": (
        "launcher.verbs.embedding.embed:embed",
        "Embed every image below a folder, or every sample of a set of shards.",
    ),
    "cluster": (
        "launcher.verbs.embedding.cluster:cluster",
        "Make classes of images that have none: embed, cluster, give each image its nearest "
        "classes.",
    ),
    "audit": (
        "launcher.verbs.embedding.audit:audit",
        "Find wrong labels with a trained backbone, and write a label set without them.",
    ),
    "search": (
        "launcher.verbs.embedding.search:search",
        "Look images up among others: the nearest of each, in a table, a contact sheet and a page.",
    ),
    "classify": (
        "launcher.verbs.classify:classify",
        "Name the class of images, among all classes of a run: a table and a contact sheet.",
    ),
    "report": (
        "launcher.verbs.results:report",
        "Write one HTML page about a run, or one that compares several.",
    ),
    "reproduce": (
        "launcher.verbs.studies.reproduce:reproduce",
        "Train every variant of a comparison, and write a page with tables and plots.",
    ),
    "sweep": (
        "launcher.verbs.studies.sweep:sweep",
        "Try settings: train a config with many of them, and compare the runs.",
    ),
    "sync": (
        "launcher.verbs.results:sync",
        "Send the metrics of a run to MLflow that did not reach it, because it was down at "
        "the end.",
    ),
    "doctor": (
        "launcher.verbs.doctor:doctor",
        "Check this machine: versions, processor, memory, GPUs, shared memory, compiler, ports.",
    ),
    "evaluate": (
        "launcher.verbs.evaluate.app:app",
        "Evaluate the newest checkpoint of a run; without another verb, on its held-out shards.",
    ),
    "data": (
        "launcher.verbs.data.app:app",
        "Make and check the tar shards that a run streams.",
    ),
    "checkpoint": ("launcher.verbs.checkpoint.app:app", "Look into checkpoints, grow them."),
    "bench": (
        "launcher.verbs.bench.app:app",
        "Measure parts beside what they are compared with.",
    ),
    "k8s": ("launcher.verbs.k8s:app", "Runs on Kubernetes, as RayJobs of KubeRay."),
}


def load_verb(name: str) -> Any:
    """The command of a verb, or its group of commands: imports the module of that verb alone."""
    module, _, attribute = VERBS[name][0].partition(":")
    found = getattr(import_module(module), attribute)
    host = typer.Typer(rich_markup_mode="markdown", add_completion=False)
    if isinstance(found, typer.Typer):
        host.add_typer(found, name=name)
    else:
        host.command(name)(found)
    return typer.main.get_group(host).commands[name]


SUBMITTED = ("embed", "cluster", "audit", "evaluate", "data")
"""Verbs that `mhe submit` takes with their own words, instead of a config."""


def load_submitting(verb: str) -> Any:
    """The command that submits a verb; options that it does not know are the verb's."""
    found = import_module("launcher.verbs.submit_command").submit_command
    host = typer.Typer(rich_markup_mode="markdown", add_completion=False)
    unknown = {"ignore_unknown_options": True, "allow_extra_args": True}
    host.command(verb, context_settings=unknown)(found)
    host.command("")(lambda: None)  # of one command, Typer makes no group
    return typer.main.get_group(host).commands[verb]


def _refuse_misspelt_verb(words: list[str]) -> None:
    """Tell a slip in one of `SUBMITTED` before what follows is taken for options of a run."""
    word, named = words[0], [each for each in words if each in SUBMITTED]
    if word.startswith("-") and named:
        raise UserError(f"mhe submit: the command comes first, mhe submit {named[0]} {word} ...")
    if word in VERBS and not os.path.exists(word):
        raise UserError(
            f"mhe submit {word}: is not submitted; a config is, or one of {', '.join(SUBMITTED)}"
        )
    near = get_close_matches(word.lower(), SUBMITTED, 1)
    if near and word.isalpha() and not os.path.exists(word):
        raise UserError(
            f"mhe submit {word}: there is no such file; did you mean mhe submit {near[0]}?"
        )


class DeferredCommand(TyperCommand):
    """A verb that `mhe --help` lists without importing it, and that is imported when it is called.

    All verbs together import libraries for more than a second.
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """The context of the command itself, which is called from there on."""
        if self.name == "submit" and args and args[0] in SUBMITTED:
            extra["obj"] = load_verb(args[0])
            command = load_submitting(args[0])
            return command.make_context(f"submit {args[0]}", args[1:], parent=parent, **extra)
        if self.name == "submit" and args:
            _refuse_misspelt_verb(args)
        return load_verb(str(self.name)).make_context(info_name, args, parent=parent, **extra)


class VerbGroup(TyperGroup):
    """All verbs, none of them imported."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, summary) in VERBS.items():
            self.add_command(DeferredCommand(name, help=summary))

    def invoke(self, context: Any) -> Any:
        """Call the verb; Ctrl-C, where it has no words of its own for that, is told in one."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as stop:
            console.err.print("[yellow]Interrupted.[/]")
            raise typer.Exit(getattr(stop, "exit_code", INTERRUPTED)) from None  # of other signals


app = typer.Typer(
    name="mhe",
    cls=VerbGroup,
    help=HELP,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mhe {metadata.version('mhe')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, too; anywhere.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """The option that every verb takes is read by `main`; here it is only explained."""


def main() -> None:
    """Entry point of the `mhe` command; ends the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    code = run([word for word in arguments if word != "--debug"], debug)
    # What libraries do as the process ends, Ctrl-C would break off with a traceback of theirs.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def run(arguments: list[str], debug: bool = False) -> int:
    """Run one command line, turn what it raises into a message, and give its exit code."""
    try:
        app(arguments, prog_name="mhe")
    except SystemExit as exit_:  # Typer's way to say that it is done, or that usage was wrong
        return int(exit_.code or 0)
    except Exception as error:
        if debug:
            console.err.print_exception()
        mistake = _mistake(error)
        console.error(mistake or _message(error, arguments))
        if not debug and not mistake:
            console.err.print("The same command with --debug shows where it happened.")
        return 2 if mistake else 1
    return 0


def _mistake(error: Exception) -> str:
    """What the user can cure, in words; empty: it is a failure."""
    if isinstance(error, UserError):
        return str(error)
    from mhe_dist.storage_errors import describe_missing_credentials
    from pipelines.storage.unusable_path import describe_unusable_path

    if isinstance(error, OSError):
        return describe_unusable_path(error)
    return describe_missing_credentials(error)


def _message(error: Exception, words: list[str]) -> str:
    if isinstance(error, OSError):
        from pipelines.storage.full_disk import describe_full_disk

        if described := describe_full_disk(error, words):
            return described
    known = type(error).__module__ == "mhe_dist.errors"
    return str(error) if known else f"{type(error).__name__}: {error}"
