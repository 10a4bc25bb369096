"""Images on their way from the loader processes to their rank, in memory that both share.

The memory is laid out once. New shared memory for each batch, which torch takes for a tensor that
a process hands on, is filled with zeros page by page first: a third of the time of decoding, and
again some where it is read.
"""

from __future__ import annotations

import multiprocessing
from ctypes import c_uint8
from math import prod
from typing import Final

import numpy as np

from pipelines.data.decode import Pixels


class Slots:
    """A ring of batches for each process.

    A process fills its slots in turn. With `prefetch` batches asked for in advance, it may work on
    the one that many places after the batch that its rank has just received. So `prefetch + 1`
    slots suffice if the rank copies a batch before it takes the next one of the process.
    """

    def __init__(self, processes: int, prefetch: int, images: int, side: int) -> None:
        """Lay out memory for at most `images` images of `side` x `side` in a batch."""
        self._shape: Final = (processes, prefetch + 1, images, side, side, 3)
        self._memory = multiprocessing.RawArray(c_uint8, prod(self._shape))

    def of(self, process: int, turn: int) -> Pixels:
        """uint8 `[images, side, side, 3]`: the slot of the batch number `turn` of a process."""
        slots = np.frombuffer(memoryview(self._memory), np.uint8).reshape(self._shape)
        return slots[process, turn % self._shape[1]]
