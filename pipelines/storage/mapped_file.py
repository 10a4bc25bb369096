"""Files of arrays that are mapped and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mhe_dist.disk_room import reserve_room


def create_mapped_array(
    path: str | Path, dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> np.memmap[Any, Any]:
    """A new `.npy` file of zeros, mapped to be written, which has room for all its bytes.

    Raises:
        RunError: the disk is full.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        reserve_room(file.fileno(), path, array.offset, array.offset + array.nbytes)
    return array
