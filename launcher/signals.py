"""Ctrl-C and its relatives: an exception while working, silence while cleaning up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Somebody asked the command to stop.

    Attributes:
        exit_code: 130 for Ctrl-C, 128 plus the signal's number in general.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the main thread on SIGINT, SIGTERM and SIGHUP inside the block.

    Explicit, because a shell starts background jobs with SIGINT ignored.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handling(stop):
        yield


@contextmanager
def deferred(
    gently: Callable[[], None] | None = None, grace_s: float = 0.0
) -> Iterator[Callable[[], None]]:
    """Take note of those signals inside the block, and raise `Interrupted` where it is safe.

    Native code that runs when a handler raises turns the exception into another one, or worse.

    Args:
        gently: what a first SIGTERM leads to, in place of the exception, which then comes after
            `grace_s` seconds or with the next signal.
        grace_s: how long what `gently` began may take.

    Yields:
        a function that raises if a signal came; the end of the block calls it as well.
    """
    noted: list[int] = []
    deadline: list[float] = []

    def check() -> None:
        """Raise if a signal came."""
        if noted and noted[0] == signal.SIGTERM and gently and not deadline:
            deadline.append(time.monotonic() + grace_s)
            gently()
        patient = len(noted) == 1 and deadline and time.monotonic() < deadline[0]
        if noted and not patient:
            raise Interrupted(noted[-1] if deadline else noted[0])

    with _handling(lambda signum, frame: noted.append(signum)):
        yield check
    check()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore those signals inside the block: what tidies up must come to its end."""
    with _handling(signal.SIG_IGN):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
