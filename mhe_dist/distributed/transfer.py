"""Copies from the host to the device that the host does not wait for."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Up to here the driver takes a copy from pageable memory at once; beyond, it waits for the stream.
STAGED_BYTES: Final = 64 * 1024


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on the device, through pinned memory where they are many.

    Values that are on the device already are returned as they are.
    """
    if device.type == "cuda" and values.device.type == "cpu" and values.nbytes > STAGED_BYTES:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
