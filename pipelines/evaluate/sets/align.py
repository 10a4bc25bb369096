"""Aligns faces by their landmarks to the usual crop of 112x112 (docs/formats.md section 3)."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import grid_sample

from pipelines.data.decode import Pixels

Floats = npt.NDArray[np.float64]

CROP_SIZE: Final = 112
REFERENCE_LANDMARKS: Final[Floats] = np.array(
    [
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    ]
)
"""Positions of eyes, nose and corners of the mouth, `(x, y)` in pixels of a 112x112 crop."""


def fit_similarity(source: Floats, target: Floats) -> tuple[complex, complex]:
    """Rotation, scale and shift that map `source` onto `target` with the least squared error.

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


def align_face(image: Pixels, landmarks: Floats, size: int = CROP_SIZE) -> Pixels:
    """Cut an aligned face out of an image.

    Args:
        image: uint8 `[H, W, 3]`.
        landmarks: `[5, 2]`, (x, y) in its pixels, in the order of `REFERENCE_LANDMARKS`; the
            centre of the first pixel is 0.
        size: width and height of the crop; the reference landmarks are scaled to it.

    Returns:
        uint8 `[size, size, 3]`, sampled bilinearly, black outside the image.

    Raises:
        ValueError: the landmarks are all the same, or not finite.
    """
    a, b = fit_similarity(landmarks, REFERENCE_LANDMARKS * (size / CROP_SIZE))
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    source = (x + 1j * y - b) / a if a else np.full((size, size), np.inf * (1 + 1j))
    height, width = image.shape[:2]
    # grid_sample counts from the centre of the first pixel, -1, to that of the last pixel, 1.
    scaled = [2 * source.real / max(width - 1, 1) - 1, 2 * source.imag / max(height - 1, 1) - 1]
    grid = torch.from_numpy(np.stack(scaled, axis=-1)).float()[None]
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()[None]
    crop = grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return crop[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
