"""Decoded images of an evaluation as one tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def stacked(
    image: Callable[[int, int], npt.NDArray[np.uint8]], start: int, stop: int, side: int
) -> Tensor:
    """The images `[start, stop)`, uint8 `[n, 3, side, side]`, RGB.

    Args:
        image: gives number `i` as `[side, side, 3]`, or `[side, side]` when it is grey.
        start, stop: numbers.
        side: pixels.
    """
    pixels = np.empty((stop - start, side, side, 3), np.uint8)
    for place, number in enumerate(range(start, stop)):
        found = image(number, side)
        pixels[place] = found if found.ndim == 3 else found[:, :, None]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
