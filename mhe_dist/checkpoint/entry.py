"""What a checkpoint is made of: tensors, and tensors that are made when there is room for them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class DeferredTensor(Protocol):
    """A tensor that exists once it is copied, piece by piece, so that it never exists twice."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""

    def copy_to(self, buffer: Tensor | None) -> None:
        """Fill `buffer`, of this shape and type on the host.

        Args:
            buffer: None on a rank that does not want it, and must take part: ranks may make it
                together.
        """


Entry = Tensor | DeferredTensor
