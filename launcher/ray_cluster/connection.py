"""This process as the driver of a Ray cluster: one that exists, or one of this machine alone."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from launcher.ray_cluster import ray_internals
from launcher.ray_cluster.elastic import explain_no_room
from launcher.ray_cluster.environment import DRIVER_ENVIRONMENT, LOCAL_ENVIRONMENT
from launcher.ray_cluster.mailbox import NAMESPACE
from launcher.signals import Interrupted, signals_deferred, signals_ignored
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError, describe_error
from mhe_dist.limits import available_cores, available_memory
from mhe_dist.sizes import GIB, MIB
from pipelines.runs.folder import logs_folder

Answer = TypeVar("Answer")

OWN_CLUSTER: Final = "auto"  # the one that started this process
ANSWER_S: Final = 5.0  # in which a host takes a connection
NODES_S: Final = 180.0  # a process on a busy node or a slow disk takes a minute to import Ray
_LOOK_EVERY_S: Final = 2.0
OBJECT_STORE_BYTES = 100 * MIB  # only events and settings pass through it
LONGEST_TEMPORARY_FOLDER = 24


@contextmanager
def existing_cluster(address: str, environment: dict[str, Any] | None = None) -> Iterator[None]:
    """Connect this process to an existing Ray cluster for the length of a `with` block.

    Args:
        address: of the cluster; "auto" for the one that this process belongs to.
        environment: `runtime_env` of the processes that work for this one.

    Raises:
        UserError: it is no address, no cluster answers there, or this process is connected to one
            already.
        RunError: the cluster answers, and Ray still cannot connect to it.
    """
    os.environ.update(DRIVER_ENVIRONMENT)
    import ray

    _refuse_second_connection()
    _require_listener(address)
    try:
        with signals_deferred():
            _connect(address, environment)
        yield
    finally:
        with signals_ignored():
            ray.shutdown()


def ask_nodes(function: Callable[..., Answer], *arguments: Any) -> list[tuple[Any, Answer]]:
    """Call a function on each living node of this process's cluster: Ray's node, and its answer.

    Raises:
        UserError: names the nodes that do not answer in time, or that left the cluster meanwhile.
    """
    import ray

    nodes: dict[Any, Any] = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = {"ray.io/node-id": node["NodeID"]}
            task: Any = ray.remote(num_cpus=0, max_retries=0, label_selector=here)(function)
            nodes[task.remote(*arguments)] = node
    silent, deadline = list(nodes), time.monotonic() + NODES_S
    while silent:
        _, silent = ray.wait(silent, num_returns=len(silent), timeout=_LOOK_EVERY_S)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if gone := [task for task in silent if nodes[task]["NodeID"] not in alive]:
            raise UserError(f"these nodes left the cluster meanwhile: {_hosts(nodes, gone)}")
        if silent and time.monotonic() > deadline:
            names = _hosts(nodes, silent)
            raise UserError(f"these nodes do not answer within {NODES_S:.0f} s: {names}")
    return [(node, get_result(task)) for task, node in nodes.items()]


def get_result(task: Any) -> Any:
    """What a task gives or raises: of an error Ray makes another one, whose message is a traceback.

    Raises:
        RayError: of Ray; the task was lost.
    """
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _hosts(nodes: dict[Any, Any], tasks: list[Any]) -> str:
    return ", ".join(nodes[task]["NodeManagerHostname"] for task in tasks)


def _require_listener(address: str) -> None:
    """Refuse in a few seconds what Ray would wait for many minutes for, or has no words for.

    Raises:
        UserError: it is neither "auto" nor HOST:PORT, or nothing listens there.
    """
    if address == OWN_CLUSTER:
        return
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number, or a larger one
        host, port = None, None
    if not host or not port or address != parts.netloc:
        raise UserError(
            f"--address={address}: give HOST:PORT of the cluster's head, as `ray start` printed it "
            f"(HEAD:6379), or {OWN_CLUSTER} on one of its nodes"
        )
    try:
        socket.create_connection((host, port), ANSWER_S).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host, such as a..b
        raise UserError(
            f"no Ray cluster at {address}: {error}. Give HOST:PORT of the head of a running one, "
            f"or {OWN_CLUSTER} on one of its nodes"
        ) from error


def _connect(address: str, environment: dict[str, Any] | None) -> None:
    try:
        ray_internals.connect(address, NAMESPACE, environment)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster at {address}: {error}") from error
    except Interrupted:
        raise
    except Exception as error:
        raise RunError(
            f"Ray cannot connect to its cluster at {address} ({describe_error(error)}). "
            "It may be starting, ending or overloaded: ray status --address "
            f"{address} says how it is. The same command again tries anew."
        ) from error


@contextmanager
def local_cluster(config: Config, dashboard: bool = False) -> Iterator[str]:
    """Run Ray on this machine's loopback for the length of a `with` block.

    When the block ends, Ray's own log files are moved to `logs/ray/<session>` of the run.

    Yields:
        The link of the dashboard; empty without one.

    Raises:
        UserError: this machine has no room for the workers, or this process is connected to a
            cluster already.
        RunError: Ray does not start, as on a machine that is too busy.
    """
    os.environ.update(DRIVER_ENVIRONMENT | LOCAL_ENVIRONMENT)
    import ray

    _refuse_second_connection()
    folder = ""
    try:
        with signals_deferred():
            folder = tempfile.mkdtemp(prefix="mhe-", dir=_temporary_folder())
            cpus = config.scale.workers * config.scale.cpus_per_worker
            try:
                link = ray_internals.start_local_ray(cpus, OBJECT_STORE_BYTES, folder, dashboard)
            except Interrupted:
                raise
            except Exception as error:
                raise RunError(_start_failure(config, error)) from error
        if reason := explain_no_room(config, [ray.cluster_resources()]):
            raise UserError(reason)
        yield link
    finally:
        with signals_ignored():
            ray_internals.end_local_ray()
            if folder:
                _move_logs(Path(folder), logs_folder(config) / "ray")


def _temporary_folder() -> str:
    """Where Ray's files may be: the path of a socket ends after 107 bytes, and Ray adds 80."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= LONGEST_TEMPORARY_FOLDER else "/tmp"


def _start_failure(config: Config, error: Exception) -> str:
    """Why Ray may not have started here, and what to do; its own words are seldom the cause."""
    cores, load = available_cores(), os.getloadavg()[0]
    memory = available_memory() / GIB
    disk = shutil.disk_usage("/tmp").free / GIB
    return (
        f"Ray did not start on this machine ({describe_error(error)}). Load {load:.1f} on {cores} "
        f"cores, {memory:.1f} GiB of memory and {disk:.1f} GiB in /tmp free. Most often the "
        "machine is too busy: end other work or wait, or set a lower scale.workers "
        f"(now {config.scale.workers}); then the same command goes on. Ray's own logs are in "
        f"{logs_folder(config) / 'ray'}, and mhe doctor checks this machine."
    )


def _refuse_second_connection() -> None:
    """Refuse to replace the connection of a process, such as a notebook, that uses Ray itself."""
    import ray

    if ray.is_initialized():
        raise UserError(
            "this process is connected to a Ray cluster already: call ray.shutdown() first"
        )


def _move_logs(folder: Path, target: Path) -> None:
    """Move the logs of a Ray session out of its folder, and remove the folder."""
    session = (folder / "session_latest").resolve()
    if (session / "logs").is_dir():
        shutil.copytree(session / "logs", target / session.name, ignore_dangling_symlinks=True)
    shutil.rmtree(folder, ignore_errors=True)
