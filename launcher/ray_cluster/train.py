"""A config on Ray Train: the workers, their failures, and what they report."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launcher.events import Event
from launcher.ray_cluster import ray_internals
from launcher.ray_cluster.connection import existing_cluster, local_cluster
from launcher.ray_cluster.crash_log import find_crash
from launcher.ray_cluster.elastic import RESIZE_CHECK_S, LongWait, describe_wait, group_size
from launcher.ray_cluster.environment import worker_environment, worker_resources
from launcher.ray_cluster.mailbox import (
    STOP_NOW,
    ControllerMailbox,
    Mailbox,
    ends_group,
    mailbox_name,
)
from launcher.ray_cluster.worker import train_worker
from launcher.signals import Interrupted, signals_deferred
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_from_dict
from mhe_dist.errors import Preempted, RunError, UserError, describe_error
from pipelines.pretrain import preemption
from pipelines.runs.folder import absolute_path, logs_folder

POLL_S = 0.25
_RESUMABLE = "it goes on from its last checkpoint, if there is one"
GRACE_S = 120.0  # that a run has for its checkpoint once it is asked to stop


def train_locally(config: Config, handle: Callable[[Event], None], dashboard: bool = False) -> None:
    """Run a config on a Ray cluster of this machine, and return when it has ended.

    Whatever ends it, an exception that a signal raises too, no process of the cluster stays behind.

    Args:
        config: what to run.
        handle: called with each event of `pipelines.pretrain.main`, in order.
        dashboard: whether Ray's dashboard is started; its link is the first event.

    Raises:
        UserError: the run needs what this machine lacks, or a worker found a mistake.
        RunError: the run failed more often than `scale.max_failures`.
        Preempted: SIGTERM came, and the run saved itself within `GRACE_S`.
    """
    with local_cluster(config, dashboard) as link:
        if link:
            handle({"event": "dashboard", "link": link})
        _train(config, handle, is_alone=True)


def train_on_cluster(address: str, config: Config, handle: Callable[[Event], None]) -> None:
    """Run a config on an existing Ray cluster and return when it has ended; see `train_locally`.

    Args:
        address: of the cluster; "auto" for the one that this process belongs to.
        config: what to run.
        handle: called with each event, in order.
    """
    with existing_cluster(address):
        _train(config, handle, is_alone=False)


def _train(config: Config, handle: Callable[[Event], None], is_alone: bool) -> None:
    stop_requested = threading.Event()
    task: TrainTask | None = None

    def _stop() -> None:
        stop_requested.set()
        handle({"event": "stopping"})
        if task and not task.stop():
            raise Preempted(f"told to stop while its workers started; {_RESUMABLE}")

    with signals_deferred(_stop, GRACE_S) as check_signals:
        task = TrainTask(config, is_alone)

        def _has_ended() -> bool:
            check_signals()
            return task.has_ended()

        task.watch(_has_ended, handle, stop_requested.is_set)


class TrainTask:
    """Ray Train at work, seen from the driver.

    Args:
        config: what to run.
        is_alone: whether the cluster is this run's alone.
    """

    def __init__(self, config: Config, is_alone: bool) -> None:
        import ray

        # Both stay on the driver's node: a lost node of workers must not take them along.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        name = mailbox_name(absolute_path(config.run.path))
        actor: Any = ray.remote(num_cpus=0, label_selector=here)(Mailbox)
        task: Any = ray.remote(num_cpus=0, max_retries=0, label_selector=here)(_fit)
        try:
            self._mailbox = actor.options(name=name).remote()
        except ValueError as taken:  # Ray's answer to a name that is in use
            raise UserError(
                f"{config.run.path} is being trained by another job of this cluster: "
                "mhe jobs lists it, mhe stop ends it"
            ) from taken
        # A task, not a thread here: a thread that waits for Ray while the cluster goes down ends
        # the whole process, from native code, before anything can be tidied up.
        self._config = config
        self._settings = _worker_settings(config, self._mailbox)
        self._task = task.remote(self._settings, is_alone)

    def has_ended(self) -> bool:
        """Whether Ray Train has come to its end; waits a moment for that."""
        import ray

        return bool(ray.wait([self._task], timeout=POLL_S)[0])

    def stop(self) -> bool:
        """Ask the workers to save and stop; whether there are any that train."""
        import ray

        return bool(ray.get(self._mailbox.stop.remote()))

    def watch(
        self,
        has_ended: Callable[[], bool],
        handle: Callable[[Event], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        """Forward events until the run has ended; raise the error that ended it, if one did.

        Whoever tells a run to stop may end its processes, too: a failure that follows is part of
        that.
        """
        import ray

        long_wait = LongWait(
            lambda: stop_requested() or bool(ray.get(self._mailbox.training.remote())),
            lambda: describe_wait(self._config, ray_internals.list_rooms()),
        )

        def take() -> list[Event]:
            events: list[Event] = ray.get(self._mailbox.take.remote())
            return events + long_wait.events()

        try:
            forward_events(has_ended, take, handle, stop_requested)
            ray.get(self._task)
        except ray.exceptions.RayError as failure:
            if stop_requested():
                raise Preempted(f"told to stop, and its workers ended; {_RESUMABLE}") from failure
            logs, command = Path(self._settings["logs"]), self._settings["command"]
            raise RunError(_failure_message(failure, logs, command)) from failure


def forward_events(
    has_ended: Callable[[], bool],
    take: Callable[[], list[Event]],
    handle: Callable[[Event], None],
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Hand on events until the run has ended, and raise a worker's final failure at once.

    A worker that was preempted or failed is a lost worker, unless the whole run was asked to stop:
    then nobody waits for others to take its place.

    Args:
        has_ended: whether the run has ended.
        take: the events since the last call, oldest first.
        handle: called with each event.
        stop_requested: whether the whole run was asked to stop.

    Raises:
        Preempted: the run was asked to stop, and has saved or goes on from its last checkpoint.
        Interrupted: somebody asked the driver not to wait for that.
    """
    ended = False
    while not ended:
        ended = has_ended()
        for event in take():
            if event["event"] == STOP_NOW:
                raise Interrupted(signal.SIGTERM, unsaved=True)
            handle(event)
            if event["event"] == "failed" and event["final"]:
                raise _to_exception(event)
            if event["event"] == "preempted" and stop_requested():
                raise Preempted(event["message"])
            if ends_group(event) and stop_requested():
                message = f"rank {event['rank']} failed ({event['message']})"
                raise Preempted(f"told to stop, and then {message}; {_RESUMABLE}")


def _worker_settings(config: Config, mailbox: Any) -> dict[str, Any]:
    """The argument of `worker.train_worker`, with paths that hold in any folder."""
    return {
        "config": config.model_dump(),
        "folder": str(Path.cwd()),
        "logs": str(logs_folder(config)),
        "storage": absolute_path(config.run.path),
        "command": uuid.uuid4().hex,
        "mailbox": mailbox,
    }


def _fit(settings: dict[str, Any], is_alone: bool) -> None:
    """Run Ray Train's controller to its end, in a process of its own."""
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    from launcher.ray_cluster.rank_environment import rank_environment

    config = config_from_dict(settings["config"])
    scale = config.scale
    trainer = ray_internals.create_trainer(
        partial(group_size, config=config) if scale.elastic else None,
        is_alone,
        ControllerMailbox(settings["mailbox"]),
        # Not as its `train_loop_config`, which Ray's dashboard shows: the config may hold secrets.
        train_loop_per_worker=partial(train_worker, settings),
        backend_config=rank_environment(),
        scaling_config=ScalingConfig(
            num_workers=(scale.min_workers, scale.workers) if scale.elastic else scale.workers,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
            use_gpu=scale.gpu,
            resources_per_worker=worker_resources(config),
            placement_strategy=scale.placement.upper(),
            accelerator_type=scale.accelerator_type or None,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=settings["storage"],
            failure_config=FailureConfig(max_failures=scale.max_failures),
            callbacks=[ray_internals.on_main_thread_of_workers(preemption.listen_for_sigterm)],
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )
    trainer.fit()


def _to_exception(event: Event) -> Exception:
    """The exception that a worker's `failed` event stands for."""
    if event["user"]:
        return UserError(event["message"])
    return RunError(f"rank {event['rank']}: {event['message']}")


def _failure_message(failure: BaseException, logs: Path, command: str) -> str:
    """What ended Ray Train, in the words of the worker that failed first.

    Args:
        failure: what Ray raised.
        logs: folder of the workers' logs, if this node has them.
        command: see `crash_log.find_crash`.
    """
    from ray.exceptions import RayError

    failure = getattr(failure, "cause", None) or failure
    for rank, error in sorted(getattr(failure, "worker_failures", {}).items()):
        if crash := find_crash(logs / f"rank_{rank}.log", command):
            return f"worker {rank} was {crash}"
        cause = getattr(error, "cause", None) or error
        return f"worker {rank}: {describe_error(cause, last=True)}"
    if isinstance(failure, RayError):
        return f"Ray lost a process that the run needs ({describe_error(failure)}); {_RESUMABLE}"
    return str(failure)
