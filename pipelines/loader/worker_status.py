"""What each loader process is doing, in memory that outlives it: a killed process reports nothing.

When a process has died, its last entry tells which sample it worked on.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.errors import RunError
from pipelines.data.order import ShardSpan
from pipelines.data.sample import BadSampleError, parse_members, read_span
from pipelines.loader.shared_array import SharedArray
from pipelines.shards.index import ShardIndex

READING: Final = 1
DECODING: Final = 2
WAITING: Final = 3
_DESCRIPTIONS: Final = {
    0: "began with",
    READING: "read the window that begins with",
    DECODING: "decoded",
    WAITING: "had nothing to do after",
}
_PID, _ACTIVITY, _SAMPLE, _FIELDS = range(4)


class WorkerStatus(NamedTuple):
    """The last entry of a loader process that died.

    Attributes:
        process: its number among the rank's.
        activity: `READING` a window, `DECODING`, or `WAITING` for a request; 0: nothing yet.
        sample: number of the sample through the index; of the first one that is read.
        exit_code: of the process; the negative number of the signal that ended it.
    """

    process: int
    activity: int
    sample: int
    exit_code: int


class WorkerStatusTable:
    """A row for each loader process of a rank, which the process overwrites for each sample."""

    def __init__(self, processes: int) -> None:
        self._table = SharedArray((processes, _FIELDS), np.int64)
        self._children: list[multiprocessing.process.BaseProcess] = []

    def remember_children(self) -> None:
        """Remember the children of this process, when the loader has started its own."""
        self._children = list(multiprocessing.active_children())

    def register(self, process: int) -> None:
        """Record that the calling process is loader process number `process`."""
        self._table.values[process, _PID] = os.getpid()

    def update(self, process: int, activity: int, sample: int) -> None:
        """Record what loader process number `process` is about to do."""
        row = self._table.values[process]
        row[_SAMPLE], row[_ACTIVITY] = sample, activity

    def dead(self) -> list[WorkerStatus]:
        """The last entries of the children that ended with an error or by a signal."""
        dead = []
        for process, row in enumerate(self._table.values.tolist()):
            for child in self._children:
                code = child.exitcode if child.pid == row[_PID] else None
                if code:
                    dead.append(WorkerStatus(process, row[_ACTIVITY], row[_SAMPLE], code))
        return dead


def describe_dead_worker(statuses: WorkerStatusTable, index: ShardIndex) -> str:
    """Which of the loader processes died, and on which sample; empty if all live."""
    dead = statuses.dead()
    if not dead:
        return ""
    process, activity, sample, code = dead[0]
    shard, position = index.locate(sample)
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return (
        f"loader process {process} ended with {end} while it {_DESCRIPTIONS[activity]} "
        f"{index.sample_name(shard, position)}{_key(index, shard, position)}; if memory ran out, "
        "fewer data.loader_workers or a smaller data.shuffle_window need less"
    )


def _key(index: ShardIndex, shard: int, position: int) -> str:
    """The key of a sample in brackets, where it can be read."""
    try:
        [raw] = read_span(index, ShardSpan(shard, position, position + 1))
        return f" ({parse_members(raw, alone=False)['__key__']})"
    except (BadSampleError, RunError):
        return ""
