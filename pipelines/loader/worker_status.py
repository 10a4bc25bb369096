"""What each loader process is doing, in memory that outlives it: a killed process tells nothing."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
from ctypes import c_int64
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.errors import RunError
from pipelines.data.order import Piece
from pipelines.data.sample import Damaged, parse, read_piece
from pipelines.shards.index import ShardIndex

READING: Final = 1
DECODING: Final = 2
WAITING: Final = 3
_WORDS: Final = {
    0: "began with",
    READING: "read the window that begins with",
    DECODING: "decoded",
    WAITING: "had nothing to do after",
}
_PID, _DOING, _SAMPLE, _FIELDS = range(4)


class Note(NamedTuple):
    """The last word of a loader process.

    Attributes:
        process: its number among the rank's.
        doing: `READING` a window, `DECODING`, `WAITING` to be asked for more; 0: nothing yet.
        sample: number of the sample through the index; of the first one that is read.
        exit_code: of the process; the negative number of the signal that ended it.
    """

    process: int
    doing: int
    sample: int
    exit_code: int


class Notes:
    """A line for each loader process of a rank, which the process overwrites for each sample."""

    def __init__(self, processes: int) -> None:
        self._table = multiprocessing.RawArray(c_int64, processes * _FIELDS)
        self._children: list[multiprocessing.process.BaseProcess] = []

    def watch(self) -> None:
        """Remember the children of this process, when the loader has started its own."""
        self._children = list(multiprocessing.active_children())

    def begin(self, process: int) -> None:
        """Note that process number `process` is the one that calls this."""
        self._table[process * _FIELDS + _PID] = os.getpid()

    def write(self, process: int, doing: int, sample: int) -> None:
        """Note what process number `process` is about to do."""
        line = process * _FIELDS
        self._table[line + _SAMPLE] = sample
        self._table[line + _DOING] = doing

    def dead(self) -> list[Note]:
        """The last words of the children that did not end in good order."""
        table = list(self._table)
        lines = [table[start : start + _FIELDS] for start in range(0, len(table), _FIELDS)]
        notes = []
        for process, line in enumerate(lines):
            for child in self._children:
                code = child.exitcode if child.pid == line[_PID] else None
                if code:
                    notes.append(Note(process, line[_DOING], line[_SAMPLE], code))
        return notes


def last_words(notes: Notes, index: ShardIndex) -> str:
    """Which of the loader processes died, and on which sample; empty if all live."""
    dead = notes.dead()
    if not dead:
        return ""
    process, doing, sample, code = dead[0]
    shard = int(np.searchsorted(index.starts, sample, side="right")) - 1
    inside = sample - int(index.starts[shard])
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return (
        f"loader process {process} ended with {end} while it {_WORDS[doing]} "
        f"{index.place(shard, inside)}{_key(index, shard, inside)}; if memory ran out, fewer "
        "data.loader_workers or a smaller data.shuffle_window need less"
    )


def _key(index: ShardIndex, shard: int, inside: int) -> str:
    """The key of a sample in brackets, where it can be read."""
    try:
        [raw] = read_piece(index, Piece(shard, inside, inside + 1))
        return f" ({parse(raw, alone=False)['__key__']})"
    except (Damaged, RunError):
        return ""
