"""`mhe submit embed ...` and its like: a command whose tasks run on a cluster, as a job of it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from launcher.ray_cluster.dashboard import resolve_address
from launcher.ray_cluster.jobs import Cluster, resolve_variables, staging_folder
from launcher.tasks.submitted import SpreadCommand, prepare_command
from launcher.terminal import console
from launcher.verbs.jobs import Address, address_option, follow_job, list_sending, show_submission


def submit_command(
    context: typer.Context,
    address: Address = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Watch the command; exit as it does.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE or NAME: a variable for driver and tasks; never a secret."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Show all that would be sent, send nothing.")
    ] = False,
) -> None:
    """Run a command as a job of a Ray cluster, its tasks on all nodes.

    All other words and options are the command's own; `mhe embed --help`, for instance, lists them.
    The commands are mhe embed, cluster, audit, evaluate and data, those of them that take --address
    of a cluster. The job's driver is on the cluster, so nothing has to stay open here, and the same
    command submitted again goes on with what is finished. Relative paths mean the folder
    where it is typed, and that has to be on all nodes.

    Example: mhe submit embed quickstart --images /shared/tars --out /shared/rows --follow
    """
    words = [str(context.info_name).split()[-1], *context.args]
    command = SpreadCommand.parse(context.obj, words)
    variables = resolve_variables(env or [])
    if dry_run:
        where = resolve_address(address)
        with staging_folder() as folder:
            show_submission(prepare_command(command, where, 1, variables, _width(), folder), where)
        list_sending()
        return
    cluster = Cluster(address)
    with staging_folder() as folder:
        attempt = cluster.next_attempt(command.name)
        sent = prepare_command(command, cluster.address, attempt, variables, _width(), folder)
        cluster.submit(sent)
    console.say(f"Job [bold]{escape(sent.id)}[/] is submitted.")
    if follow:
        follow_job(cluster, sent.id)
        return
    option = address_option(cluster.address)
    console.list_next(
        [
            ("watch it", ["mhe", "logs", sent.id, "-f", *option]),
            ("how it does", ["mhe", "status", sent.id, *option]),
            ("stop it", ["mhe", "stop", sent.id, *option]),
        ]
    )


def _width() -> int:
    return console.out.width
