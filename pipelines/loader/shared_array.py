"""Arrays that a process shares with those that it starts.

Python's own lie in a file of `/dev/shm`, or of the temporary folder where there is too little room.
No room is reserved for them: where that is full, too, the first write ends the process by SIGBUS.
"""

from __future__ import annotations

import os
import sys
import weakref
from math import prod
from multiprocessing.heap import Arena
from typing import Any

import numpy as np
import numpy.typing as npt


class SharedArray:
    """An array of zeros; processes that get it when they start see what any of them writes.

    On Linux it is memory and no file of any folder, so nothing but memory can run out.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        """Take memory; its pages are taken when they are written first."""
        self.shape, self.dtype = shape, np.dtype(dtype)
        size = prod(shape) * self.dtype.itemsize
        if sys.platform != "linux":
            self._arena = Arena(size)
            return
        descriptor = os.memfd_create("mhe")
        weakref.finalize(self, os.close, descriptor)  # kept for processes that are not forked
        os.ftruncate(descriptor, size)
        self._arena = Arena(size, descriptor)

    @property
    def values(self) -> npt.NDArray[Any]:
        """The array, of `shape` and `dtype`; it may be written to."""
        return np.frombuffer(self._arena.buffer, self.dtype).reshape(self.shape)
