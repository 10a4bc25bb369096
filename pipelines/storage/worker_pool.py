"""Many tasks on some processes, in bounded memory.

`run_tasks` hides where tasks run: here, in processes of this machine, or wherever else a `Workers`
sends them. What is finished is recorded by this process alone, so that it is kept whoever is lost.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from typing import Any, Protocol, TypeVar

from mhe_dist.errors import RunError

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)` while something long is made."""


_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def no_progress(done: int, total: int) -> None:
    """A progress callback that does nothing."""


class Workers(Protocol):
    """Where tasks run."""

    def map_unordered(
        self, function: Callable[[T], R], tasks: Iterable[tuple[int, T]]
    ) -> Generator[tuple[int, R]]:
        """Call `function` for every numbered task; yield `(number, result)` as each one ends.

        Args:
            function: importable.
            tasks: taken from the iterable only when there will soon be room for another one.

        Raises:
            RunError: workers were lost, and others could not take their place. What `function`
                raises is raised here, too.
        """


@dataclass(frozen=True)
class Processes:
    """`Workers` on this machine.

    Attributes:
        count: how many work at the same time; with one, the tasks run in this process.
        environments: more variables for the processes, handed out in turn.
    """

    count: int = 1
    environments: Sequence[Mapping[str, str]] = ()

    def map_unordered(
        self, function: Callable[[T], R], tasks: Iterable[tuple[int, T]]
    ) -> Generator[tuple[int, R]]:
        """See `Workers.map_unordered`."""
        return map_unordered(function, tasks, self.count, self.environments)


HERE = Processes()


class LazyTasks(Sequence[T]):
    """Tasks that are made when they are needed."""

    def __init__(self, count: int, task: Callable[[int], T]) -> None:
        """Args: how many; from a number to a task."""
        self._count, self._task = count, task

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        return self._task(range(self._count)[number])


def never_finished(number: int) -> None:
    """For `run_tasks`: no task was finished before."""


def run_tasks(
    function: Callable[[T], R],
    tasks: Sequence[T],
    workers: Workers = HERE,
    finished: Callable[[int], R | None] = never_finished,
    record: Callable[[int, R], None] = lambda number, result: None,
    progress: Progress = no_progress,
) -> list[R]:
    """The results of all tasks, in their order, wherever they run; see `Workers.map_unordered`.

    Args:
        function: importable.
        tasks: taken one by one, and only those that are not finished.
        workers: where they run.
        finished: the result of a task by its number, if an earlier attempt had it.
        record: is given each new result and its task's number, in this process, as it comes.
        progress: called with the finished tasks and their number.
    """
    total = len(tasks)
    results = {n: kept for n in range(total) if (kept := finished(n)) is not None}
    progress(len(results), total)
    todo = ((number, tasks[number]) for number in range(total) if number not in results)
    with closing(workers.map_unordered(function, todo)) as made:
        for number, result in made:
            record(number, result)
            results[number] = result
            progress(len(results), total)
    return [results[number] for number in range(total)]


def map_unordered(
    function: Callable[[T], R],
    tasks: Iterable[tuple[int, T]],
    processes: int,
    environments: Sequence[Mapping[str, str]] = (),
) -> Generator[tuple[int, R]]:
    """Call `function` for every numbered task; yield `(number, result)` as each one ends.

    Args:
        function: importable, because the processes are started afresh; with one process it is
            called here and may be anything.
        tasks: taken from the iterable only when a process will soon be free.
        processes: how many work at the same time.
        environments: more variables for the processes, handed out in turn.

    Raises:
        RunError: a process was killed. What `function` raises is raised here, too.
    """
    if processes <= 1:
        for number, task in tasks:
            yield number, function(task)
        return
    with _one_thread_each():
        yield from _map_in_pool(function, tasks, processes, environments)


def _map_in_pool(
    function: Callable[[T], R],
    tasks: Iterable[tuple[int, T]],
    processes: int,
    environments: Sequence[Mapping[str, str]],
) -> Generator[tuple[int, R]]:
    # Not forked: threads of this process (fsspec's, BLAS's) may hold locks at that moment.
    context = get_context("spawn")
    variables = context.SimpleQueue()
    for each in islice(cycle(environments or [{}]), processes):
        variables.put(dict(each))
    ending, end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(variables, ending))
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
    except BaseException:
        end.close()  # nobody wants what is at work: a part may take minutes
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        end.close()
        ending.close()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let new processes compute on one thread: they are as many as the cores.

    Their libraries read these variables when they are loaded, those of this process have done so.
    """
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _finished(waiting: dict[Future[R], int]) -> Iterator[tuple[int, R]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        yield waiting.pop(future), future.result()


def _begin(environments: Any, ending: Any) -> None:
    """Take the next environment, leave Ctrl-C to the parent, and do not outlive its interest."""
    os.environ.update(environments.get())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(ending,), daemon=True).start()


def _end_with_parent(ending: Any) -> None:
    """End this process when the parent has closed its end of a pipe, or has ended itself."""
    parent = parent_process()
    if parent is not None:
        wait_for([parent.sentinel, ending])
        os._exit(1)
