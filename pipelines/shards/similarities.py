"""How similar samples are to their classes, as a column of a label set holds it: two bytes each."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_STEPS: Final = 65535  # between the cosines -1 and 1


def encode_similarities(cosines: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Uint16 of the same shape: 0 is the cosine -1, 65535 is 1, rounded to the nearest.

    Args:
        cosines: of any shape; values beyond [-1, 1], which rounding makes, are cut off.
    """
    scaled = (np.clip(cosines, -1.0, 1.0).astype(np.float64) + 1.0) * (_STEPS / 2)
    return np.rint(scaled).astype(np.uint16)


def decode_similarities(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The cosines, float32 of the same shape, to within 1.6e-5."""
    return (values.astype(np.float64) * (2.0 / _STEPS) - 1.0).astype(np.float32)
