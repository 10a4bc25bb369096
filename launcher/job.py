"""What a submitted job does on the cluster: `python -m launcher.job run CONFIG`, and its helpers.

Its log holds an event per line (`terminal/event_log.py`) and, if there was one, the error at its
end. Exit codes are those of `mhe`, and 75 for a run that was asked to stop and has saved.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from launcher import cli, execute
from launcher.preflight.checks import check_data, check_names
from launcher.preflight.node_probe import probe_node
from launcher.preflight.predict import as_it_would_run, find_obstacles, workers_on_nodes
from launcher.ray_cluster.connection import OWN_CLUSTER, ask_nodes, get_result
from launcher.ray_cluster.environment import DRIVER_ENVIRONMENT, worker_environment
from launcher.ray_cluster.mailbox import NAMESPACE, mailbox_name
from launcher.signals import Interrupted, interruptible
from launcher.tasks.submitted import open_submitted
from launcher.terminal.event_log import EventLogWriter
from mhe_dist.config.load import load_config
from mhe_dist.errors import Preempted, UserError
from mhe_dist.redact import scrub
from pipelines.runs.folder import read_summary
from pipelines.runs.resume import refuse_changed_config
from pipelines.shards.index import index_exists

LIBRARIES = ["ray.train.torch", "mlflow"]  # a worker's, whose memory counts


def main(arguments: list[str]) -> int:
    """Do what a job is for, `VERB ARGUMENT...`, and give its exit code."""
    verb, *rest = arguments
    try:
        with interruptible():
            return VERBS[verb](*rest) or 0
    except Interrupted as stop:
        return stop.run_exit_code
    except Preempted as stop:
        return stop.exit_code
    except Exception as error:
        if not isinstance(error, UserError):
            sys.stderr.write(scrub(traceback.format_exc()))
        name = "" if type(error).__module__ == "mhe_dist.errors" else f"{type(error).__name__}: "
        sys.stderr.write(f"error: {name}{scrub(str(error))}\n")
        return 2 if isinstance(error, UserError) else 1


def run(file: str) -> None:
    """Train, evaluate and export the run of a YAML file on this cluster."""
    config = load_config(file, checks=[check_data, check_names])
    changes = refuse_changed_config(config)
    lines = EventLogWriter(sys.stdout)
    if not changes and (done := read_summary(config.run.path)) is not None:
        lines.handle({"event": "end", "summary": done})
        return
    execute.run(config, lines, OWN_CLUSTER)


def stop_now(path: str) -> None:
    """Tell the driver of the run at `path` not to wait for a checkpoint."""
    import ray

    ray.init(OWN_CLUSTER, namespace=NAMESPACE, log_to_driver=False)
    try:
        ray.get(ray.get_actor(mailbox_name(path)).stop.remote(now=True))
    except ValueError:  # no such actor: the run has ended, or has not begun
        sys.stderr.write(f"no run at {path} is being trained\n")


def probe_nodes(file: str) -> None:
    """Ask every node what it has and reaches."""
    preflight(file, trying=False)


def preflight(file: str, trying: bool = True) -> None:
    """Ask every node, then let one try its workers' share if nothing speaks against it."""
    import ray

    config = load_config(file)
    os.environ.update(DRIVER_ENVIRONMENT)
    ray.init(OWN_CLUSTER, namespace=NAMESPACE, log_to_driver=False)
    lines = EventLogWriter(sys.stdout)
    answers = ask_nodes(probe_node, config)
    found = [{**report, "resources": node["Resources"]} for node, report in answers]
    lines.handle({"event": "nodes", "nodes": found})
    if not trying or find_obstacles(config, found):
        return
    as_run = as_it_would_run(config, found)
    crowds = workers_on_nodes(as_run, found)
    workers = max(crowds)
    fullest = answers[crowds.index(workers)][0]
    # The head, where such a task goes by itself, may be smaller, or without the right cards.
    here = {"ray.io/node-id": fullest["NodeID"]}
    gpus = workers * int(config.scale.gpu)
    task: Any = ray.remote(num_cpus=0, num_gpus=gpus, label_selector=here)(_try)
    trial_task = task.options(runtime_env={"env_vars": worker_environment(config)})
    measured = get_result(trial_task.remote(file, workers, as_run.scale.workers))
    lines.handle({"event": "trial", "measured": measured})


def _try(file: str, workers: int, of_workers: int) -> dict[str, Any] | None:
    """A trial in processes of its own, away from Ray's threads and memory."""
    from launcher.preflight.trial_process import measure_trial

    return measure_trial(load_config(file), workers, of_workers)


def trial(file: str, workers: str, of_workers: str) -> None:
    """Print what some workers of a run need as a line of JSON; null while there is no data set."""
    from pipelines.pretrain.dry_run import dry_run

    config = load_config(file)
    measured = None
    if index_exists(config.data.shards):
        measured = dry_run(config, int(workers), int(of_workers), LIBRARIES)
    sys.stdout.write(json.dumps(measured) + "\n")


def command(file: str) -> int:
    """Run another command of mhe with its tasks on this cluster; its exit code."""
    return cli.run(open_submitted(file))


VERBS: dict[str, Callable[..., int | None]] = {
    "run": run,
    "command": command,
    "stop-now": stop_now,
    "probe": probe_nodes,
    "preflight": preflight,
    "trial": trial,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
