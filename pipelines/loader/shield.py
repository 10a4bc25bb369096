"""Keeps the loader processes of a rank alive when everybody is told to stop, and no longer than it.

systemd, Slurm and `timeout` send SIGTERM to all processes of a job. A rank answers by saving, and
needs its loader processes until the step has ended; they end when the rank ends them, or with it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def sigterm_held_back() -> Iterator[None]:
    """Start processes in the block: they, and this thread, get SIGTERM only later.

    So none can end between its first instruction and `shield`. A signal that came for this process
    meanwhile is delivered at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Start processes in the block: this one hears Ctrl-C at its end, and they hear none.

    What a handler raises while Python forks is lost, and may leave the lock of `logging` taken for
    ever. The terminal sends Ctrl-C to the loader processes, too; they end with their rank.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: received.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(signal.SIGINT, received[0])


def shield(parent: int, worker: int) -> None:
    """In a loader process: only its parent's SIGTERM ends it, and it does not outlive its parent.

    A handler cannot do that: Python tells it no sender, and torch ends its processes by SIGTERM. A
    thread asks for the signal and its sender instead; threads that start later hold it back, too.

    Args:
        parent: process id of the rank. Elsewhere than on Linux the process stays as it was.
        worker: number of the process, which torch passes.
    """
    if sys.platform != "linux":  # no way to learn the sender
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # A fork server is the parent of what it starts, and outlives the rank that asked it.
    if multiprocessing.get_start_method() != "forkserver":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            os._exit(1)
    threading.Thread(target=_end_with, args=(parent,), name="shield", daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent tells it to stop."""
    assert sys.platform == "linux"
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
