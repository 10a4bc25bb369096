"""The request to stop: this process may be ended soon, so its run saves itself and leaves in order.

A signal (preemption, `torchrun` that ends) and whoever started the run ask the same way. The run
notices at its next step, on whichever rank, and tells all ranks with what they exchange anyway. A
request is for one run: the one that goes on now, or else the next one in this process.
"""

from __future__ import annotations

import signal
import threading

_requested = threading.Event()


def listen_for_sigterm() -> None:
    """Take SIGTERM for the request to stop; from the main thread only."""
    signal.signal(signal.SIGTERM, lambda number, frame: request())


def request() -> None:
    """Ask the run of this process to stop."""
    _requested.set()


def requested() -> bool:
    """Whether somebody asked the run of this process to stop."""
    return _requested.is_set()


def clear() -> None:
    """Forget the request, when the run that it was for has ended."""
    _requested.clear()
