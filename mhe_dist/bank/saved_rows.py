"""Rows of a bank for a checkpoint: copied chunk by chunk, once somebody has room for them."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist.bank.row_store import RowStore

SAVED_CHUNK_BYTES: Final = 1 << 24  # of rows that are gathered at a time, on a device too


class SavedRows:
    """One field of some units, in the stored type, as it is when it is copied.

    Attributes:
        shape, dtype: `[U, L, columns]`, of the copy.
    """

    def __init__(self, store: RowStore, local: npt.NDArray[np.int64]) -> None:
        """Args:
        store: where the field lies.
        local: positions of the units in the store.
        """
        self._store, self._local = store, local
        self.shape = torch.Size([len(local), *store.shape[1:]])
        self.dtype = store.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return self.shape.numel() * self.dtype.itemsize

    def copy_to(self, buffer: Tensor | None) -> None:
        """Fill `buffer`, of this shape and type on the host, without a second copy of the rows."""
        if buffer is None or not self.nbytes:
            return
        step = max(1, SAVED_CHUNK_BYTES // self._store.unit_bytes)
        for start in range(0, len(self._local), step):
            units = self._local[start : start + step]
            self._store.copy_units(units, buffer[start : start + step])

    def tensor(self) -> Tensor:
        """The rows on the host."""
        rows = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(rows)
        return rows
