"""What a clustering has on disk until it is finished, and how it goes on where it was killed.

The work is a fixed list of stages, each a number of pieces. A piece is a pure function of the files
of earlier stages and writes its own part of a file; so a piece may be done twice, and what counts
is how many pieces of a stage are known to be on disk. The journal holds these numbers, and the
files that were there at that time: if one of them is gone, the work begins anew.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from mhe_dist.disk_room import reserve_room
from pipelines.clustering.rows import refuse_remote_target, release_pages
from pipelines.storage.staging import Journal, Staging
from pipelines.storage.urls import atomic_write

if TYPE_CHECKING:
    from typing_extensions import Self

_RECORD: Final = 0  # number of the only entry of the journal
_STATE: Final = "state"  # folder in the unfinished result; removed at the end
_FINISHED: Final = "finished"  # stage: everything that is made of these files is on disk
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
        self.folder, self.workers = folder, workers
        self._journal, self._watch = journal, watch
        self._arrays: dict[str, np.memmap[Any, Any]] = {}
        known = journal.get(_RECORD) or {}
        self._done: dict[str, int] = known.get("done", {})
        self._sizes: dict[str, int] = known.get("sizes", {})  # of files, in bytes
        if not all(self._size(name) == size for name, size in self._sizes.items()):
            self._done, self._sizes = {}, {}
        if not self._sizes:  # what may be there is of no stage that is known to be done
            shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(exist_ok=True)

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> np.memmap[Any, Any]:
        """A file of that shape, mapped; zeros where nothing was written yet.

        A file of another shape is replaced: its stage was not recorded when the process was killed.

        Raises:
            RunError: the disk is full.
        """
        if name not in self._arrays:
            path = f"{self.folder}/{name}"
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if self._size(name) != size:
                with open(path, "wb") as file:
                    reserve_room(file.fileno(), path, 0, size)
                    file.truncate(size)  # a file of its size has its room
            self._arrays[name] = np.memmap(path, dtype, "r+", shape=shape)
            self._sizes[name] = size
        return self._arrays[name]

    def remove(self, *names: str) -> None:
        """Delete files that no stage reads which is not known to be done."""
        for name in names:
            self._arrays.pop(name, None)
            self._sizes.pop(name, None)
        self._write()  # first: a file that is gone and recorded would be missed
        for name in names:
            Path(f"{self.folder}/{name}").unlink(missing_ok=True)

    def save_small(self, name: str, **arrays: Any) -> None:
        """Write arrays that fit in memory; they appear whole, or not at all."""
        path = f"{self.folder}/{name}.npz"
        with atomic_write(path) as file:
            np.savez(file, **arrays)
        self._sizes[f"{name}.npz"] = os.path.getsize(path)

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

    @property
    def is_finished(self) -> bool:
        """Whether everything that is made of these files is on disk: they are of no use."""
        return self.is_done(_FINISHED)

    def finish(self) -> None:
        """Record that everything that is made of these files is on disk, and delete them."""
        self._arrays.clear()
        self._sizes.clear()
        self.mark(_FINISHED)
        shutil.rmtree(self.folder, ignore_errors=True)

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
        self._write()

    def _write(self) -> None:
        self._journal.record(_RECORD, {"done": self._done, "sizes": self._sizes})

    def _size(self, name: str) -> int:
        """Bytes of a file; -1: it is not there."""
        path = f"{self.folder}/{name}"
        return os.path.getsize(path) if os.path.exists(path) else -1

    def _release(self) -> None:
        for array in self._arrays.values():
            release_pages(array)


class StagedJob:
    """One piece of such work, finished or not: a folder that appears when it is whole.

    A context manager: it holds a lock while it is open, and when it is left before the end, what is
    done stays for the next time.

    Attributes:
        target: the folder.
        folder: where its files are until then.
    """

    def __init__(self, target: str, made: str, recipe: dict[str, Any]) -> None:
        """Claim the target, or go on with it.

        Args:
            target: folder on this machine; it must not exist.
            made: what is made there, in words.
            recipe: JSON-able; tells this work from other work.

        Raises:
            UserError: the target exists or is not on this machine, or something else is being made
                there.
        """
        refuse_remote_target(target, made)
        self.target = target
        self._staging = Staging(target, recipe)
        self.folder = self._staging.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._staging.abort()

    def publish(self) -> None:
        """Remove what is not the result's, and give it its name."""
        self._open_state(_no_watch, 1).finish()
        self._staging.publish()

    def _open_state(self, watch: Watch, workers: int) -> ClusterState:
        assert self._staging.journal is not None, "it has a recipe"
        return ClusterState(f"{self.folder}/{_STATE}", self._staging.journal, watch, workers)


def _no_watch(stage: str, done: int, total: int) -> None:
    """Nobody is told."""
