"""One rank of a pretraining run: config -> data, model, head, engine, records; then the loop.

It is the same under Ray Train (launcher/ray_cluster/worker.py), in one process such as a notebook,
and under `torchrun -m pipelines.pretrain CONFIG`. A process may run it several times.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mhe_dist.config.scale import ScaleConfig
from mhe_dist.config.schema import Config, TrainConfig
from mhe_dist.distributed.device import rank_device
from mhe_dist.distributed.topology import Topology, connect
from mhe_dist.distributed.watchdog import watched
from mhe_dist.engine.engine import leave_process_group
from mhe_dist.errors import Preempted, UserError
from mhe_dist.tracking.base import Status
from mhe_dist.train.divergence import Divergence
from pipelines.pretrain import garbage, preemption
from pipelines.pretrain.exclusive import RunLock, run_locked
from pipelines.pretrain.finish import finish_run
from pipelines.pretrain.recorder import EventHandler, ignore_event
from pipelines.pretrain.rollback import roll_back
from pipelines.pretrain.run import Run

LAST_SAVE_S = 60.0
"""For a save that runs when a rank fails; ranks that are stuck would never come to its end."""


def run_pretraining(
    config: Config, on_event: EventHandler = ignore_event, command: str = ""
) -> dict[str, Any]:
    """Train, evaluate and export; go on where the newest complete checkpoint ends.

    Args:
        config: the whole config.
        on_event: called on rank 0 with events, plain dicts (see `Recorder.emit`).
        command: names what starts this group of ranks anew when it fails (`pipelines.runs.lock`).

    Returns:
        The summary of the run, which rank 0 writes to `summary.json` last of all.

    Raises:
        UserError: another process trains the run, or a mistake in the config shows here.
        Preempted: a rank was asked to stop (`pipelines.pretrain.preemption`); everything is saved.
        Stuck: a rank did not come to a collective within `scale.timeout_s`.
        Diverged: the run no longer learns (`pipelines.pretrain.rollback`).
    """
    with _connected(config.scale) as topology:
        _refuse_ranks(config.train, topology.world_size)
        with run_locked(config.run.path, topology, command, on_event) as lock:
            while (summary := _attempt(_build(config, topology, on_event, lock))) is None:
                gc.collect()  # the run that diverged, whose parts know one another
    return summary


def _refuse_ranks(train: TrainConfig, ranks: int) -> None:
    """Refuse a number of ranks that a step cannot be shared by; `torchrun` starts any number."""
    count = train.micro_batches
    if count % ranks:
        fitting = [str(number) for number in range(1, count + 1) if count % number == 0]
        raise UserError(
            f"{ranks} ranks cannot share the {count} micro-batches of a step (train.global_batch="
            f"{train.global_batch} / train.micro_batch={train.micro_batch}); start "
            f"{', '.join(fitting)} ranks (torchrun --nproc-per-node, scale.workers), or change "
            "the sizes"
        )


def _build(config: Config, topology: Topology, on_event: EventHandler, lock: RunLock) -> Run:
    with garbage.put_off():
        return Run(config, topology, on_event, lock.check)


@contextmanager
def _connected(scale: ScaleConfig) -> Iterator[Topology]:
    """The ranks of the run; a request to stop ends with it.

    A process group that was made here is left again, but by a failed rank only where it is alone:
    it must not enter another collective.
    """
    is_ours = not dist.is_initialized()
    topology = connect(scale.timeout_s, rank_device(scale.gpu))
    in_order = topology.world_size == 1
    try:
        yield topology
        in_order = True
    except Preempted:
        in_order = True
        raise
    finally:
        preemption.clear()
        if is_ours and in_order:
            leave_process_group()


def _attempt(run: Run) -> dict[str, Any] | None:
    """The summary of the finished run; None: it went back to a checkpoint and must go on there."""
    status: Status = "failed"
    try:
        with watched(run.topology, run.loop.activity):
            try:
                run.stop_if_requested("before its first step")
                run.train()
            except Divergence as divergence:
                roll_back(run, divergence)
                return None
            summary = finish_run(run)
        status = "finished"
        return summary
    except (Preempted, KeyboardInterrupt):
        status = "killed"
        raise
    finally:
        if status == "failed":
            run.store.wait(LAST_SAVE_S)  # a save that runs saves what was done before the failure
        run.tracker.close(status)
