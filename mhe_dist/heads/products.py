"""Matrix products whose rows do not depend on how many there are.

A rank that computes half of the micro-batches meets half of the samples at a time. For fewer than
four rows BLAS takes other kernels, which sum in another order; training amplifies the last bit
within a few steps to something that is seen. So no product here has fewer. (Measured with MKL and
AVX2: the rows of products with 4 to 256 rows were the same bits.)
"""

from __future__ import annotations

from typing import Final

from torch import Tensor
from torch.nn import functional as F

LEAST_ROWS: Final = 4


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` `[n, p]` of `a` `[n, k]` and `b` `[k, p]`."""
    missing = LEAST_ROWS - len(a)
    return a @ b if missing <= 0 else (F.pad(a, (0, 0, 0, missing)) @ b)[: len(a)]
