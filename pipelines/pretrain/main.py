"""One rank of a pretraining run: config -> data, model, head, engine, records; then the loop.

Runs alike under Ray Train (launcher/ray_cluster/worker.py), in one process, and under
`torchrun -m pipelines.pretrain CONFIG`.
"""

from __future__ import annotations

from typing import Any

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import connect
from mhe_dist.distributed.watchdog import watched
from mhe_dist.errors import Preempted
from mhe_dist.tracking.base import Status
from mhe_dist.train.divergence import Divergence
from pipelines.pretrain import finish, rollback
from pipelines.pretrain.recorder import Report, ignore
from pipelines.pretrain.run import Run


def main(config: Config, report: Report = ignore) -> dict[str, Any]:
    """Train, evaluate and export; go on where the newest complete checkpoint ends.

    Args:
        config: the whole config.
        report: called on rank 0 with events, plain dicts (see `Recorder.event`).

    Returns:
        The summary of the run, which rank 0 writes to `summary.json` last of all.

    Raises:
        Preempted: a rank was told to stop (`pipelines.pretrain.preemption`); everything is saved.
        Stuck: a rank did not come to a collective within `scale.timeout_s`.
        Diverged: the run no longer learns (`pipelines.pretrain.rollback`).
    """
    topology = connect(config.scale.timeout_s)
    while (summary := _attempt(Run(config, topology, report))) is None:
        pass
    return summary


def _attempt(run: Run) -> dict[str, Any] | None:
    """The summary of the finished run; None: it went back to a checkpoint and must go on there."""
    status: Status = "failed"
    try:
        with watched(run.topology, run.loop.doing):
            try:
                run.train()
            except Divergence as divergence:
                rollback.roll_back(run, divergence)
                return None
            summary = finish.finish(run)
        status = "finished"
        return summary
    except Preempted:
        status = "killed"
        raise
    finally:
        run.tracker.close(status)
