"""Faces by landmarks: the transform to the usual crop of 112x112 (docs/formats.md section 3)."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import grid_sample

from pipelines.data.decode import Pixels

Floats = npt.NDArray[np.float64]

SIDE: Final = 112
POINTS: Final[Floats] = np.array(
    [
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    ]
)
"""Where eyes, nose and corners of the mouth belong, `(x, y)` in pixels of a crop of 112."""


def similarity(source: Floats, target: Floats) -> tuple[complex, complex]:
    """Rotation, scale and shift that bring `source` nearest to `target` by least squares.

    Points are complex numbers x + iy, so that a similarity without reflection is `a z + b`, linear
    in a and b; the solution is that of Umeyama (1991) in two dimensions.

    Args:
        source, target: `[n, 2]`.

    Raises:
        ValueError: the points of `source` are all the same, or not finite.
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    centred = z - z.mean()
    spread = float((np.abs(centred) ** 2).sum())
    if not np.isfinite(spread) or spread == 0:
        raise ValueError("the landmarks are one point, or none")
    a = complex((centred.conj() * (w - w.mean())).sum() / spread)
    return a, complex(w.mean() - a * z.mean())


def align(image: Pixels, landmarks: Floats, side: int = SIDE) -> Pixels:
    """Cut a face out.

    Args:
        image: uint8 `[H, W, 3]`.
        landmarks: `[5, 2]`, (x, y) in its pixels, in the order of `POINTS`; the middle of the
            first pixel is 0.
        side: of the crop; the usual points are scaled to it.

    Returns:
        uint8 `[side, side, 3]`, sampled bilinearly, black where the image ends.

    Raises:
        ValueError: the landmarks are all the same, or not finite.
    """
    a, b = similarity(landmarks, POINTS * (side / SIDE))
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    source = (x + 1j * y - b) / a if a else np.full((side, side), np.inf * (1 + 1j))
    height, width = image.shape[:2]
    # grid_sample counts from the middle of the first pixel, -1, to that of the last one, 1.
    scaled = [2 * source.real / max(width - 1, 1) - 1, 2 * source.imag / max(height - 1, 1) - 1]
    grid = torch.from_numpy(np.stack(scaled, axis=-1)).float()[None]
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()[None]
    crop = grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return crop[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
