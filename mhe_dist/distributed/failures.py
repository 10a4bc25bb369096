"""A failure of one rank becomes that of all, which would wait for it in the next collective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from mhe_dist.distributed.topology import Group, Topology
from mhe_dist.errors import Preempted, RunError, StorageUnavailable, UserError
from mhe_dist.storage_errors import is_transient

T = TypeVar("T")
log = logging.getLogger(__name__)


@contextmanager
def failing_together(topology: Topology, group: Group = None) -> Iterator[None]:
    """Raise what goes wrong in the block on some rank on all of them; all ranks must enter.

    For what each rank does alone, such as opening a file; no collectives in the block.

    Args:
        topology: the ranks.
        group: that tells them; None: the host group.

    Raises:
        UserError, RunError, OSError: see `raise_together`; another error is a RunError.
    """
    failure: Exception | None = None
    try:
        yield
    except (UserError, RunError, OSError) as error:
        failure = error
    except Exception as error:  # of a store, whatever it likes
        log.exception("on rank %d", topology.rank)
        failure = _portable(error)
    raise_together(failure, topology, group)


def raise_together(failure: Exception | None, topology: Topology, group: Group = None) -> None:
    """Raise the first rank's failure on all of them, if there is one; all ranks must call.

    A rank that raised alone would leave the others waiting for it.

    Args:
        failure: of this rank.
        topology, group: see `failing_together`.

    Raises:
        UserError, StorageUnavailable, RunError: some rank had a failure, of that kind.
    """
    if topology.world_size == 1:
        if failure is not None:
            raise failure
        return
    mine = None if failure is None else _portable(failure)
    found: list[Exception | None] = [None] * topology.world_size
    dist.all_gather_object(found, mine, group=group or topology.host_group)
    for rank, other in enumerate(found):
        if other is not None:
            raise other from (failure if rank == topology.rank else None)


def decided_by_first(work: Callable[[], T], topology: Topology, group: Group = None) -> T:
    """What `work` gives on rank 0, on all ranks; all ranks must call.

    For what ranks must agree on and a file or a clock tells: each might read something else, when
    the file changes meanwhile or the store fails for some of them.

    Args:
        work: called on rank 0 alone. What it gives can be pickled.
        topology, group: see `failing_together`.

    Raises:
        UserError, StorageUnavailable, RunError, Preempted: its failure, of that kind; on all ranks.
    """
    if topology.world_size == 1:
        return work()
    answer: list[Any] = [None, None]  # and the failure
    cause: Exception | None = None
    if topology.is_first:
        try:
            answer[0] = work()
        except Exception as error:  # the others would wait for the answer
            cause, answer[1] = error, _portable(error)
    dist.broadcast_object_list(answer, src=0, group=group or topology.host_group)
    if answer[1] is not None:
        raise answer[1] from cause
    result: T = answer[0]
    return result


def _portable(error: Exception) -> Exception:
    """An error of the same kind that is made of its message alone, so that it can be sent."""
    for kind in (UserError, StorageUnavailable, RunError, Preempted):
        if isinstance(error, kind):
            return kind(str(error))
    kind = StorageUnavailable if is_transient(error) else RunError
    return kind(f"{type(error).__name__}: {error}")
