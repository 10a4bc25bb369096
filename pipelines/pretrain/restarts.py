"""How far a run is, and what it lost when it was interrupted: restarts, repeated steps, time.

What it lost is read from `metrics.jsonl` before the restarted run cuts that file back to its
checkpoint, and goes into the record of the same run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mhe_dist.distributed.failures import decided_by_first
from mhe_dist.distributed.topology import Topology
from mhe_dist.tracking.base import HELDOUT
from mhe_dist.tracking.jsonl import iter_records
from mhe_dist.train.loop import StepInfo
from pipelines.pretrain.recorder import Recorder
from pipelines.runs.folder import read_if_exists

RESTARTS, LOST_STEPS = "restarts", "restart_lost_steps"
SKIPPED_FILE = "skipped.json"  # in the run's folder
SECONDS, OWN_SECONDS = "restart_seconds", "restart_own_seconds"


@dataclass
class RunProgress:
    """How far a run is.

    Attributes:
        step: completed steps.
        images: of earlier processes.
        resumed_from: checkpoint that this process took up.
        scored: whether the model of that was evaluated.
        precision: "bf16" or "float32", in which that was trained; None: nobody knows.
    """

    step: int = 0
    images: int = 0
    resumed_from: str | None = None
    scored: bool = False
    precision: str | None = None


@dataclass(frozen=True)
class Restart:
    """How a process took up a run.

    Attributes:
        began: Unix time when this process began to look for the checkpoint.
        step: steps of the checkpoint.
        count: restarts of the run so far, this one included; 0 where the run begins.
        lost_steps: recorded steps that are after the checkpoint and will be done again.
        last_record: Unix time of the last record before; None where the run begins.
        heldout: figures on record of the model that the checkpoint holds; empty: none.
    """

    began: float
    step: int = 0
    count: int = 0
    lost_steps: int = 0
    last_record: float | None = None
    heldout: dict[str, float] = field(default_factory=dict)

    def recorded(
        self, step: int, steps: Iterable[StepInfo], recorder: Recorder
    ) -> Iterator[StepInfo]:
        """Yield `steps`, which follow on `step`; record what was lost, and when the first ended."""
        if self.last_record is None:
            yield from steps
            return
        lost = {RESTARTS: float(self.count), LOST_STEPS: float(self.lost_steps)}
        recorder.record_state(step, lost)
        for number, info in enumerate(steps):
            if number == 0:
                now = time.time()
                times = {SECONDS: now - self.last_record, OWN_SECONDS: now - self.began}
                recorder.record_state(info.step + 1, times)
            yield info


def read_restart(path: str, step: int, began: float) -> Restart:
    """How this process takes up a run at `step`, from its record at `path` (`metrics.jsonl`)."""
    restarts, done, last = 0.0, step, -math.inf
    heldout: dict[str, float] = {}
    for record in iter_records(path):
        restarts = max(restarts, record.get(RESTARTS, 0.0))
        last = max(last, record["time"])
        if "loss" in record:
            done = max(done, record["step"] + 1)
        if record["step"] == step - 1:
            heldout |= {k: v for k, v in record.items() if k.startswith(HELDOUT)}
    if last == -math.inf:
        return Restart(began)
    return Restart(
        began, step, 1 + int(restarts), lost_steps=done - step, last_record=last, heldout=heldout
    )


def read_skipped_steps(path: str, topology: Topology) -> set[int]:
    """Steps that the run at `path` leaves out since it diverged there; all ranks must call."""
    text = decided_by_first(lambda: read_if_exists(f"{path}/{SKIPPED_FILE}"), topology)
    return set(json.loads(text or "[]"))
