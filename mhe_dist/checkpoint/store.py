"""Checkpoints of named global tensors: written by all ranks in the background, read on any number.

    step_00000500/__0_0.distcp ...   tensors, by torch.distributed.checkpoint
                  .metadata          their names, shapes and places
                  run.json           what the caller wants to know at a resume
                  manifest.json      sizes and checksums; written last, makes it a checkpoint

A tensor lies on one rank as a whole, under a name that does not depend on the number of ranks.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mhe_dist.checkpoint import retention
from mhe_dist.checkpoint.files import FileEntry, Folder, Writer
from mhe_dist.checkpoint.reader import Checkpoint, first_failure
from mhe_dist.checkpoint.retention import Keep
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"step_(\d{8,})$")
READ_ONLY = Keep()  # of a store that nobody saves to
_WRITE_TIMEOUT_S = 3600.0  # a rank may wait this long for the slowest writer

# DCP warns that `no_dist` works without collectives, which is why it is given. Filtered for good:
# to change the filters in the background, for a while, would race with the main thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written; the run goes on and the last good one stands."""


@dataclass(frozen=True)
class Saved:
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

    def __init__(self, root: str, topology: Topology, keep: Keep = READ_ONLY) -> None:
        """All ranks must call.

        Args:
            root: folder or fsspec URL that holds the `step_*` folders.
            topology: this rank's place.
            keep: which complete checkpoints stay when a newer one is complete.
        """
        self.rejected: dict[str, str] = {}
        self._root = root.rstrip("/")
        self._topology = topology
        self._keep = keep
        self._group = topology.side_group(_WRITE_TIMEOUT_S)
        self._thread: threading.Thread | None = None
        self._outcome: Saved | None = None
        self._copies: dict[str, Tensor] = {}

    # -- saving --------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        replicated: dict[str, Tensor],
        owned: dict[str, Tensor],
        run: dict[str, Any],
    ) -> Saved | None:
        """Copy the tensors to host memory and write them while the caller goes on.

        All ranks must call. Waits for the save before, if that still runs.

        Args:
            step: number of completed steps; names the folder.
            replicated: tensors that all ranks hold alike; written once, spread over the ranks.
            owned: tensors that only this rank holds, under names that no other rank uses.
            run: plain data for `Checkpoint.run`; rank 0's counts.

        Returns:
            How the save before ended, if it was not asked for yet.
        """
        before = self.wait()
        begin = time.perf_counter()
        mine = share_by_size(replicated, self._topology.world_size)[self._topology.rank]
        given = {name: replicated[name] for name in mine} | owned
        self._copies = {n: _copied(tensor, self._copies.get(n)) for n, tensor in given.items()}
        self._thread = threading.Thread(
            target=self._write, args=(step, self._copies, run, begin), name=f"checkpoint-{step}"
        )
        self._thread.start()
        return before

    def wait(self) -> Saved | None:
        """Wait for the running save; tell, once, how the last one ended.

        A failed save also raises a `CheckpointWarning` on rank 0.
        """
        if self._thread is not None:
            self._thread.join()
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

    def poll(self) -> Saved | None:
        """Like `wait`, but at once: None while the save still runs."""
        if self._thread is not None and self._thread.is_alive():
            return None
        return self.wait()

    def _write(
        self, step: int, tensors: dict[str, Tensor], run: dict[str, Any], begin: float
    ) -> None:
        """In the background: write, and leave the outcome for `wait`."""
        path, size, error = self._path(step), 0, None
        try:
            if self._prepare(path):
                size = self._commit(path, self._write_tensors(path, tensors), run)
        # Whatever went wrong, training must go on; the caller gets the reason. (DCP's exception is
        # no Exception.)
        except (Exception, dcp.CheckpointException) as failure:
            error = first_failure(failure)
        self._outcome = Saved(step, path, size, time.perf_counter() - begin, error)

    def _prepare(self, path: str) -> bool:
        """Clear what a dead process left there; whether there is anything to write.

        A complete checkpoint of the step stays: it holds the same, and may be the only good one.
        """

        def clear() -> bool:
            """Whether the folder is free now."""
            folder = Folder(path)
            if self._is_complete(path):
                return False
            folder.remove()
            return True

        return self._on_first(clear)

    def _write_tensors(self, path: str, tensors: dict[str, Tensor]) -> dict[str, FileEntry]:
        """Write this rank's tensors; the files it wrote."""
        writer = Writer(path)
        alone = self._topology.world_size == 1
        dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
        return writer.entries

    def _commit(self, path: str, entries: dict[str, FileEntry], run: dict[str, Any]) -> int:
        """Make the folder a checkpoint and let old ones go; its size in bytes."""
        gathered = self._all_gather(entries)

        def finish() -> int:
            """Bytes of the finished checkpoint."""
            files = {name: entry for part in gathered for name, entry in part.items()}
            size = Folder(path).finish(files, run)
            self.rejected.pop(_name(path), None)
            try:
                self._forget_old()
            except (OSError, ValueError) as failure:  # this one is complete all the same
                logger.warning("old checkpoints in %s cannot be deleted: %s", self._root, failure)
            return size

        return self._on_first(finish)

    def _on_first(self, work: Callable[[], Any]) -> Any:
        """Do `work` on rank 0; its result on all ranks, or its failure on all ranks."""
        box: list[Any] = [None, None]
        if self._topology.is_first:
            try:
                box[0] = work()
            except Exception as failure:  # told to every rank below, which raises it
                box[1] = first_failure(failure)
        if self._topology.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise RunError(box[1])
        return box[0]

    def _forget_old(self) -> None:
        paths = {step: self._path(step) for step in self._steps()}
        history = {step: self._is_complete(path) for step, path in paths.items()}
        scores = {}
        for step in [s for s, complete in history.items() if complete and self._keep.best]:
            score = self._keep.score(Checkpoint(paths[step], step).run.get("scores", {}))
            if score is not None:
                scores[step] = score
        for step in retention.to_delete(history, self._keep, scores):
            Folder(paths[step]).remove()

    def _is_complete(self, path: str) -> bool:
        """Whether the last `newest` would have taken it for a checkpoint, by its files' sizes."""
        return _name(path) not in self.rejected and not isinstance(Folder(path).manifest(), str)

    # -- discovery -----------------------------------------------------------------------------

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint whose files are all as its manifest says.

        All ranks must call; each checks a share of the files. Reads the whole checkpoint.
        """
        self.wait()
        self.rejected = {}
        for step in self._agree(self._steps() if self._topology.is_first else None):
            path = self._path(step)
            reason = self._reason_against(path)
            if reason is None:
                return Checkpoint(path, step)
            self.rejected[_name(path)] = reason
        return None

    def go_back(self, step: int) -> bool:
        """Delete the checkpoints of more than `step` steps, if an older complete one stands.

        All ranks must call. Where there is no checkpoint at all nothing needs to be deleted.

        Returns:
            Whether the newest checkpoint, if there is one, is now of `step` steps at most.
        """

        def forget() -> bool:
            """Whether there was a way back."""
            steps = self._steps()
            good = [s for s in steps if s <= step and self._is_complete(self._path(s))]
            newer = [s for s in steps if s > step]
            if newer and not good:
                return False
            for late in newer:
                Folder(self._path(late)).remove()
            return True

        return self._on_first(forget)

    def _reason_against(self, path: str) -> str | None:
        folder = Folder(path)
        files = self._agree(folder.manifest() if self._topology.is_first else None)
        if isinstance(files, str):
            return files
        mine = sorted(files.items())[self._topology.rank :: self._topology.world_size]
        reasons = self._all_gather(folder.wrong(mine))
        return next((reason for reason in reasons if reason), None)

    def _agree(self, value: Any) -> Any:
        """Rank 0's value on all ranks."""
        box = [value]
        if self._topology.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values = [value] * self._topology.world_size
        if self._topology.world_size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _path(self, step: int) -> str:
        return f"{self._root}/step_{step:08d}"

    def _steps(self) -> list[int]:
        """Steps of all folders, complete or not, newest first."""
        fs, path = fsspec.core.url_to_fs(self._root)
        fs.invalidate_cache()
        if not fs.isdir(path):
            return []
        found = (_FOLDER.search(name.rstrip("/")) for name in fs.ls(path, detail=False))
        return sorted((int(match[1]) for match in found if match), reverse=True)


def _copied(tensor: Tensor, used: Tensor | None) -> Tensor:
    """A copy on the host, in the memory of the copy before where it fits: fresh pages cost more
    than what is written to them."""
    if used is None or used.shape != tensor.shape or used.dtype != tensor.dtype:
        used = torch.empty(tensor.shape, dtype=tensor.dtype)
    return used.copy_(tensor.detach())


def _name(path: str) -> str:
    return path.rsplit("/", 1)[1]


def share_by_size(tensors: dict[str, Tensor], ranks: int) -> list[list[str]]:
    """Names for each rank such that the bytes are balanced; the same on all ranks."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += tensors[name].nbytes
    return shares
