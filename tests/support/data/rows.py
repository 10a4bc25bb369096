"""Rows of embeddings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def unit(rows: npt.NDArray[np.floating], dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    """Rows `[..., D]` with length 1."""
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(dtype)
