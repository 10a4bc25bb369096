"""Many tasks on some processes, in bounded memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

from mhe_dist.errors import RunError

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)` while something long is made."""


def no_progress(done: int, total: int) -> None:
    """A progress callback that does nothing."""


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_unordered(
    function: Callable[[T], R], tasks: Iterable[tuple[int, T]], processes: int
) -> Iterator[tuple[int, R]]:
    """Call `function` for every numbered task; yield `(number, result)` as each one ends.

    Args:
        function: importable, because the processes are started afresh; with one process it is
            called here and may be anything.
        tasks: taken from the iterable only when a process will soon be free.
        processes: how many work at the same time.

    Raises:
        RunError: a process was killed. What `function` raises is raised here, too.
    """
    if processes <= 1:
        for number, task in tasks:
            yield number, function(task)
        return
    # Not forked: threads of this process (fsspec's, BLAS's) may hold locks at that moment.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin)
    waiting: dict[Future[R], int] = {}
    try:
        for number, task in tasks:
            waiting[pool.submit(function, task)] = number
            if len(waiting) >= 2 * processes:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    except BrokenProcessPool as error:
        raise RunError(
            "a process was killed while it worked, perhaps for want of memory: try fewer processes"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(waiting: dict[Future[R], int]) -> Iterator[tuple[int, R]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        yield waiting.pop(future), future.result()


def _begin() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)
