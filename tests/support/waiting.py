"""How long tests wait, on a machine that others use too."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

import pytest

WATCHDOG_S = 800.0  # ends what hangs, before pytest's own does; claims nothing of how long it takes


class Clock:
    """Stands in for the module `time`: a sleep takes no time and moves this clock on.

    Attributes:
        now: seconds.
    """

    now = 0.0

    def monotonic(self) -> float:
        """Seconds, as `time.monotonic` gives them."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Move on."""
        self.now += seconds


def stretched(seconds: float) -> float:
    """What takes so long on a quiet machine may take this long now: longer as it is busy."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def processor_s() -> float:
    """Seconds of processors that processes of this one have taken which have ended."""
    taken = os.times()
    return taken.children_user + taken.children_system


def wait_for(condition: Callable[[], object], every_s: float = 0.02) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + WATCHDOG_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(every_s)


def ended(process: subprocess.Popen[str]) -> str:
    """What is left to read of a process that ends by itself."""
    try:
        return process.communicate(timeout=WATCHDOG_S)[0]
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"it does not end:\n{(late.output or b'').decode()}")
