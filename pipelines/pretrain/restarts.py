"""What a run lost when it was interrupted: restarts, steps done again, and the time between.

All of it is read from `metrics.jsonl` before the restarted run cuts that file back to its
checkpoint, and goes into the record of the same run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import fsspec

from mhe_dist.tracking.jsonl import read_records
from mhe_dist.train.loop import StepInfo
from pipelines.pretrain.recorder import Recorder

COUNT, LOST = "restarts", "restart_lost_steps"
SECONDS, OWN_SECONDS = "restart_seconds", "restart_own_seconds"


@dataclass
class Restart:
    """How a process took up a run.

    Attributes:
        count: restarts of the run so far, this one included; 0 where the run begins.
        lost_steps: recorded steps that are after the checkpoint and will be done again.
        last_sign: Unix time of the last record before; None where the run begins.
        began: Unix time when this process began to look for the checkpoint.
    """

    count: int = 0
    lost_steps: int = 0
    last_sign: float | None = None
    began: float = field(default_factory=time.time)

    def look_back(self, path: str, step: int) -> None:
        """Learn from the record at `path` (`metrics.jsonl`) that the run goes on at `step`."""
        records = read_records(path)
        if not records:
            return
        self.count = 1 + int(max(record.get(COUNT, 0.0) for record in records))
        done = [record["step"] + 1 for record in records if "loss" in record]
        self.lost_steps = max(0, max(done, default=step) - step)
        self.last_sign = max(record["time"] for record in records)

    def noted(self, step: int, steps: Iterable[StepInfo], recorder: Recorder) -> Iterator[StepInfo]:
        """Hand on `steps`; what was lost is noted before the first, the times with it."""
        if self.last_sign is None:
            yield from steps
            return
        recorder.note(step, {COUNT: float(self.count), LOST: float(self.lost_steps)})
        for number, info in enumerate(steps):
            if number == 0:
                now = time.time()
                times = {SECONDS: now - self.last_sign, OWN_SECONDS: now - self.began}
                recorder.note(info.step + 1, times)
            yield info


def skipped(path: str) -> set[int]:
    """Steps that the run at `path` does without."""
    filesystem, place = fsspec.core.url_to_fs(f"{path}/skipped.json")
    return set(json.loads(filesystem.cat_file(place))) if filesystem.exists(place) else set()
