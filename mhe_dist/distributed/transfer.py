"""Copies between the host and the device that the host does not wait for."""

from __future__ import annotations

import logging
import weakref
from typing import Final

import torch
from torch import Tensor

from mhe_dist.sizes import GIB

logger = logging.getLogger(__name__)

# Up to here the driver takes a copy from pageable memory at once; beyond, it waits for the stream.
STAGED_BYTES: Final = 64 * 1024


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on the device, through pinned memory where they are many.

    Values that are on the device already are returned as they are.
    """
    if device.type == "cuda" and values.device.type == "cpu" and values.nbytes > STAGED_BYTES:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def pin_in_place(values: Tensor, owner: object) -> bool:
    """Let a GPU read host memory where it lies, exactly as much as there is.

    torch's own pinned memory is rounded up to a power of two.

    Args:
        values: the memory, which stays pinned as long as `owner` is there.
        owner: whose memory it is.

    Returns:
        whether it worked: the system may allow less locked memory than that.
    """
    runtime = torch.cuda.cudart()
    address = values.data_ptr()
    error = runtime.cudaHostRegister(address, values.nbytes, 0)
    if int(error) != 0:
        logger.warning(
            "a bank of %.1f GiB in host memory cannot be pinned (%s): reading it whole is slower; "
            "raise the limit of locked memory (ulimit -l)",
            values.nbytes / GIB,
            error,
        )
        return False
    weakref.finalize(owner, _unpin, values).atexit = False
    return True


def _unpin(values: Tensor) -> None:
    """The memory must be there until then, so that nobody else gets its address pinned."""
    torch.cuda.cudart().cudaHostUnregister(values.data_ptr())
