"""What Ray and its processes are given: variables, ports, and the resources of a worker."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Mapping

from mhe_dist.config.schema import Config
from mhe_dist.distributed.device import choose_device

NO_TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
DRIVER_ENVIRONMENT = {
    **NO_TELEMETRY,
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Where a node has just been lost, Ray Train still counts it, and asks for as many workers as
    # before. After so many seconds without them it counts anew; by default after a minute.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # would write every printed line twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
AGENT_PORTS = range(20_000, 30_000)  # above Ray's own, below what systems and Kubernetes hand out
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # lets 127.0.0.1 be the node's address
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A node ends itself where the agent that sets processes up has not answered by then (30 s).
    "RAY_agent_register_timeout_ms": "180000",
}


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on: at random, as two clusters may start at once.

    Raises:
        OSError: there are not as many.
    """
    free: list[int] = []
    for port in random.sample(AGENT_PORTS, len(AGENT_PORTS)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                free.append(port)
        if len(free) == count:
            return free
    raise OSError(f"fewer than {count} of the ports {AGENT_PORTS[0]} to {AGENT_PORTS[-1]} are free")


def process_environment(config: Config) -> dict[str, str]:
    """Environment variables of every process of a run, set before it imports anything.

    The thread counts are those of the config: two ranks that each start a thread per core are
    slower than one.
    """
    threads = str(config.scale.cpus_per_worker)
    return {**NO_TELEMETRY, **dict.fromkeys(_THREADS, threads), "PYTHONUNBUFFERED": "1"}


def task_environment(gpu: bool) -> dict[str, str]:
    """Environment variables of a process that does tasks: one thread, and no GPU but its own.

    Ray tells a task that has a GPU which one it is.
    """
    variables = {**NO_TELEMETRY, **dict.fromkeys(_THREADS, "1"), "PYTHONUNBUFFERED": "1"}
    return variables if gpu else variables | choose_device(False).environment


def worker_environment(config: Config) -> dict[str, str]:
    """Those of a worker's process: without a GPU of its own it sees none.

    Not for what starts Ray on a node, which must see the node's GPUs to offer them.
    """
    return process_environment(config) | choose_device(config.scale.gpu).environment


def worker_resources(config: Config) -> dict[str, float]:
    """What Ray must reserve for one worker, by Ray's names."""
    scale = config.scale
    return {"CPU": scale.cpus_per_worker, "GPU": int(scale.gpu), **scale.resources}


def placement_needs(config: Config) -> dict[str, float]:
    """What a node must have for one worker, by Ray's names: `worker_resources`, and its kind."""
    needs = {name: amount for name, amount in worker_resources(config).items() if amount}
    if kind := config.scale.accelerator_type:
        needs[f"accelerator_type:{kind}"] = 0.001  # what Ray itself asks of such a node
    return needs


def count_room(config: Config, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many workers have room together, placed as `scale.placement` says.

    Args:
        config: of the run.
        nodes: what each one has, by Ray's names.
    """
    slots = [count_slots(has, placement_needs(config)) for has in nodes]
    if config.scale.placement == "strict_pack":
        return max(slots, default=0)
    if config.scale.placement == "strict_spread":
        return sum(map(bool, slots))
    return sum(slots)


def count_slots(has: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers with these needs have room in what a node has."""
    return min(int(has.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items())
