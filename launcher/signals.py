"""Ctrl-C and its relatives: an exception while working, silence while cleaning up.

Python runs signal handlers on the main thread and lets no other thread set one. Off the main thread
(an executor in somebody's notebook) each block here leaves the handlers as they are.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mhe_dist.errors import Preempted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILLED_WITHIN_S = 5.0
_SENT_AGAIN_S = 0.05
REPEAT_S = 3.0
"""`timeout` and others tell a process and then its group: that is one request, not impatience."""


class Interrupted(KeyboardInterrupt):
    """Somebody asked the command to stop.

    No `Exception`: what a store, a decoder or a library does about errors of any kind, such as to
    try again or to leave an image out, it must not do about this.

    Attributes:
        signum: number of the signal.
        unsaved: whether a run that was saving itself was not waited for.
        exit_code: 130 for Ctrl-C, 128 plus the signal's number in general.
    """

    def __init__(self, signum: int, unsaved: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.unsaved = signum, unsaved
        self.exit_code = 128 + signum

    @property
    def run_exit_code(self) -> int:
        """That of a command that trains: 75 where SIGTERM came and nothing was lost."""
        in_order = self.signum == signal.SIGTERM and not self.unsaved
        return Preempted.exit_code if in_order else self.exit_code


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the main thread on SIGINT, SIGTERM and SIGHUP inside the block.

    The same signal once more within `REPEAT_S` does nothing: what the first one began goes on. One
    that comes during a finalizer or a callback of the garbage collector, where Python keeps every
    exception to itself, is sent again.
    """
    last: dict[int, float] = dict.fromkeys(SIGNALS, -REPEAT_S)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        before, last[signum] = last[signum], time.monotonic()
        if last[signum] - before >= REPEAT_S:
            raise Interrupted(signum)

    def _send_again(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Interrupted):
            hook(lost)
            return
        last[lost.exc_value.signum] = -REPEAT_S
        to = (threading.main_thread().ident, lost.exc_value.signum)
        threading.Timer(_SENT_AGAIN_S, signal.pthread_kill, to).start()  # not in the finalizer

    with signals_handled_by(interrupt):
        hook, sys.unraisablehook = sys.unraisablehook, _send_again
        try:
            yield
        finally:
            sys.unraisablehook = hook


@contextmanager
def signals_deferred(
    on_first: Callable[[], None] | None = None, grace_s: float = 0.0
) -> Iterator[Callable[[], None]]:
    """Record those signals inside the block, and raise `Interrupted` where it is safe.

    Native code that runs when a handler raises turns the exception into another one, or worse.

    Args:
        on_first: called for a first SIGTERM instead of raising; the exception then comes after
            `grace_s` seconds or with the next signal, if that is not the same within `REPEAT_S`.
        grace_s: how long what `on_first` began may take.

    Yields:
        a function that raises if a signal came; the end of the block calls it as well.
    """
    received: list[tuple[int, float]] = []
    deadline: list[float] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not any(number == signum and now - when < REPEAT_S for number, when in received):
            received.append((signum, now))

    def check() -> None:
        """Raise if a signal came."""
        if received and received[0][0] == signal.SIGTERM and on_first and not deadline:
            deadline.append(time.monotonic() + grace_s)
            on_first()
        in_grace = len(received) == 1 and deadline and time.monotonic() < deadline[0]
        if received and not in_grace:
            signum, _ = received[-1] if deadline else received[0]
            raise Interrupted(signum, unsaved=bool(deadline))

    with signals_handled_by(receive):
        yield check
    check()


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore those signals inside the block, which cleans up and must come to its end."""
    with signals_handled_by(signal.SIG_IGN):
        yield


@contextmanager
def signals_handled_by(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
) -> Iterator[None]:
    """Set a handler for all of `SIGNALS` inside the block; off the main thread, none.

    It takes the place of an ignored SIGINT, which is how a shell starts background jobs. A SIGHUP
    that is ignored stays so: `nohup` asks for that, so that a command outlives its terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    handled = [number for number in SIGNALS if not (is_nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, old in before.items():
            # None: set by native code. Python cannot put that back.
            signal.signal(number, signal.SIG_DFL if old is None else old)


def kill_with_descendants(pids: Iterable[int]) -> None:
    """Kill children of this process with their descendants, and wait for the children's end.

    The descendants are others' to wait for: some containers' first process does so once a second.
    """
    import psutil

    children: list[psutil.Process] = []
    descendants: list[psutil.Process] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            children.append(psutil.Process(pid))
            descendants += children[-1].children(recursive=True)
    for process in [*children, *descendants]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(children, timeout=KILLED_WITHIN_S)
