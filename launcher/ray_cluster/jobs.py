"""Jobs of a Ray cluster over its Jobs API: submit, list, follow, stop."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from launcher.ray_cluster.code_package import SETTINGS_FILE, CodePackage, build_package
from launcher.ray_cluster.dashboard import (
    connection_error,
    create_client,
    is_loopback,
    resolve_address,
    translate_errors,
)
from launcher.ray_cluster.environment import DRIVER_ENVIRONMENT, worker_environment
from launcher.ray_cluster.train import GRACE_S
from mhe_dist.config.schema import Config
from mhe_dist.errors import Preempted, RunError, UserError
from mhe_dist.redact import is_secret_name, scrub, scrub_urls
from mhe_dist.tracking.environment import COMMIT_VARIABLE, environment_tags

Answer = TypeVar("Answer")

READY_S = 20.0  # a cluster that has just started answers before it can take jobs
POLL_S = 0.5
PATIENCE_S = 120.0  # with a cluster that does not answer while a job is watched
STOP_WAIT_S = round(GRACE_S) + 10
"""Seconds that the driver of a stopped run has, before Ray kills it."""

RUN_KEY, PATH_KEY = "mhe_run", "mhe_path"
"""Metadata of a job: name of its run, and where that is."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NO_AGENT = "No available agent"
_CODES = {"succeeded": 0, "stopped": Preempted.exit_code}


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it.

    Attributes:
        id: what names it in the Jobs API.
        run, path: name of its run, and where that is; empty for a job of another program.
        status: pending, running, stopped, succeeded or failed.
        driver_exit_code: of the entry point; None while it runs, or when a signal ended it.
        started, ended: seconds since 1970; 0 where it has not.
        message: what Ray says about it.
        runtime_env: as it was submitted.
    """

    id: str
    run: str
    path: str
    status: str
    driver_exit_code: int | None
    started: float
    ended: float
    message: str
    runtime_env: dict[str, Any] = field(repr=False)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("stopped", "succeeded", "failed")

    @property
    def exit_code(self) -> int:
        """What a command that follows the job exits with: 0 also for one that is not over."""
        if not self.is_over:
            return 0
        return self.driver_exit_code or _CODES.get(self.status, 1)


@dataclass(frozen=True)
class Submission:
    """All that is sent to start a job.

    Attributes:
        id: of the job.
        entrypoint: shell command.
        environment: variables of the driver and, through Ray, of the workers.
        metadata: shown by Ray's dashboard.
        package: the working directory.
    """

    id: str
    entrypoint: str
    environment: dict[str, str]
    metadata: dict[str, str]
    package: CodePackage


class Cluster:
    """A Ray cluster that is spoken to over HTTP."""

    def __init__(self, address: str = "") -> None:
        """Args:
            address: `http://HOST:PORT` of the dashboard; empty: see `resolve`.

        Raises:
            UserError: nothing answers there, or it wants a token.
        """
        self.address = resolve_address(address)
        self._client = create_client(self.address)

    def submit(self, submission: Submission) -> None:
        """Start a job.

        Raises:
            UserError: a job of that id exists: somebody else has just started the same run.
        """
        environment = {
            "working_dir": str(submission.package.folder),
            "env_vars": submission.environment,
        }
        deadline = time.monotonic() + READY_S
        while True:
            try:
                with translate_errors(self.address):
                    self._client.submit_job(
                        entrypoint=submission.entrypoint,
                        submission_id=submission.id,
                        runtime_env=environment,
                        metadata=submission.metadata,
                    )
                return
            except RunError as error:
                if _NO_AGENT not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.address} answers but takes no jobs: no node runs Ray's job agent. "
                        "Where another cluster on the head's machine holds its port, start this "
                        "one with --dashboard-agent-listen-port=..."
                    ) from error
            time.sleep(POLL_S)

    def start(self, config: Config, variables: dict[str, str]) -> str:
        """Start the next job of a run; the job's id.

        Args:
            config: of the run, with paths that hold anywhere (`with_absolute_paths`).
            variables: further variables for the workers.

        Raises:
            UserError: somebody else has just started the same run.
        """
        with staging_folder() as folder:
            attempt = self.next_attempt(config.run.name)
            submission = build_submission(config, self.address, attempt, variables, folder)
            self.submit(submission)
        return submission.id

    def jobs(self) -> list[Job]:
        """The jobs that were submitted, of other programs too, newest first."""
        with translate_errors(self.address):
            details = self._client.list_jobs()
        found = [_to_job(detail) for detail in details if detail.submission_id]
        return sorted(found, key=lambda job: job.started, reverse=True)

    def find(self, name: str, only_id: bool = False) -> Job:
        """The job of that id; where there is none, the newest one of the run of that name.

        Args:
            name: a run may be called as a job of another run is; then it is the job.
            only_id: whether it is no name of a run.

        Raises:
            UserError: there is none.
        """
        known = self.jobs()
        found = [job for job in known if job.id == name]
        found += [job for job in known if job.run == name and not only_id]
        if found:
            return found[0]
        names = ", ".join(job.id for job in known[:8]) or "none"
        raise UserError(f"{self.address} has no job or run {name!r}; its jobs: {names}")

    def refuse_running(self, config: Config) -> None:
        """Refuse a run that one of the jobs is training.

        Raises:
            UserError: names the run and the job.
        """
        for job in self.jobs():
            if job.path == scrub_urls(config.run.path) and not job.is_over:
                raise UserError(
                    f"run.name={config.run.name}: job {job.id} is {job.status} with this run. "
                    f"Watch it (mhe logs {job.id} -f), stop it (mhe stop {job.id}), or start "
                    "another run: run.name=..."
                )

    def next_attempt(self, name: str) -> int:
        """Number of the next job of that name; others of them may have been deleted."""
        found = (re.fullmatch(rf"{re.escape(name)}-(\d+)", job.id) for job in self.jobs())
        return 1 + max((int(match[1]) for match in found if match), default=0)

    def read_output(self, job_id: str) -> str:
        """What a job has printed so far."""
        with translate_errors(self.address):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What a job prints, in pieces, from the beginning until the job is over.

        Raises:
            RunError: the cluster does not answer for `PATIENCE_S`.
        """
        seen = 0
        while True:
            try:
                for chunk in _read_stream(self._client.tail_job_logs(job_id), seen):
                    seen += len(chunk)
                    yield chunk
            except (RuntimeError, OSError, connection_error()):
                pass  # the connection went; whether the job did is asked next
            if _once_it_answers(partial(self.find, job_id, only_id=True)).is_over:
                yield _once_it_answers(partial(self.read_output, job_id))[seen:]
                return
            time.sleep(POLL_S)

    def stop(self, job: Job, now: bool = False) -> None:
        """Ask a job to save and stop; with `now`, to end without saving.

        Ray knows one way to stop a job: the signal that asks it to save. A second, small job tells
        the first one not to wait for that.
        """
        with translate_errors(self.address):
            self._client.stop_job(job.id)
            if now and job.path:
                env = {k: v for k, v in job.runtime_env.items() if k in ("working_dir", "env_vars")}
                self._client.submit_job(
                    entrypoint=job_entrypoint(self.address, "stop-now", job.path),
                    submission_id=f"{job.id}-stop-{int(time.time())}",
                    runtime_env=env,
                )

    def wait(self, job_id: str, timeout_s: float) -> Job:
        """The job once it is over, or as it is after that time."""
        deadline = time.monotonic() + timeout_s
        request = partial(self.find, job_id, only_id=True)
        while not (job := _once_it_answers(request)).is_over and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return job


def build_submission(
    config: Config,
    address: str,
    attempt: int,
    variables: dict[str, str],
    folder: Path,
    verb: str = "run",
) -> Submission:
    """Put together what starts a run as a job.

    Args:
        config: of the run, with paths that hold anywhere (`with_absolute_paths`).
        address: of the cluster.
        attempt: number of the job among those of this run; two people who start the same run at
            the same time get the same id, which Ray gives only once.
        variables: further variables for the workers.
        folder: an empty folder, for what is sent.
        verb: what the job does (`launcher.job`); only one that runs is a job of the run.
    """
    is_run = verb == "run"
    return Submission(
        id=f"{config.run.name}-{attempt}" if is_run else f"{config.run.name}-{verb}-{attempt}",
        entrypoint=job_entrypoint(address, verb, SETTINGS_FILE),
        environment=_environment(config) | variables,
        # Ray shows it to whoever lists the jobs.
        metadata={RUN_KEY: config.run.name, PATH_KEY: scrub_urls(config.run.path)}
        if is_run
        else {},
        package=build_package(config, folder),
    )


@contextmanager
def staging_folder() -> Iterator[Path]:
    """An empty folder for the length of a `with` block."""
    with tempfile.TemporaryDirectory(prefix="mhe-") as folder:
        yield Path(folder)


def resolve_variables(words: list[str]) -> dict[str, str]:
    """Variables from `NAME=VALUE`, or `NAME` for one that this process has.

    Raises:
        UserError: it is not set here, or looks like a secret: a cluster shows the variables of its
            jobs to whoever may list them.
    """
    variables = {}
    for word in words:
        name, given, value = word.partition("=")
        if not _VARIABLE.fullmatch(name):
            raise UserError(
                f"--env {name!r}: is no name of a variable; give NAME=VALUE, or NAME for one that "
                "is set here"
            )
        if not given:
            if name not in os.environ:
                raise UserError(f"--env {name}: there is no such variable here; --env {name}=VALUE")
            value = os.environ[name]
        if is_secret_name(name) or scrub(f"{value}") != value:
            raise UserError(
                f"--env {name}: looks like a secret, and a Ray cluster shows the variables of its "
                "jobs. Set it where the nodes are started, or mount it as a Kubernetes secret."
            )
        variables[name] = value
    return variables


def stop_environment() -> dict[str, str]:
    """The variable that gives a driver time between the signal that stops it and its end."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}


def _environment(config: Config) -> dict[str, str]:
    variables = {**DRIVER_ENVIRONMENT, **worker_environment(config), **stop_environment()}
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri and scrub(uri) == uri:
        variables["MLFLOW_TRACKING_URI"] = uri
    if commit := environment_tags().get("git_commit"):
        variables[COMMIT_VARIABLE] = commit
    return variables


def _once_it_answers(request: Callable[[], Answer]) -> Answer:
    """What the cluster answers; a network that fails for a while is waited for.

    Raises:
        RunError: it does not answer for `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return request()
        except RunError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def job_entrypoint(address: str, *words: str) -> str:
    """The shell command of a job, `python -m launcher.job` with some words.

    The interpreter is ours on this machine, else what the nodes call python. Behind a forwarded
    port of this machine there are other nodes, which do not have ours.
    """
    python = "python"
    if is_loopback(address):
        python = f'"$(command -v {shlex.quote(sys.executable)} || echo python)"'
    # Not below a shell: that would end at a SIGTERM to the group, and be taken for the job.
    return f"exec {python} -m launcher.job {shlex.join(words)}"


def _read_stream(stream: Any, skip: int) -> Iterator[str]:
    """What an asynchronous stream of texts holds beyond its first `skip` characters."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                chunk = loop.run_until_complete(anext(stream))
            except StopAsyncIteration:
                return
            fresh, skip = chunk[skip:], max(0, skip - len(chunk))
            if fresh:
                yield fresh
    finally:
        loop.run_until_complete(stream.aclose())
        loop.close()


def _to_job(detail: Any) -> Job:
    metadata = detail.metadata or {}
    return Job(
        id=detail.submission_id,
        run=metadata.get(RUN_KEY, ""),
        path=metadata.get(PATH_KEY, ""),
        status=detail.status.value.lower(),
        driver_exit_code=detail.driver_exit_code,
        started=(detail.start_time or 0) / 1000,
        ended=(detail.end_time or 0) / 1000,
        message=detail.message or "",
        runtime_env=detail.runtime_env or {},
    )
