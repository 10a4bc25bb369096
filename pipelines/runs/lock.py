"""One run, one folder, one process group at a time: the lock of a run's folder.

On a file system it is a lock of the kernel (flock), which ends with its process, whatever ends
that. Where there is none, in an object store above all, it is a lease (`pipelines.runs.lease`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from mhe_dist.errors import Preempted, UserError
from pipelines.runs.folder import absolute_path
from pipelines.storage.urls import is_local_url

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
WAIT_S = 15.0
"""For the processes of a run that has just been killed, which take a moment to end."""

POLL_S = 0.2
_LINE_BYTES = 4096


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Holder:
    """Who trains a run, as its lock tells.

    Attributes:
        command: names the command that started it. A group of workers that Ray starts again has
            the same one; it need not wait for workers on a node that is lost.
        host, pid: of rank 0.
        since: when it took the lock, by its clock: ISO 8601, UTC.
    """

    command: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=_now)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def to_line(self, **more: int | str) -> bytes:
        """The content of a lock: one line of JSON, with `more` of a lease."""
        return (json.dumps(asdict(self) | more) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Holder | None:
        """The holder that a lock tells of; None: it tells nothing, as while it is written."""
        try:
            values = json.loads(line)
            return cls(*(values[name] for name in ("command", "host", "pid", "since")))
        except (ValueError, KeyError, TypeError):
            return None


def refusal(path: str, holder: Holder | None) -> UserError:
    """What somebody is told who starts a run that is being trained.

    Args:
        path: of the run.
        holder: who trains it; None: that is not known.
    """
    return UserError(
        f"{path} is being trained by {holder or 'another process'} ({LOCK_FILE} in it). Two runs "
        "cannot write into one folder: wait for that one, stop it (SIGTERM lets it save), or start "
        "another run: run.name=..."
    )


def refuse_locked(path: str, waiting: Callable[[str], None]) -> None:
    """Refuse a run that a process trains, before anything is started for it.

    Its workers take the lock; in a store, where a look takes long, only they find out.

    Args:
        path: of the run, any fsspec URL.
        waiting: called with what is waited for, if something is.

    Raises:
        UserError: see `refusal`.
    """
    file = Path(absolute_path(path)) / LOCK_FILE
    deadline = time.monotonic() + WAIT_S
    announced = False
    while is_locked(path):
        if time.monotonic() > deadline:
            raise refusal(path, _read_holder(file))
        if not announced:
            waiting(f"waiting for {_read_holder(file) or 'another process'} to leave {path}")
        announced = True
        time.sleep(POLL_S)


@contextmanager
def kept_from_training(path: str, instead: str) -> Iterator[None]:
    """Hold the lock of a run for what nobody may do to it while a process trains it.

    Args:
        path: of the run, any fsspec URL; in a store, and where there are no locks, none is held.
        instead: what happens or helps instead; ends the message.

    Raises:
        UserError: it is locked, as far as that can be known; see `is_locked`.
    """
    if is_locked(path):
        holder = _read_holder(Path(absolute_path(path)) / LOCK_FILE)
        raise UserError(
            f"{path} is being trained by {holder or 'another process'} ({LOCK_FILE} in it): "
            f"{instead}"
        )
    with ExitStack() as stack:
        if is_local_url(path):
            lock = FileLock(absolute_path(path), Holder())
            with suppress(OSError):
                lock.acquire(lambda: False)
                stack.callback(lock.release)
        yield


def is_locked(path: str) -> bool:
    """Whether a process trains the run at a path; not known, so False, of one in a store."""
    if not is_local_url(path):
        return False
    file = Path(absolute_path(path)) / LOCK_FILE
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such locks here: a lease, which the workers watch
        return False
    finally:
        os.close(descriptor)
    return False


def _read_holder(file: Path) -> Holder | None:
    try:
        return Holder.from_line(file.read_bytes())
    except FileNotFoundError:
        return None


class FileLock:
    """A lock of the kernel on `run.lock`; forked children do not keep it."""

    def __init__(self, path: str, holder: Holder) -> None:
        """Args:
        path: of the run, local.
        holder: what the lock is to tell.
        """
        self._path, self._holder = path, holder
        self._file = f"{path}/{LOCK_FILE}"
        self._descriptor = -1

    def acquire(self, stop: Callable[[], bool]) -> Holder | None:
        """Take the lock; another holder has `WAIT_S` to end.

        Args:
            stop: whether to give up waiting.

        Returns:
            Who held it and ended without giving it back, as a killed process does; None: nobody.

        Raises:
            UserError: another process holds it.
            Preempted: `stop` said so.
            OSError: the file system has no such locks, or cannot be written.
        """
        Path(self._path).mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + WAIT_S
        while not self._try_lock():
            if stop():
                raise Preempted(f"told to stop while it waited for {self._file}")
            if time.monotonic() > deadline:
                self._replace()
            time.sleep(POLL_S)
        before = Holder.from_line(os.pread(self._descriptor, _LINE_BYTES, 0))
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, self._holder.to_line(), 0)
        return before

    def check(self) -> None:
        """Nothing: the kernel gives this lock to nobody else."""

    def release(self) -> None:
        """Give the lock back; its file goes with it, unless the disk fails now."""
        try:
            if self._is_in_place():
                os.unlink(self._file)
        except OSError as error:  # the next run takes it over
            logger.warning("%s cannot be removed: %s", self._file, error)
        self._close()

    def _try_lock(self) -> bool:
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held.add(self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_in_place():  # else its holder has removed it meanwhile
                return True
        except BlockingIOError:
            pass
        except OSError:
            self._close()
            raise
        self._close()
        return False

    def _replace(self) -> None:
        """Put the file aside that this command's own lost worker holds; refuse another's.

        The file system of a lost node may be told late or never. A file of the same name that is
        made anew is locked at once.
        """
        other = _read_holder(Path(self._file))
        if other is None or other.command != self._holder.command:
            raise refusal(self._path, other)
        os.unlink(self._file)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._file))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        _held.discard(self._descriptor)
        os.close(self._descriptor)


_held: set[int] = set()
"""Descriptors of this process's locks."""


def _close_in_child() -> None:
    """A child that outlives its parent must not keep the lock; to unlock would unlock both."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
