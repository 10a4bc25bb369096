"""A lock where the kernel has none: an object that its holder writes anew every few seconds.

Who finds one watches it by its own clock, and takes it over when it stays the same for long enough.
No clock is compared with one of another host.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from mhe_dist.errors import Preempted, RunError
from mhe_dist.storage_retry import until_answered
from pipelines.runs.lock import LOCK_FILE, POLL_S, Holder, refusal
from pipelines.storage.urls import atomic_write, is_local, resolve_url

logger = logging.getLogger(__name__)

BEAT_S, STALE_S = 5.0, 30.0
"""Seconds between two beats, and without one until somebody else takes the lease."""

SETTLE_S = 1.0
"""Of two that take a free lease at once, both see after this time whose object stands."""


class Lease:
    """`run.lock` in a store: who holds the run, and a number that grows while it does."""

    def __init__(self, path: str, holder: Holder) -> None:
        """Args:
        path: of the run, any fsspec URL.
        holder: what the lease is to tell.
        """
        self._path, self._holder = path, holder
        self._url = f"{path}/{LOCK_FILE}"
        self._filesystem, self._object = resolve_url(self._url)
        self._beat = 0
        self._ended = threading.Event()
        self._lost = ""
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self, stop: Callable[[], bool]) -> Holder | None:
        """Take the lease, and keep it in the background.

        Args:
            stop: whether to give up waiting.

        Returns:
            Who held it and let it go stale, as a killed process does; None: nobody.

        Raises:
            UserError: another process holds it.
            StorageUnavailable: the store gives no answer.
            Preempted: `stop` said so.
        """
        before = self._wait_until_stale(stop)
        until_answered(self._write, self._url)
        time.sleep(SETTLE_S)
        line = until_answered(self._read, self._url)
        if not self._is_ours(line):
            raise refusal(self._path, Holder.from_line(line))
        self._thread.start()
        return before

    def check(self) -> None:
        """Raise if somebody else has the lease now: the folder is no longer this process's.

        Raises:
            RunError: says who has it.
        """
        if self._lost:
            raise RunError(self._lost)

    def release(self) -> None:
        """Give the lease back."""
        self._ended.set()
        self._thread.join()
        try:
            if self._is_ours(self._read()):
                self._filesystem.rm_file(self._object)
        except Exception as error:  # stores raise what they like; the lease goes stale by itself
            logger.warning("%s cannot be removed: %s", self._url, error)

    def _wait_until_stale(self, stop: Callable[[], bool]) -> Holder | None:
        """Watch the lease that is there until it is gone, or has been the same for long enough."""
        first = until_answered(self._read, self._url)
        holder = Holder.from_line(first)
        deadline = time.monotonic() + STALE_S
        while first and time.monotonic() < deadline:
            if holder is not None and holder.command == self._holder.command:
                return holder  # a worker of this command, which Ray has ended or lost
            if stop():
                raise Preempted(f"told to stop while it waited for {self._url}")
            time.sleep(POLL_S)
            line = until_answered(self._read, self._url)
            if not line:
                return None
            if line != first:
                raise refusal(self._path, Holder.from_line(line))
        return holder

    def _keep(self) -> None:
        """Write the object anew until the end, or until it is another's."""
        while not self._ended.wait(BEAT_S):
            try:
                line = self._read()
                if not self._is_ours(line):
                    self._lost = (
                        f"{self._path}: {Holder.from_line(line) or 'somebody'} has taken the run "
                        f"over, because this process did not renew {LOCK_FILE} for "
                        f"{STALE_S:.0f} s; it stops without a save"
                    )
                    return
                self._write()
            except Exception as error:  # stores raise what they like; the next beat may succeed
                logger.warning("%s cannot be renewed: %s", self._url, error)

    def _is_ours(self, line: bytes) -> bool:
        return Holder.from_line(line) == self._holder

    def _read(self) -> bytes:
        """The object; empty where there is none."""
        try:
            return bytes(self._filesystem.cat_file(self._object))
        except FileNotFoundError:
            return b""

    def _write(self) -> None:
        self._beat += 1
        line = self._holder.to_line(beat=self._beat)
        if is_local(self._filesystem):  # a store shows whole objects by itself
            with atomic_write(self._object) as file:
                file.write(line)
        else:
            self._filesystem.pipe_file(self._object, line)
