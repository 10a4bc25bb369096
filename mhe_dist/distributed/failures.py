"""A failure of one rank becomes that of all, which would wait for it in the next collective."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError

log = logging.getLogger(__name__)


@contextmanager
def failing_together(topology: Topology) -> Iterator[None]:
    """Raise what goes wrong in the block on some rank on all of them; all ranks must enter.

    For what each rank does alone, such as opening a file; no collectives in the block.

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
        failure = RunError(f"{type(error).__name__}: {error}")
    raise_together(failure, topology)


def raise_together(failure: Exception | None, topology: Topology) -> None:
    """Raise the first rank's failure on all of them, if there is one; all ranks must call.

    A rank that raised alone would leave the others waiting for it.

    Raises:
        UserError, RunError: some rank had a failure; a UserError only if that was one.
    """
    if topology.world_size == 1:
        if failure is not None:
            raise failure
        return
    mine = None if failure is None else (isinstance(failure, UserError), str(failure))
    found: list[tuple[bool, str] | None] = [None] * topology.world_size
    dist.all_gather_object(found, mine, group=topology.host_group)
    for rank, other in enumerate(found):
        if other is not None:
            is_user, message = other
            raise (UserError if is_user else RunError)(message) from (
                failure if rank == topology.rank else None
            )
