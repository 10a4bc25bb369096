"""Told to stop: this process may be ended soon, so the run saves itself and leaves in order.

A signal (preemption, `torchrun` that ends) and whoever started the run say the same thing. It is
heard at the next step, on whichever rank, and told to all with what ranks exchange anyway.
"""

from __future__ import annotations

import signal
import threading

_told = threading.Event()


def listen() -> None:
    """Take SIGTERM for the request to stop; from the main thread only."""
    signal.signal(signal.SIGTERM, lambda number, frame: _told.set())


def stop() -> None:
    """Ask this process to stop."""
    _told.set()


def told() -> bool:
    """Whether somebody asked this process to stop."""
    return _told.is_set()
