"""Asks the nodes and a trial whether a run would work, on a cluster or on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from launcher.preflight.machine import list_gpus
from launcher.preflight.node_probe import probe_node
from launcher.preflight.predict import (
    CostPrediction,
    as_it_would_run,
    find_obstacles,
    find_shortages,
    predict_cost,
)
from launcher.preflight.trial_process import TRIAL_S, measure_trial
from launcher.ray_cluster.connection import NODES_S
from launcher.ray_cluster.jobs import POLL_S, Cluster, Job, build_submission, staging_folder
from launcher.terminal import console
from launcher.terminal.event_log import parse_error, parse_event
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError, counted

START_S = 60.0  # of a job


def assess(config: Config, events: Iterator[dict[str, Any]], trial: bool) -> CostPrediction | None:
    """Refuse a run that cannot work, say what makes it slow, and predict its cost.

    Args:
        config: of the run.
        events: of `survey_machine` or `survey_cluster`.
        trial: whether to wait for the trial.

    Returns:
        the prediction; None without a trial, or while the data set is still to be made.

    Raises:
        UserError: the run cannot work; the message holds every reason.
    """
    nodes = next(events)["nodes"]
    _refuse(find_obstacles(config, nodes))
    for message in sorted({node["slow"] for node in nodes} - {""}):
        console.note(message)
    as_run = as_it_would_run(config, nodes)
    if config.scale.elastic:
        console.note(
            f"of {config.scale.min_workers} to {config.scale.workers} workers (scale.workers) the "
            f"run would have {as_run.scale.workers} there"
        )
    if not trial:
        return None
    measured = next(events)["measured"]
    if measured is None:
        return None
    prediction = predict_cost(as_run, measured)
    _refuse(find_shortages(as_run, prediction, nodes))
    return prediction


def survey_machine(config: Config, trial: bool) -> Iterator[dict[str, Any]]:
    """What this machine says, then what a trial in a process of its own measured."""
    found = probe_node(config)
    # `mhe train` gives its workers as many of Ray's CPUs as they ask for.
    cpus = config.scale.workers * config.scale.cpus_per_worker
    resources = {"CPU": float(cpus), "GPU": float(len(list_gpus()))}
    nodes = [{**found, "resources": resources}]
    yield {"nodes": nodes}
    workers = as_it_would_run(config, nodes).scale.workers
    yield {"measured": measure_trial(config, workers, workers) if trial else None}


def survey_cluster(config: Config, cluster: Cluster, trial: bool) -> Iterator[dict[str, Any]]:
    """What the nodes of a cluster say, then what a trial there measured.

    Raises:
        UserError: the nodes did not answer in time.
        RunError: the job failed.
    """
    verb = "preflight" if trial else "probe"
    with staging_folder() as folder:
        sent = build_submission(config, cluster.address, int(time.time()), {}, folder, verb)
        cluster.submit(sent)
        events = _events(cluster, sent.id)
        try:
            yield from events
        finally:
            job = cluster.find(sent.id)
            if not job.is_over:
                cluster.stop(job)


def _events(cluster: Cluster, job_id: str) -> Iterator[dict[str, Any]]:
    """The events of the job, each as soon as it is there."""
    deadline, seen = time.monotonic() + START_S + NODES_S, 0
    while True:
        job = cluster.find(job_id)
        output = cluster.read_output(job_id) if job.status != "pending" else ""
        events = [event for line in output.splitlines() if (event := parse_event(line))]
        for event in events[seen:]:
            deadline = time.monotonic() + TRIAL_S
            yield event
        seen = len(events)
        if job.is_over and seen < 2:
            raise _failure(cluster.address, job, output)
        if time.monotonic() > deadline:
            raise UserError(
                f"{cluster.address} did not answer in time: mhe jobs shows what keeps it busy; "
                f"--no-preflight goes without"
            )
        time.sleep(POLL_S)


def _failure(address: str, job: Job, output: str) -> UserError | RunError:
    """What ended a job too early, in the words of `launcher.job` if it had any."""
    message = parse_error(output)
    kind = UserError if message and job.exit_code == 2 else RunError
    return kind(f"preflight on {address}: {message or job.message.strip()}")


def _refuse(found: list[str]) -> None:
    if found:
        count = counted(len(found), "reason")
        raise UserError("\n  ".join([f"this run cannot work there, for {count}:", *found]))
