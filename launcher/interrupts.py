"""Ctrl-C and its relatives: an exception while working, silence while cleaning up."""

from __future__ import annotations

import signal
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
def deferred() -> Iterator[Callable[[], None]]:
    """Take note of those signals inside the block, and raise `Interrupted` where it is safe.

    Native code that runs when a handler raises turns the exception into another one, or worse.

    Yields:
        a function that raises if a signal came; the end of the block calls it as well.
    """
    with noted() as signals:

        def check() -> None:
            """Raise if a signal came."""
            if signals:
                raise Interrupted(signals[0])

        yield check
    check()


@contextmanager
def noted() -> Iterator[list[int]]:
    """Take note of those signals inside the block, and do nothing else.

    Yields:
        the numbers of the signals that came so far.
    """
    signals: list[int] = []
    with _handling(lambda signum, frame: signals.append(signum)):
        yield signals


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
