"""`mhe submit`, `jobs`, `status`, `logs`, `stop`: runs on a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.preflight.checks import check_names
from launcher.preflight.survey import assess, survey_cluster
from launcher.ray_cluster.code_package import SETTINGS_FILE, with_absolute_paths
from launcher.ray_cluster.dashboard import (
    ADDRESS_VARIABLE,
    DEFAULT_ADDRESS,
    is_loopback,
    resolve_address,
)
from launcher.ray_cluster.environment import worker_resources
from launcher.ray_cluster.jobs import (
    STOP_WAIT_S,
    Cluster,
    Job,
    Submission,
    build_submission,
    resolve_variables,
    staging_folder,
)
from launcher.ray_cluster.ray_internals import is_token_auth_enabled
from launcher.signals import Interrupted, interruptible
from launcher.terminal import console
from launcher.terminal.commands import command_line, invoked_command
from launcher.terminal.event_log import parse_event, split_lines
from launcher.terminal.progress import format_duration
from launcher.terminal.replay import replay_log
from launcher.terminal.run_log import RUN_LOG, RunLogReader
from launcher.verbs.options import ConfigFile, Overrides
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.stored import stored_config
from mhe_dist.config.write import masked_yaml
from mhe_dist.errors import UserError
from mhe_dist.redact import scrub
from mhe_dist.tracking.factory import mlflow_uri
from pipelines.runs.folder import (
    find_run,
    logs_folder,
    newest_checkpoint,
    read_run_config,
)
from pipelines.storage.urls import is_local_url, url_exists

STOP_NOW_S = 30.0
_STYLES = {"running": "green", "succeeded": "green", "failed": "red", "stopped": "yellow"}

Address = Annotated[
    str,
    typer.Option(
        help=f"Dashboard of the cluster; else {ADDRESS_VARIABLE}, else {DEFAULT_ADDRESS}."
    ),
]
JobName = Annotated[
    str, typer.Argument(metavar="ID", help="Id of a job, or else name of a run: its newest job.")
]


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Watch the run; exit as it does.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE or NAME: a variable for the workers; never a secret."),
    ] = None,
    preflight: Annotated[
        bool, typer.Option(help="First see whether the run can work there (mhe preflight).")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option(help="Show all that would be sent, send nothing.")
    ] = False,
) -> None:
    """Train, evaluate and export a run as a job of a Ray cluster.

    The code of mhe and the resolved settings are sent; data and results stay where the settings
    say: at URLs, or on a file system that every node sees. The same run again goes on where it
    stopped; one that is being trained is refused.

    Other long work is submitted by its own words, and needs no config: mhe submit embed RUN
    --images SHARDS --out FOLDER runs mhe embed as a job, its tasks on all nodes; likewise evaluate,
    cluster, audit and data.

    Example: mhe submit quickstart --address http://127.0.0.1:8265 --follow
    """
    settings = with_absolute_paths(load_config(config, overrides or [], [check_names]))
    variables = resolve_variables(env or [])
    if dry_run:
        with staging_folder() as folder:
            sent = build_submission(settings, resolve_address(address), 1, variables, folder)
            _show(settings, sent, resolve_address(address))
        list_sending()
        return
    cluster = Cluster(address)
    cluster.refuse_running(settings)
    if preflight:
        with console.status("preflight"):
            assess(settings, survey_cluster(settings, cluster, trial=False), trial=False)
    job_id = cluster.start(settings, variables)
    _announce(settings, job_id, cluster.address, variables)
    if follow:
        follow_job(cluster, job_id)


def list_jobs(address: Address = "") -> None:
    """List the jobs of a cluster, newest first.

    Example: mhe jobs --address http://127.0.0.1:8265
    """
    found = Cluster(address).jobs()
    table = Table("job", "run", "status", "started", "time", box=None, padding=(0, 2, 0, 0))
    for job in found:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
        table.add_row(escape(job.id), escape(job.run or "-"), _status(job), began, _length(job))
    if found:
        console.print_table(table)
    else:
        console.say("No jobs.")


def status(job_id: JobName, address: Address = "") -> None:
    """Say how a job is doing, and exit as it did: 0 also while it runs, 75 if it was stopped.

    Example: mhe status quickstart
    """
    cluster, job = _find_job(job_id, address, _local_run(job_id, address))
    console.say(f"[bold]{escape(job.id)}[/]: {_status(job)}, {_length(job)}")
    for name, value in _facts(job, cluster):
        console.say(f"  {name}: {escape(value)}")
    if job.status == "failed":
        console.say(escape(scrub(job.message)))
    raise typer.Exit(job.exit_code)


def logs(
    job_id: JobName,
    address: Address = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job is over; exit as it does.")
    ] = False,
) -> None:
    """Show what a run did, and with -f what it does; its workers' own logs are in its folder.

    A run of this machine (mhe train) is shown from its folder: the last time that it was started.
    Any other is looked up among the jobs of the cluster; with --address always.

    Example: mhe logs quickstart -f
    """
    missing = ""
    if not _names_cluster(address):
        log, missing = _local_log(job_id)
        if log is not None:
            _show_local(log, follow)
            return
    cluster, job = _find_job(job_id, address, missing)
    if follow:
        follow_job(cluster, job.id)
    replay_log(cluster.read_output(job.id).splitlines())


def _names_cluster(address: str) -> bool:
    """Whether the user names a cluster: then a name is that of a job, and of no run here."""
    return bool(address or os.environ.get(ADDRESS_VARIABLE))


def _local_log(run: str) -> tuple[Path | None, str]:
    """Where a run of this machine wrote down what it did; or None, and why there is none."""
    try:
        path = find_run(run)
    except UserError as error:
        return None, str(error)
    log = logs_folder(stored_config(read_run_config(path) or {})) / RUN_LOG
    if is_local_url(path):  # also where the folder was moved since
        log = Path(path, "logs", RUN_LOG)
    if log.exists():
        return log, ""
    see = command_line(["mhe", "report", path])
    return None, f"{path} has no log: mhe train writes {log} where it trains; {see} shows the run"


def _local_run(name: str, address: str) -> str:
    """What to say of a run of this machine where a job is asked for; empty: there is none."""
    if _names_cluster(address):
        return ""
    try:
        path = find_run(name)
    except UserError:
        return ""
    see = command_line(["mhe", "logs", name])
    return (
        f"{path} is a run of this machine: {see} shows how it does; Ctrl-C where it is trained, or "
        "SIGTERM to that process, lets it save and stop"
    )


def _find_job(name: str, address: str, missing: str) -> tuple[Cluster, Job]:
    """A job of a cluster, which a run of this machine would come before.

    Args:
        missing: what to say of a run of this machine, or why there is none; empty: nothing.

    Raises:
        UserError: there is no such job.
    """
    try:
        cluster = Cluster(address)
        return cluster, cluster.find(name)
    except UserError as error:
        if not missing:
            raise
        raise UserError(f"{missing}\nNor is it a job: {error}") from error


def _show_local(log: Path, follow: bool) -> None:
    reader = RunLogReader(log)
    try:
        with interruptible():
            replay_log(reader.lines(follow))
    except Interrupted as stop_:
        console.say("[yellow]The run goes on.[/]")
        raise typer.Exit(stop_.exit_code) from None
    console.say(f"Logs of its workers: {escape(str(log.parent))}")
    if follow:
        raise typer.Exit(reader.exit_code or 0)


def stop(
    job_id: JobName,
    address: Address = "",
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a checkpoint.")] = False,
) -> None:
    """Let a run save a checkpoint and stop; the same `mhe submit` goes on with it.

    Example: mhe stop quickstart
    """
    cluster, job = _find_job(job_id, address, _local_run(job_id, address))
    if job.is_over:
        console.say(f"{escape(job.id)} has {_status(job)} already.")
        return
    cluster.stop(job, now)
    with console.status("ending it" if now else "waiting for its checkpoint"):
        job = cluster.wait(job.id, STOP_NOW_S if now else STOP_WAIT_S + STOP_NOW_S)
    newest = newest_checkpoint(job.path) if job.path and _is_visible(job.path) else None
    console.say(
        f"{escape(job.id)}: {_status(job)}."
        + (f" It goes on from {escape(str(newest))}." * bool(newest))
    )
    if not job.is_over:
        raise typer.Exit(1)


def show_submission(sent: Submission, address: str, placement: Iterable[str] = ()) -> None:
    """All that a submission consists of, but for what its files hold."""
    console.say(f"[bold]Job[/] {escape(sent.id)} on {escape(scrub(address))}")
    console.say(f"  {escape(sent.entrypoint)}")
    if placement:
        console.say("\n[bold]Placement[/]")
    for line in placement:
        console.say(f"  {escape(line)}")
    console.say("\n[bold]Environment[/]")
    for name, value in sorted(sent.environment.items()):
        console.say(f"  {escape(f'{name}={value}')}")
    files = sent.package.files
    console.say(
        f"\n[bold]Working directory[/]: {len(files)} files, {sent.package.bytes / 1024:,.0f} KiB"
    )
    for name in files:
        console.say(f"  {escape(name)}")


def list_sending() -> None:
    """End a command that only showed what it would send with the one that sends it."""
    console.list_next([("send it", invoked_command(without="--dry-run"))])


def _show(config: Config, sent: Submission, address: str) -> None:
    """A run that would be submitted."""
    show_submission(sent, address, _placement(config))
    console.say(f"\n[bold]{SETTINGS_FILE}[/]")
    console.say(escape(masked_yaml(config)))


def _placement(config: Config) -> Iterable[str]:
    needs = ", ".join(f"{name}: {value:g}" for name, value in worker_resources(config).items())
    kind = f" on {config.scale.accelerator_type}" if config.scale.accelerator_type else ""
    yield f"{config.scale.workers} workers ({config.scale.placement}){kind}, each with {needs}"


def _announce(config: Config, job_id: str, address: str, variables: Mapping[str, str]) -> None:
    where = address_option(address)
    console.say(f"Job [bold]{escape(job_id)}[/] is submitted.")
    rows = [("dashboard", f"{address}/#/jobs/{job_id}"), ("results", config.run.path)]
    if config.tracking.mlflow:
        rows.insert(1, ("MLflow", _mlflow_server(config, variables)))
    for what, link in rows:
        console.say(f"  {what}: {escape(link)}")
    if not is_loopback(address) and not is_token_auth_enabled():
        console.say(
            "[yellow]warning:[/] this cluster takes jobs from anybody who reaches it; start it "
            "with RAY_AUTH_MODE=token (docs/clusters.md)"
        )
    console.list_next(
        [
            ("watch it", ["mhe", "logs", job_id, "-f", *where]),
            ("how it does", ["mhe", "status", job_id, *where]),
            ("save and stop", ["mhe", "stop", job_id, *where]),
        ]
    )


def _mlflow_server(config: Config, variables: Mapping[str, str]) -> str:
    """The server of a job that was sent; the nodes may know one that is not named here."""
    try:
        named = config.tracking.uri or variables.get("MLFLOW_TRACKING_URI", "")
        return scrub(named or mlflow_uri(config))
    except UserError:
        return "the one that MLFLOW_TRACKING_URI names on the nodes"


def address_option(address: str) -> list[str]:
    """The option that the next command needs to reach the same cluster."""
    return ["--address", address] if address != DEFAULT_ADDRESS else []


def follow_job(cluster: Cluster, job_id: str) -> None:
    """Draw what a job does until it is over, then exit as it did."""
    try:
        with interruptible():
            summary = replay_log(split_lines(cluster.follow(job_id)))
    except Interrupted as stop_:
        again = command_line(["mhe", "logs", job_id, "-f", *address_option(cluster.address)])
        console.say(f"[yellow]The job goes on.[/] {escape(again)} watches it again.")
        raise typer.Exit(stop_.exit_code) from None
    job = cluster.find(job_id, only_id=True)
    console.say(f"[bold]{escape(job.id)}[/]: {_status(job)}, {_length(job)}")
    if summary:
        console.list_rows("Where it is", [("results", summary["run"])])
    raise typer.Exit(job.exit_code)


def _facts(job: Job, cluster: Cluster) -> Iterable[tuple[str, str]]:
    yield "dashboard", f"{cluster.address}/#/jobs/{job.id}"
    if not job.path:
        return
    yield "run", job.path
    events = [parse_event(line) for line in cluster.read_output(job.id).splitlines()]
    kinds = {event["event"]: event for event in events if event}
    if "start" in kinds and (newest := kinds.get("metrics")):
        yield "step", f"{newest['step'] + 1:,} of {kinds['start']['steps']:,}"
        yield "loss", f"{newest['loss']:.3f}"
        yield "speed", f"{newest['images_per_s']:,.0f} images/s"
    if "checkpoint" in kinds:
        yield "checkpoint", f"of step {kinds['checkpoint']['step']:,}"
    if job.driver_exit_code:
        yield "exit code", str(job.driver_exit_code)


def _status(job: Job) -> str:
    style = _STYLES.get(job.status, "")
    return f"[{style}]{job.status}[/]" if style else job.status


def _length(job: Job) -> str:
    return format_duration(max(0.0, (job.ended or time.time()) - job.started))


def _is_visible(path: str) -> bool:
    return not is_local_url(path) or url_exists(path)
