"""The run's folder belongs to one process group at a time: rank 0 takes its lock for all."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mhe_dist.distributed.failures import decided_by_first
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import StorageUnavailable, UserError
from mhe_dist.storage_errors import is_permanent
from mhe_dist.storage_retry import with_retries
from pipelines.pretrain import preemption
from pipelines.pretrain.recorder import EventHandler
from pipelines.runs.folder import absolute_path
from pipelines.runs.lease import Lease
from pipelines.runs.lock import LOCK_FILE, FileLock, Holder
from pipelines.storage.unusable_path import describe_unusable_path
from pipelines.storage.urls import is_local_url

logger = logging.getLogger(__name__)

_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock(Protocol):
    """`FileLock` or `Lease`."""

    def check(self) -> None:
        """Raise `RunError` if the lock is another's now."""

    def release(self) -> None:
        """Give it back."""


class _Nothing:
    """What ranks other than the first hold."""

    def check(self) -> None:
        """Nothing."""

    def release(self) -> None:
        """Nothing."""


@contextmanager
def run_locked(
    path: str, topology: Topology, command: str, on_event: EventHandler
) -> Iterator[RunLock]:
    """Hold the lock of a run's folder for the length of a `with` block; all ranks must enter.

    Args:
        path: of the run, any fsspec URL.
        topology: the ranks.
        command: see `Holder`; empty: one of its own.
        on_event: called on rank 0 if the lock of a process that was killed was taken over.

    Raises:
        UserError: another process has it, or the folder cannot be written; on all ranks.
        StorageUnavailable: the disk or the store gives no answer; on all ranks.
        Preempted: this process was told to stop while it waited for it; on all ranks.
    """
    lock: RunLock = _Nothing()

    def acquire() -> None:
        nonlocal lock
        lock = _acquire(path, Holder(command) if command else Holder(), on_event)

    decided_by_first(acquire, topology)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(path: str, holder: Holder, on_event: EventHandler) -> RunLock:
    try:
        lock, before = _open(path, holder)
    except OSError as error:
        wrong = is_permanent(error) or describe_unusable_path(error)
        kind = UserError if wrong else StorageUnavailable
        raise kind(f"{path}/{LOCK_FILE} cannot be written: {error}") from error
    if before is None:
        return lock
    logger.warning("%s: took over the lock of %s, which ended without giving it back", path, before)
    if before.command != holder.command:
        on_event({"event": "lock_taken_over", "run": path, "holder": str(before)})
    return lock


def _open(path: str, holder: Holder) -> tuple[RunLock, Holder | None]:
    if is_local_url(path):
        file_lock = FileLock(absolute_path(path), holder)
        try:
            return file_lock, with_retries(lambda: file_lock.acquire(preemption.requested), path)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            logger.warning("%s: no locks on this file system (%s), a lease instead", path, error)
    lease = Lease(path, holder)
    return lease, lease.acquire(preemption.requested)
