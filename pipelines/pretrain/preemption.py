"""The request to stop: this process may be ended soon, so its run saves itself and leaves in order.

A signal (preemption, `torchrun` that ends) and whoever started the run ask the same way. The run
notices at its next step, on whichever rank, and tells all ranks with what they exchange anyway;
between two batches of an evaluation and before the first step it asks them. A request is for one
run: the one that goes on now, or else the next one in this process.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhe_dist.distributed.topology import Topology

_requested = threading.Event()


def listen_for_sigterm() -> None:
    """Take SIGTERM for the request to stop, also one that was held back; on the main thread."""
    signal.signal(signal.SIGTERM, lambda number, frame: request())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def request() -> None:
    """Ask the run of this process to stop."""
    _requested.set()


def requested() -> bool:
    """Whether somebody asked the run of this process to stop."""
    return _requested.is_set()


def requested_of_any(topology: Topology) -> bool:
    """Whether somebody asked any rank; the same on all ranks, and all must call."""
    # Not at the top: a process listens for signals before it takes the time to import torch.
    import torch

    from mhe_dist.distributed.collectives import all_reduce

    return bool(all_reduce(torch.tensor([float(requested())]), topology, "max").item())


def clear() -> None:
    """Forget the request, when the run that it was for has ended."""
    _requested.clear()
