"""What a clustering has on disk until it is finished, and how it goes on where it was killed.

The work is a fixed list of stages, each a number of pieces. A piece is a pure function of the files
of earlier stages and writes its own part of a file; so a piece may be done twice, and what counts
is how many pieces of a stage are known to be on disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipelines.clustering.rows import release_pages
from pipelines.storage.staging import Journal

_RECORD: Final = 0  # number of the only entry of the journal
_EVERY_S: Final = 2.0  # seconds between two records within a stage

Watch = Callable[[str, int, int], None]
"""Called as `watch(stage, done, total)` when pieces of a stage are done."""


class ClusterState:
    """Files and progress of one clustering."""

    def __init__(self, folder: str, journal: Journal, watch: Watch, workers: int = 1) -> None:
        """Begin, or go on.

        Args:
            folder: of this machine; it is made.
            journal: belongs to the recipe of this clustering.
            watch: is told of progress.
            workers: threads that do pieces at the same time.
        """
        Path(folder).mkdir(exist_ok=True)
        self.folder, self.workers = folder, workers
        self._journal, self._watch = journal, watch
        self._done: dict[str, int] = journal.get(_RECORD) or {}
        self._arrays: dict[str, np.memmap[Any, Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> np.memmap[Any, Any]:
        """A file of that shape, mapped; zeros where nothing was written yet.

        A file of another shape is replaced: its stage was not recorded when the process was killed.
        """
        if name not in self._arrays:
            path = f"{self.folder}/{name}"
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if not os.path.exists(path) or os.path.getsize(path) != size:
                with open(path, "wb") as file:
                    file.truncate(size)
            self._arrays[name] = np.memmap(path, dtype, "r+", shape=shape)
        return self._arrays[name]

    def remove(self, *names: str) -> None:
        """Delete files that no later stage reads."""
        for name in names:
            self._arrays.pop(name, None)
            Path(f"{self.folder}/{name}").unlink(missing_ok=True)

    def save_small(self, name: str, **arrays: Any) -> None:
        """Write arrays that fit in memory; they appear whole, or not at all."""
        path = f"{self.folder}/{name}.npz"
        with open(f"{path}.part", "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)

    def load_small(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """What `save_small` wrote."""
        with np.load(f"{self.folder}/{name}.npz") as arrays:
            return {key: arrays[key] for key in arrays.files}

    def once(self, stage: str, work: Callable[[], None]) -> None:
        """A stage of one piece."""
        self.run(stage, 1, lambda piece: work())

    def run(self, stage: str, total: int, work: Callable[[int], None]) -> None:
        """Do those pieces of a stage that are not known to be done, some at the same time.

        Args:
            stage: its name, once for each state.
            total: number of pieces.
            work: called with each number of a piece; it writes to arrays of this state.
        """
        done, recorded = self._done.get(stage, 0), time.monotonic()
        if done >= total:
            return
        self._watch(stage, done, total)
        for finished in self._finish_in_order(range(done, total), work):
            self._release()
            self._watch(stage, finished + 1, total)
            if time.monotonic() - recorded > _EVERY_S:
                self._record(stage, finished + 1)
                recorded = time.monotonic()
        self._record(stage, total)

    def mark(self, stage: str) -> None:
        """Record that a stage is done which has no piece of its own: all before it is on disk."""
        self._record(stage, 1)

    def is_done(self, stage: str, total: int = 1) -> bool:
        """Whether all pieces of a stage are done."""
        return self._done.get(stage, 0) >= total

    def _finish_in_order(self, pieces: range, work: Callable[[int], None]) -> Iterator[int]:
        """Yield the number of each piece when it and all before it are done."""
        if self.workers == 1 or len(pieces) < 2:
            for piece in pieces:
                work(piece)
                yield piece
            return
        with ThreadPoolExecutor(self.workers) as threads:
            waiting: list[tuple[int, Future[None]]] = []
            try:
                for piece in pieces:
                    waiting.append((piece, threads.submit(work, piece)))
                    if len(waiting) > self.workers:
                        first, future = waiting.pop(0)
                        future.result()
                        yield first
                for first, future in waiting:
                    future.result()
                    yield first
            finally:
                for _, future in waiting:
                    future.cancel()

    def _record(self, stage: str, done: int) -> None:
        for array in self._arrays.values():
            array.flush()
        self._done[stage] = done
        self._journal.record(_RECORD, self._done)

    def _release(self) -> None:
        for array in self._arrays.values():
            release_pages(array)
