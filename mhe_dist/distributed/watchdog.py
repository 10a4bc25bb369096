"""A collective that does not end: after its timeout, say which ranks waited, and which are missing.

The ranks that waited leave a key in the rendezvous store, which needs no collective; a rank without
a key is missing. The error is not final: the group is started again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import first_line

_GATHER_S = 5.0  # ranks that entered the same collective leave it within this time
_SIGNS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")


class Stuck(Exception):
    """A collective ended without all ranks; says which rank waited in what, and for whom."""


@contextmanager
def watched(topology: Topology, activity: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a collective inside the block into `Stuck`.

    Args:
        topology: the ranks.
        activity: names what this rank does now.
    """
    try:
        yield
    except RuntimeError as error:
        if topology.world_size == 1 or not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        reason = first_line(error)
        raise Stuck(
            f"rank {topology.rank} of {topology.world_size} failed in {activity()}: {reason}; "
            f"{_missing(topology)}"
        ) from error


def _missing(topology: Topology) -> str:
    """Which ranks have not failed in a collective too, in words."""
    silent: list[int] = []
    # A thread, as nothing ends a request to a store whose process is stopped.
    thread = threading.Thread(target=_collect_silent, args=(topology, silent), daemon=True)
    thread.start()
    thread.join(2 * _GATHER_S)
    if thread.is_alive() or -1 in silent:
        return "rank 0 does not answer"
    return f"not heard from: rank {', '.join(map(str, silent))}" if silent else "no rank is missing"


def _collect_silent(topology: Topology, silent: list[int]) -> None:
    """Fill in the ranks that are not heard from; -1 where the store, on rank 0, fails."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"mhe/stuck/{topology.rank}", "")
        time.sleep(_GATHER_S)
        silent += [r for r in range(topology.world_size) if not store.check([f"mhe/stuck/{r}"])]
    except RuntimeError:
        silent.append(-1)
