"""Tasks on the nodes of a Ray cluster: each task of lost nodes is done again on others."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from launcher.ray_cluster import ray_internals
from launcher.ray_cluster.code_package import copy_code
from launcher.ray_cluster.connection import existing_cluster, get_result
from launcher.ray_cluster.environment import task_environment
from launcher.ray_cluster.mailbox import errors_scrubbed
from launcher.signals import signals_deferred
from launcher.terminal import console
from mhe_dist.errors import RunError, UserError, describe_error

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 0.25
LOST_TIMES = 10  # how often the workers of one task may be lost
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a job, whose code is there


class RayTasks:
    """`Workers` on the cluster that this process is connected to.

    Args:
        count: tasks at the same time; 0: one for each core of the cluster, or for each GPU.
        gpu: each task has a GPU to itself.
    """

    def __init__(self, count: int = 0, gpu: bool = False) -> None:
        self._count, self._gpu = count, gpu

    def map_unordered(
        self, function: Callable[[T], R], tasks: Iterable[tuple[int, T]]
    ) -> Generator[tuple[int, R]]:
        """See `Workers.map_unordered`.

        A signal is answered between two results: Ray's native code does not survive an exception.
        """
        import ray

        # Not pulled to the nodes that have much to do already, as Ray does with small tasks.
        remote: Any = ray.remote(
            num_cpus=1,
            num_gpus=int(self._gpu),
            max_retries=LOST_TIMES,
            scheduling_strategy="SPREAD",
        )(_call)
        folder, left, waiting = str(Path.cwd()), iter(tasks), dict[Any, int]()
        with signals_deferred() as check_signals:
            while True:
                for number, task in _take(left, self._room() - len(waiting)):
                    waiting[remote.remote(function, task, folder)] = number
                if not waiting:
                    return
                done, _ = ray.wait(list(waiting), timeout=POLL_S)
                check_signals()
                for reference in done:
                    yield waiting.pop(reference), _result(reference)
                    check_signals()

    def _room(self) -> int:
        """How many tasks are sent: one that works and one that waits for each slot there is now."""
        import ray

        if self._count:
            return self._count
        return 2 * max(1, int(ray.cluster_resources().get("GPU" if self._gpu else "CPU", 0)))


def _take(tasks: Iterator[tuple[int, T]], count: int) -> Iterator[tuple[int, T]]:
    """The next `count` tasks at most."""
    for _ in range(count):
        try:
            yield next(tasks)
        except StopIteration:
            return


@errors_scrubbed((UserError, RunError))  # Ray shows them to whoever lists the tasks
def _call(function: Callable[[T], R], task: T, folder: str) -> R:
    """Do a task on some node, where paths mean what they mean to the driver."""
    if os.path.isdir(folder):
        os.chdir(folder)
    return function(task)


def _result(reference: Any) -> Any:
    """The result of a task that has ended; raises what it raised."""
    import ray

    try:
        return get_result(reference)
    except ray.exceptions.RayError as error:
        raise RunError(
            f"a task lost its worker {LOST_TIMES + 1} times ({describe_error(error)}), "
            "perhaps for want of memory: try fewer at the same time; the same command goes on"
        ) from error


def _tell_lost(address: str) -> None:
    console.say(f"[yellow]warning:[/] node {address} is lost; others do again what it worked on")


@contextmanager
def cluster_tasks(address: str, count: int = 0, gpu: bool = False) -> Iterator[RayTasks]:
    """Workers on the nodes of a cluster inside the block; the code that runs here runs there.

    Args:
        address: of the cluster, `HOST:6379`, or `auto` on one of its nodes.
        count, gpu: see `RayTasks`.

    Raises:
        UserError: no cluster answers, or it has nothing to work with.
    """
    import ray

    with tempfile.TemporaryDirectory(prefix="mhe-") as folder:
        environment: dict[str, Any] = {"env_vars": task_environment(gpu)}
        if _JOB not in os.environ:
            copy_code(Path(folder))
            environment["working_dir"] = folder
        with ray_internals.lost_nodes_told(_tell_lost), existing_cluster(address, environment):
            kind = "GPU" if gpu else "CPU"
            if ray.cluster_resources().get(kind, 0) < 1:
                raise UserError(
                    f"--address {address}: no node of this cluster has a {kind} to give; "
                    f"ray status --address {address} says what there is"
                )
            yield RayTasks(count, gpu)
