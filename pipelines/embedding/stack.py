"""Stacks decoded images to one tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def stack_images(
    image: Callable[[int, int], npt.NDArray[np.uint8]], start: int, stop: int, image_size: int
) -> Tensor:
    """The images `[start, stop)`, uint8 `[n, 3, image_size, image_size]`, RGB.

    Args:
        image: called with a number and `image_size`; returns uint8 `[image_size, image_size, 3]`,
            or `[image_size, image_size]` of a grey image.
        start, stop: range of the numbers.
        image_size: pixels.
    """
    pixels = np.empty((stop - start, image_size, image_size, 3), np.uint8)
    for row, number in enumerate(range(start, stop)):
        decoded = image(number, image_size)
        pixels[row] = decoded if decoded.ndim == 3 else decoded[:, :, None]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
