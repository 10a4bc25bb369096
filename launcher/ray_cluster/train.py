"""A config on Ray Train: the cluster, the workers, their failures, and what they report."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from launcher.events import Event
from launcher.ray_cluster import ray_internals, worker
from launcher.ray_cluster.elastic import RESIZE_CHECK_S, group_size
from launcher.ray_cluster.mailbox import NAMESPACE, STOP_NOW, Mailbox, name_of
from launcher.signals import Interrupted, deferred, undisturbed
from mhe_dist.config.schema import Config
from mhe_dist.errors import Preempted, RunError, UserError
from pipelines.pretrain import preemption as stopping
from pipelines.runs.folder import absolute_path, logs_folder

POLL_S = 0.25
GRACE_S = 120.0  # that a run has for its checkpoint once it is asked to stop
OBJECT_STORE_BYTES = 100 * 2**20  # only events and settings pass through it

DRIVER_ENVIRONMENT = {
    **worker.NO_TELEMETRY,
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # would write every printed line twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # lets 127.0.0.1 be the node's address
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def train(config: Config, handle: Callable[[Event], None]) -> None:
    """Run a config on a Ray cluster of this machine, and return when it has ended.

    Must be called on the main thread; whatever ends it, an exception that a signal raises too,
    no process of the cluster stays behind.

    Args:
        config: what to run.
        handle: called with each event of `pipelines.pretrain.main`, in order.

    Raises:
        UserError: the run needs what this machine lacks, or a worker found a mistake.
        RunError: the run failed more often than `scale.max_failures`.
        Preempted: SIGTERM came, and the run saved itself within `GRACE_S`.
    """
    with local_cluster(config):
        _train(config, handle)


def train_on(address: str, config: Config, handle: Callable[[Event], None]) -> None:
    """Run a config on an existing Ray cluster, and return when it has ended; see `train`.

    Args:
        address: of the cluster; "auto" for the one that this process belongs to.
        config: what to run.
        handle: called with each event, in order.
    """
    with attached(address):
        _train(config, handle)


def _train(config: Config, handle: Callable[[Event], None]) -> None:
    told = threading.Event()
    fit: _Fit | None = None

    def _stop() -> None:
        told.set()
        handle({"event": "stopping"})
        if fit:
            fit.stop()

    with deferred(_stop, GRACE_S) as check:
        fit = _Fit(config)

        def _ended() -> bool:
            check()
            return fit.ended()

        fit.watch(_ended, handle, told.is_set)


class _Fit:
    """Ray Train at work, seen from the driver."""

    def __init__(self, config: Config) -> None:
        import ray

        # Both stay on the driver's node: a lost node of workers must not take them along.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        name = name_of(absolute_path(config.run.path))
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
        self._task = task.remote(_settings(config, self._mailbox))

    def ended(self) -> bool:
        """Whether Ray Train has come to its end; waits a moment for that."""
        import ray

        return bool(ray.wait([self._task], timeout=POLL_S)[0])

    def stop(self) -> None:
        """Ask the workers to save and stop."""
        self._mailbox.stop.remote()

    def watch(
        self,
        ended: Callable[[], bool],
        handle: Callable[[Event], None],
        told_to_stop: Callable[[], bool],
    ) -> None:
        """Hand on events until `ended`; raise what ended the run if that is not its last step."""
        import ray

        follow(ended, lambda: ray.get(self._mailbox.take.remote()), handle, told_to_stop)
        try:
            ray.get(self._task)
        except ray.exceptions.RayError as failure:
            raise RunError(_reason(failure)) from failure


def follow(
    ended: Callable[[], bool],
    take: Callable[[], list[Event]],
    handle: Callable[[Event], None],
    told_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Hand on events until the run has ended, and raise a worker's final failure at once.

    A worker that was preempted is a lost worker, unless the whole run was told to stop.

    Raises:
        Preempted: the run was told to stop, and has saved.
        Interrupted: somebody asked the driver not to wait for that.
    """
    done = False
    while not done:
        done = ended()
        for event in take():
            if event["event"] == STOP_NOW:
                raise Interrupted(signal.SIGTERM)
            handle(event)
            if event["event"] == "failed" and event["final"]:
                raise _error(event)
            if event["event"] == "preempted" and told_to_stop():
                raise Preempted(event["message"])


@contextmanager
def attached(address: str) -> Iterator[None]:
    """This process as a driver of an existing Ray cluster for the length of a `with` block.

    Raises:
        UserError: no cluster answers there.
    """
    os.environ.update(DRIVER_ENVIRONMENT)
    import ray

    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
    except ConnectionError as error:
        raise UserError(f"no Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        with undisturbed():
            ray.shutdown()


@contextmanager
def local_cluster(config: Config) -> Iterator[None]:
    """Ray on this machine's loopback for the length of a `with` block.

    Its own log files are moved to `logs/ray/<session>` of the run when it ends.
    """
    os.environ.update(DRIVER_ENVIRONMENT | LOCAL_ENVIRONMENT)
    import ray

    folder = tempfile.mkdtemp(prefix="mhe-", dir="/tmp")  # short: socket paths end at 107 bytes
    try:
        with deferred():  # Ray would set a handler of its own for SIGTERM, too
            cpus = config.scale.workers * config.scale.cpus_per_worker
            ray_internals.start_local_ray(cpus, OBJECT_STORE_BYTES, folder)
        _check_resources(config, ray.cluster_resources())
        yield
    finally:
        with undisturbed():
            ray.shutdown()
            _keep_logs(Path(folder), logs_folder(config) / "ray")


def _check_resources(config: Config, resources: dict[str, float]) -> None:
    """Refuse what Ray would wait for without end."""
    gpus = int(resources.get("GPU", 0))
    if config.scale.gpu and gpus < config.scale.fewest:
        raise UserError(
            f"scale.workers={config.scale.workers} with scale.gpu=true needs a GPU for each one; "
            f"this machine has {gpus}. Lower scale.workers or set scale.gpu=false."
        )


def _settings(config: Config, mailbox: Any) -> dict[str, Any]:
    """What workers are told (see `worker.train`), with paths that hold in any folder."""
    return {
        "config": config.model_dump(),
        "folder": str(Path.cwd()),
        "logs": str(logs_folder(config)),
        "storage": absolute_path(config.run.path),
        "mailbox": mailbox,
    }


def _fit(settings: dict[str, Any]) -> None:
    """Run Ray Train's controller to its end, in a process of its own."""
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    config = Config.model_validate(settings["config"])
    scale = config.scale
    trainer = ray_internals.create_trainer(
        partial(group_size, config=config) if scale.elastic else None,
        train_loop_per_worker=worker.train,
        train_loop_config=settings,
        torch_config=TorchConfig(
            backend="nccl" if scale.gpu else "gloo", timeout_s=int(scale.timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=(scale.min_workers, scale.workers) if scale.elastic else scale.workers,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
            use_gpu=scale.gpu,
            resources_per_worker=worker.resources(config),
            placement_strategy=scale.placement.upper(),
            accelerator_type=scale.accelerator_type or None,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=settings["storage"],
            failure_config=FailureConfig(max_failures=scale.max_failures),
            callbacks=[ray_internals.on_main_thread_of_workers(stopping.listen)],
            worker_runtime_env={"env_vars": worker.environment(config)},
        ),
    )
    trainer.fit()


def _error(event: Event) -> Exception:
    """The exception that a worker's `failed` event stands for."""
    if event["user"]:
        return UserError(event["message"])
    return RunError(f"rank {event['rank']}: {event['message']}")


def _reason(failure: BaseException) -> str:
    """What ended Ray Train, in the words of the worker that failed first."""
    failure = getattr(failure, "cause", None) or failure
    for rank, error in sorted(getattr(failure, "worker_failures", {}).items()):
        cause = getattr(error, "cause", None) or error
        return f"worker {rank}: {type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"
    return str(failure)


def _keep_logs(folder: Path, target: Path) -> None:
    """Move the logs of a Ray session out of its folder, and remove that."""
    session = (folder / "session_latest").resolve()
    if (session / "logs").is_dir():
        shutil.copytree(session / "logs", target / session.name, ignore_dangling_symlinks=True)
    shutil.rmtree(folder, ignore_errors=True)
