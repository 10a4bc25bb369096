"""Ray's private modules: every use of one is here, and nowhere else.

Private names move between releases of Ray. Each function says what it uses, what for, and for which
release that was checked; after an update of Ray, check this file.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

from launcher.ray_cluster.elastic import RESIZE_EVERY_S, NodeRoom, pause_before_restart
from launcher.ray_cluster.environment import free_ports
from launcher.ray_cluster.mailbox import ControllerMailbox
from launcher.signals import kill_with_descendants
from mhe_dist.errors import Preempted
from pipelines.loader.shield import sigterm_held_back

LEASE_S, RENEWAL_S = 15, 3
_DEAD_NODE = re.compile(r"node with node id: \w+ and address: (\S+) .* has been marked dead")
_AGENT_PORT = re.compile(r"--listen-port=([1-9]\d*)")


def start_local_ray(
    cpus: int, object_store_bytes: int, folder: str, dashboard: bool = False
) -> str:
    """Start Ray on the loopback interface of this machine, with all its files in `folder`.

    Its processes hold SIGTERM back, as every process inherits that from its parent: whoever tells
    all processes of a job to stop does not end those that its save needs. `end_local_ray` ends
    them; they end with this process, too, by the signal that Ray asks the kernel for.

    What would scale the cluster or collect its processes' output for this one is left out, and the
    dashboard, unless it is asked for: then its link is returned, else an empty text.

    The ports of a node's agents are given, see `agents_not_awaited`.

    Checked with Ray 2.60.0: the arguments `_node_ip_address`, `_temp_dir` and
    `_metrics_export_port` of `ray.init`, and `RayParams`, which it makes; no process of Ray sets
    its signal mask anew.
    """
    import ray
    from ray._private import parameter

    metrics, *agents = free_ports(4)
    module: Any = parameter
    all_services = module.RayParams
    module.RayParams = partial(
        all_services,
        no_monitor=True,
        include_log_monitor=False,
        metrics_agent_port=agents[0],
        runtime_env_agent_port=agents[1],
        dashboard_agent_listen_port=agents[2],
    )
    try:
        with _sigterm_kept(), agents_not_awaited():
            context = ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes,
                _node_ip_address="127.0.0.1",
                _metrics_export_port=metrics,
                _temp_dir=folder,
            )
    finally:
        module.RayParams = all_services
    return f"http://{context.dashboard_url}" if dashboard else ""


@contextmanager
def agents_not_awaited() -> Iterator[None]:
    """Nodes that this process starts do not wait for agents whose ports are given.

    For a port that an agent chooses, a node waits until the agent has imported all that it needs,
    and ends itself after 15 s, which a busy machine or a slow disk takes. Of the port of the
    dashboard's agent Ray tells the agent alone; here the node hears of it, too.

    Checked with Ray 2.60.0: `ray._private.services.start_ray_process(command, process_type, ...)`,
    the node's option `--dashboard_agent_listen_port`, and `--listen-port` in the command of its
    agent.
    """
    from ray._private import ray_constants, services

    start = services.start_ray_process

    def _start(command: list[str], process_type: str, *rest: Any, **options: Any) -> Any:
        given = _AGENT_PORT.search(" ".join(command))
        if process_type == ray_constants.PROCESS_TYPE_RAYLET and given:
            command = [*command, f"--dashboard_agent_listen_port={given[1]}"]
        return start(command, process_type, *rest, **options)

    services.start_ray_process = _start
    try:
        yield
    finally:
        services.start_ray_process = start


def connect(address: str, namespace: str, environment: dict[str, Any] | None = None) -> None:
    """Make this process a driver of an existing cluster; its workers have a `runtime_env`."""
    import ray

    with _sigterm_kept():
        ray.init(
            address=address,
            namespace=namespace,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


@contextmanager
def lost_nodes_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Hand the address of each lost node to `tell`, where Ray prints pages about it.

    Checked with Ray 2.60.0: `listen_error_messages` of `ray._private.worker` calls
    `print_to_stdstream` with the lines of a message, in a thread.
    """
    from ray._private import worker

    printed = worker.print_to_stdstream

    def find_node(data: dict[str, Any], ignore_prefix: bool) -> None:
        for line in data["lines"]:
            if found := _DEAD_NODE.search(line):
                tell(found[1])

    worker.print_to_stdstream = find_node
    try:
        yield
    finally:
        worker.print_to_stdstream = printed


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Hold SIGTERM back while `ray.init` works, and undo what that sets for it.

    It sets a handler that leaves the process without a word, and its native code one that aborts.
    Checked with Ray 2.60.0: `ray._private.utils.set_sigterm_handler`, which `ray.init` looks up.
    """
    from ray._private import utils

    is_main = threading.current_thread() is threading.main_thread()
    set_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    # Elsewhere than on Linux, Ray ends its processes by a process that needs the signal.
    with sigterm_held_back() if sys.platform == "linux" else nullcontext():
        try:
            yield
        finally:
            utils.set_sigterm_handler = set_handler
            handler = signal.getsignal(signal.SIGTERM)  # as Python knows it
            if is_main and handler is not None:
                signal.signal(signal.SIGTERM, handler)


def end_local_ray() -> None:
    """Leave the cluster that this process started, and end all its processes at once.

    Ray itself asks one after another by SIGTERM, which they hold back, and waits a second for each.

    Checked with Ray 2.60.0: `ray._private.worker._global_node` with `all_processes` and
    `kill_all_processes`, which `ray.shutdown` calls once this process is disconnected.
    """
    import ray

    if node := ray._private.worker._global_node:
        node.kill_all_processes = lambda **_: kill_with_descendants(
            info.process.pid for info in chain.from_iterable(node.all_processes.values())
        )
    ray.shutdown()


def create_trainer(
    fit_group: Callable[[int], int] | None,
    is_alone: bool,
    mailbox: ControllerMailbox,
    **arguments: Any,
) -> Any:
    """A trainer whose group has a size that the run can use, without services that it does not use.

    Ray starts an actor for each of its services, one after the other, and each takes seconds. A run
    needs none for Ray Data, and alone on its cluster none that shares the cluster out or frees what
    a lost controller held.

    Checked with Ray 2.60.0: `DataParallelTrainer._create_default_callbacks` and
    `_initialize_and_run_controller(scaling_policy=..., failure_policy=...)`; the policies travel to
    Ray's controller instead of Ray's own.

    Args:
        fit_group: number of workers that can be used of those there is room for; None: the number
            of `scaling_config` is fixed.
        is_alone: whether the cluster is this run's alone, and ends with it.
        mailbox: of the run.
        arguments: of `DataParallelTrainer`.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    unused = (DatasetsCallback, PlacementGroupCleanerCallback) if is_alone else (DatasetsCallback,)
    policy = _scaling_policy(fit_group, is_alone, mailbox)

    class Trainer(DataParallelTrainer):
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            parts["scaling_policy"] = policy(arguments["scaling_config"])
            parts["failure_policy"] = _failure_policy(self.run_config.failure_config, mailbox)
            return super()._initialize_and_run_controller(**parts)

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if not isinstance(callback, unused)]

    return Trainer(**arguments)


def _failure_policy(config: Any, mailbox: ControllerMailbox) -> Any:
    """Whether a group that failed starts again: `max_failures` times without a new checkpoint.

    Ray counts over the whole life of a run, and workers that saved and left in order, too.

    Checked with Ray 2.60.0: `DefaultFailurePolicy.make_decision` and `_worker_group_failures`; a
    group whose workers return, instead of raising `Preempted`, has completed the run.
    """
    from ray.train.v2._internal.execution import failure_handling as handling

    class Restarts(handling.DefaultFailurePolicy):
        def make_decision(self, training_failed_error: Any) -> Any:
            """Decide, and pause before a restart."""
            failures = getattr(training_failed_error, "worker_failures", {}).values()
            if mailbox.stopping():
                return handling.FailureDecision.RAISE
            if any(isinstance(failure, Preempted) for failure in failures):
                return handling.FailureDecision.RETRY
            if mailbox.has_new_checkpoint():
                self._worker_group_failures = 0
            before = self._worker_group_failures
            decision = super().make_decision(training_failed_error)
            again = decision is handling.FailureDecision.RETRY
            if again and self._worker_group_failures > before:
                pause_before_restart(self._worker_group_failures, mailbox.announce)
            return decision

    return Restarts(config)


def _scaling_policy(
    fit_group: Callable[[int], int] | None, is_alone: bool, mailbox: ControllerMailbox
) -> Callable[..., Any]:
    """The class of the policy that decides how many workers a run has; see `create_trainer`.

    Ray's elastic policy takes whatever number of workers there is room for; a run can only use
    numbers that divide its micro-batches. To resize a group it kills the workers: here they are
    asked to save and leave. And what a run reserves of a cluster stays reserved for three minutes
    when its controller is ended from outside: here that is a short lease that its holder renews.

    Checked with Ray 2.60.0: `after_controller_start`, `_maybe_send_resource_request`, and
    `_count_possible_workers` and both decisions of `ElasticScalingPolicy`.
    """
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        FixedScalingPolicy,
        NoopDecision,
        ResizeDecision,
        ScalingPolicy,
    )

    class Leased(ScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None:
            """Reserve, for a short time."""
            _shorten_leases()
            super().after_controller_start(train_run_context)

    class Fixed(Leased, FixedScalingPolicy): ...

    class Alone(FixedScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None:
            """Reserve nothing: nobody else is there."""

        def _maybe_send_resource_request(self) -> None:
            pass

    class Elastic(Leased, ElasticScalingPolicy):
        _asked_at = -RESIZE_EVERY_S

        def make_decision_for_non_running_worker_group(self) -> Any:
            """Decide by the nodes that there are now: Ray looks at them every 20 s."""
            self._autoscaling_coordinator.get_reserved_resources.remote(
                self._requester_id, recompute=True
            )
            return super().make_decision_for_non_running_worker_group()

        def make_decision_for_running_worker_group(self, *group: Any, **more: Any) -> Any:
            """Ask the group to leave where another size is possible; nothing else is done."""
            decision = super().make_decision_for_running_worker_group(*group, **more)
            now = time.monotonic()
            if isinstance(decision, ResizeDecision) and now - self._asked_at >= RESIZE_EVERY_S:
                self._asked_at = now
                mailbox.ask_to_leave(f"starting again with {decision.num_workers} workers")
            return NoopDecision()

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            assert fit_group
            return fit_group(super()._count_possible_workers(reserved_resources))

    return Elastic if fit_group else Alone if is_alone else Fixed


def _shorten_leases() -> None:
    """Let what this controller reserves end soon after it; Ray has no setting for that.

    Checked with Ray 2.60.0: both constants are read when a request is made, not at import.
    """
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client

    autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = LEASE_S
    autoscaling_coordinator_client.AUTOSCALING_REQUESTS_INTERVAL_S = RENEWAL_S


def on_main_thread_of_workers(function: Callable[[], None]) -> Any:
    """A callback for `RunConfig` that runs a function on each new worker's main thread.

    Training runs on another thread of the worker, where no signal handler can be set.
    Checked with Ray 2.60.0: `WorkerGroupCallback.after_worker_group_start`, `WorkerGroup.execute`.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class OnMainThread(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            worker_group.execute(function)

    return OnMainThread()


def is_draining() -> bool:
    """Whether Ray told this worker that a node of its group will be taken away.

    Not `ray.train.get_preemption_info()`, for which all ranks wait for one another.
    Checked with Ray 2.60.0: `get_train_context().preemption_context`, set on every worker.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def enable_token_auth() -> None:
    """Send a token to the cluster if one lies in the home, and stay quiet about it.

    That is what `ray start` does, which asks for a token once `ray.init` has left one in the home.
    Checked with Ray 2.60.0: `maybe_enable_token_auth_if_token_available`.
    """
    from ray._private.authentication import authentication_token_setup

    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def is_token_auth_enabled() -> bool:
    """Whether this process sends a token to the cluster (checked with Ray 2.60.0)."""
    from ray._private.authentication import authentication_utils

    return bool(authentication_utils.is_token_auth_enabled())


def list_rooms() -> list[NodeRoom]:
    """The living nodes of the cluster, and what of each is free at this moment.

    Checked with Ray 2.60.0: `ray._private.state.available_resources_per_node`, by node id.
    """
    import ray
    from ray._private import state

    free = state.available_resources_per_node()
    return [
        NodeRoom(node["NodeManagerHostname"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
