"""Checkpoints of named global tensors: written by all ranks in the background, read on any number.

    step_00000500/__0_0.distcp ...   tensors, by torch.distributed.checkpoint
                  .metadata          their names, shapes and places
                  run.json           what the caller wants to know at a resume
                  manifest.json      sizes and checksums; written last, makes it a checkpoint
                  scores.json        figures of an evaluation that ended after that, if any

A tensor lies on one rank as a whole, under a name that does not depend on the number of ranks.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from mhe_dist.checkpoint.entry import Entry
from mhe_dist.checkpoint.files import CheckpointFolder, ChecksumWriter, FileEntry
from mhe_dist.checkpoint.reader import Checkpoint, first_failure
from mhe_dist.checkpoint.retention import RetentionPolicy, steps_to_delete
from mhe_dist.checkpoint.step_folder import folder_of_step, list_steps
from mhe_dist.distributed.failures import decided_by_first, failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import StorageUnavailable

T = TypeVar("T")
logger = logging.getLogger(__name__)

READ_ONLY = RetentionPolicy()  # of a store that only reads
_WRITE_TIMEOUT_S = 3600.0  # a rank may wait this long for the slowest writer

# DCP warns that `no_dist` works without collectives, which is why it is given. Filtered for good:
# to change the filters in the background, for a while, would race with the main thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written; the run goes on and the last good one stands."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended.

    Attributes:
        step: its step.
        path: URL of its folder.
        bytes: size of all files; 0 where nothing was written.
        seconds: from the call of `save` to the manifest.
        error: why there is no such checkpoint; None: it is complete.
    """

    step: int
    path: str
    bytes: int
    seconds: float
    error: str | None = None


class CheckpointStore:
    """The checkpoints of a run, in one folder or under one URL.

    Attributes:
        rejected: folder name -> why the last `newest` did not take it for a checkpoint; on rank 0
            until it is written anew.
    """

    def __init__(self, root: str, topology: Topology, policy: RetentionPolicy = READ_ONLY) -> None:
        """All ranks must call.

        Args:
            root: folder or fsspec URL that holds the `step_*` folders.
            topology: this rank's position.
            policy: which complete checkpoints stay when a newer one is complete.
        """
        self.rejected: dict[str, str] = {}
        self._root = root.rstrip("/")
        self._topology = topology
        self._policy = policy
        self._group = topology.side_group(_WRITE_TIMEOUT_S)
        self._thread: threading.Thread | None = None
        self._outcome: SaveResult | None = None
        self._copies: dict[str, Tensor] = {}

    # -- saving --------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        replicated: Mapping[str, Entry],
        owned: Mapping[str, Entry],
        run: dict[str, Any],
    ) -> SaveResult | None:
        """Copy the tensors to host memory and write them while the caller goes on.

        All ranks must call. Waits for the save before, if it still runs. The memory of one copy is
        all that is needed; it is kept for the next save.

        Args:
            step: number of completed steps; names the folder.
            replicated: tensors that are equal on all ranks, in the same order; written once, spread
                over the ranks.
            owned: tensors that only this rank holds, under names that no other rank uses.
            run: plain data for `Checkpoint.run`; rank 0's counts.

        Returns:
            How the save before ended, if `wait` or `poll` did not return that yet.
        """
        before = self.wait()
        begin = time.perf_counter()
        shares = share_by_size(replicated, self._topology.world_size)
        self._copy(replicated, set(shares[self._topology.rank]), owned)
        # A daemon, for a rank that has failed must be able to end: others may never come to a save.
        given = (step, self._copies, run, begin)
        self._thread = threading.Thread(
            target=self._write, args=given, name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()
        return before

    def _copy(
        self, replicated: Mapping[str, Entry], mine: set[str], owned: Mapping[str, Entry]
    ) -> None:
        """Fill the buffers of this rank's tensors; those of the save before serve again."""
        given = {name: replicated[name] for name in mine} | dict(owned)
        old = {n: kept for n, kept in self._copies.items() if n in given and _fits(kept, given[n])}
        self._copies = {}  # frees those that do not fit before others are made
        # All of them before anything is gathered: the memory of that lies in one piece, then, and
        # goes back to the system.
        self._copies = {
            name: old[name] if name in old else torch.empty(entry.shape, dtype=entry.dtype)
            for name, entry in given.items()
        }
        for name, entry in (*replicated.items(), *owned.items()):
            buffer = self._copies.get(name)
            if not isinstance(entry, Tensor):
                entry.copy_to(buffer)  # the ranks may make it together
            elif buffer is not None:
                buffer.copy_(entry.detach())

    def wait(self, timeout_s: float | None = None) -> SaveResult | None:
        """Wait for the running save; return, once, how the last one ended.

        A failed save also raises a `CheckpointWarning` on rank 0.

        Args:
            timeout_s: seconds after which a save that still runs is left: None is returned.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return None
            self._thread = None
        outcome, self._outcome = self._outcome, None
        if outcome is not None and outcome.error is not None and self._topology.is_first:
            warnings.warn(
                f"checkpoint of step {outcome.step} was not written to {outcome.path}: "
                f"{outcome.error}; training goes on, the last good checkpoint stands",
                CheckpointWarning,
                stacklevel=2,
            )
        return outcome

    def poll(self) -> SaveResult | None:
        """Like `wait`, without waiting: None while the save still runs."""
        if self._thread is not None and self._thread.is_alive():
            return None
        return self.wait()

    def _write(
        self, step: int, tensors: dict[str, Tensor], run: dict[str, Any], begin: float
    ) -> None:
        """In the background: write, and leave the outcome for `wait`."""
        path, size, error = self._path(step), 0, None
        try:
            if self._clear_folder(path):
                size = self._commit(path, self._write_tensors(path, tensors), run)
        # Whatever went wrong, training must go on; the caller gets the reason. (DCP's exception is
        # no Exception.)
        except (Exception, dcp.CheckpointException) as failure:
            error = first_failure(failure)
        self._outcome = SaveResult(step, path, size, time.perf_counter() - begin, error)

    def _clear_folder(self, path: str) -> bool:
        """Remove what a dead process left there; whether there is anything to write.

        A complete checkpoint of the step stays: it holds the same, and may be the only good one.
        """

        def remove_incomplete() -> bool:
            """Whether the folder is free now."""
            folder = CheckpointFolder(path)
            if self._is_complete(path):
                return False
            folder.remove()
            return True

        return self._on_first(remove_incomplete)

    def _write_tensors(self, path: str, tensors: dict[str, Tensor]) -> dict[str, FileEntry]:
        """Write this rank's tensors; the files it wrote."""
        writer = ChecksumWriter(path)
        alone = self._topology.world_size == 1
        dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
        return writer.entries

    def _commit(self, path: str, entries: dict[str, FileEntry], run: dict[str, Any]) -> int:
        """Make the folder a checkpoint and delete old ones; its size in bytes."""
        gathered = self._all_gather(entries)

        def write_manifest() -> int:
            """Bytes of the finished checkpoint."""
            files = {name: entry for part in gathered for name, entry in part.items()}
            size = CheckpointFolder(path).write_manifest(files, run)
            self.rejected.pop(_name(path), None)
            try:
                self._delete_old()
            except Exception as failure:  # this one is complete all the same
                logger.warning("old checkpoints in %s cannot be deleted: %s", self._root, failure)
            return size

        return self._on_first(write_manifest)

    def _on_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, or its failure, on all ranks."""
        return decided_by_first(work, self._topology, self._group)

    def add_scores(self, step: int, scores: dict[str, float]) -> None:
        """Keep figures of a complete checkpoint's model that were not known when it was saved.

        All ranks may call; rank 0 writes. Nothing happens where there is no such checkpoint. A
        store that cannot be written is a warning in the log.
        """
        if not self._topology.is_first:
            return
        path = self._path(step)
        try:
            if self._is_complete(path):
                CheckpointFolder(path).write_scores(scores)
        except Exception as failure:  # stores raise what they like: gcsfs no OSError
            logger.warning("the scores of step %d cannot be stored: %s", step, failure)

    def _delete_old(self) -> None:
        history: dict[int, bool] = {}
        scores: dict[int, float] = {}
        for step in self._steps():
            path = self._path(step)
            try:
                complete = self._is_complete(path)
                is_ranked = complete and self._policy.best
                known = Checkpoint(path, step).read_scores() if is_ranked else {}
            except Exception as failure:  # of a store, whatever it likes
                logger.warning("%s stays, since it cannot be read now: %s", path, failure)
                continue
            history[step] = complete
            if (score := self._policy.score(known)) is not None:
                scores[step] = score
        for step in steps_to_delete(history, self._policy, scores):
            CheckpointFolder(self._path(step)).remove()

    def _is_complete(self, path: str) -> bool:
        """Whether the last `newest` would have taken it for a checkpoint, by its files' sizes.

        Raises:
            StorageUnavailable: that cannot be told now; nothing may be deleted for it.
        """
        if _name(path) in self.rejected:
            return False
        return not isinstance(CheckpointFolder(path).manifest(), str)

    def _has_complete(self, steps: Iterable[int]) -> bool:
        """Whether one of some checkpoints is complete.

        Raises:
            StorageUnavailable: of none that is known, and of some it cannot be told now.
        """
        unknown: StorageUnavailable | None = None
        for step in steps:
            try:
                if self._is_complete(self._path(step)):
                    return True
            except StorageUnavailable as error:
                unknown = error
        if unknown is not None:
            raise unknown
        return False

    # -- discovery -----------------------------------------------------------------------------

    def newest(self, select: Callable[[str], bool] | None = None) -> Checkpoint | None:
        """The newest complete checkpoint whose files are all as its manifest says.

        All ranks must call; each checks a share of the files. Reads the whole checkpoint, or, for
        whoever reads no other tensors, those of the names that `select` accepts: of the files that
        hold tensors, the sizes are compared then.

        Raises:
            StorageUnavailable: the folder or one of its files cannot be read now, on all ranks. It
                is not passed over: an older checkpoint, or none, would lose what this one holds.
        """
        self.wait()
        self.rejected = {}
        for step in self._on_first(self._steps):
            path = self._path(step)
            reason = self._find_fault(Checkpoint(path, step), select)
            if reason is None:
                return Checkpoint(path, step)
            self.rejected[_name(path)] = reason
        return None

    def roll_back_to(self, step: int) -> bool:
        """Delete the checkpoints of more than `step` steps, if an older complete one stands.

        All ranks must call. Where there is no checkpoint at all nothing needs to be deleted.

        Returns:
            Whether the newest checkpoint, if there is one, is now of `step` steps at most.

        Raises:
            StorageUnavailable: nobody knows now whether there is an older one; none is deleted.
        """

        def delete_newer() -> bool:
            """Whether an older checkpoint stands, or none at all."""
            steps = self._steps()
            newer = [s for s in steps if s > step]
            if newer and not self._has_complete(s for s in steps if s <= step):
                return False
            for number in newer:
                CheckpointFolder(self._path(number)).remove()
            return True

        return self._on_first(delete_newer)

    def _find_fault(
        self, checkpoint: Checkpoint, select: Callable[[str], bool] | None
    ) -> str | None:
        """Why a folder is no checkpoint, or is damaged where `newest` reads it; None: it is not."""
        folder = CheckpointFolder(checkpoint.path)
        files = self._on_first(folder.manifest)
        if isinstance(files, str):
            return files
        with failing_together(self._topology, self._group):
            if select is None:
                found = folder.first_corrupt_file(self._mine(files.items()))
            else:
                small = [item for item in files.items() if not item[0].endswith(DEFAULT_SUFFIX)]
                found = folder.first_corrupt_file(small) or checkpoint.first_damaged_tensor(
                    self._mine(filter(select, checkpoint.names()))
                )
        return next((reason for reason in self._all_gather(found) if reason), None)

    def _mine(self, items: Iterable[Any]) -> list[Any]:
        """This rank's share of distinct items."""
        return sorted(items)[self._topology.rank :: self._topology.world_size]

    def _all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values = [value] * self._topology.world_size
        if self._topology.world_size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _path(self, step: int) -> str:
        return f"{self._root}/{folder_of_step(step)}"

    def _steps(self) -> list[int]:
        return list_steps(self._root)


def _fits(buffer: Tensor, entry: Entry) -> bool:
    """Whether the memory of a copy can serve again: fresh pages cost more than what is written."""
    return buffer.shape == entry.shape and buffer.dtype == entry.dtype


def _name(path: str) -> str:
    return path.rsplit("/", 1)[1]


def share_by_size(tensors: Mapping[str, Entry], ranks: int) -> list[list[str]]:
    """Names for each rank such that the bytes are balanced; the same on all ranks."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += tensors[name].nbytes
    return shares
