"""Operations whose result for one sample does not depend on how many others there are.

A rank that computes half of the micro-batches scores half of the samples at a time. For fewer than
six rows BLAS takes other kernels, which sum in another order; training amplifies the last bit
within a few steps to something that is seen. So no product here has fewer. (Measured with MKL: the
rows of products with 4 to 256 rows were the same bits with AVX2, with AVX-512 those with 6 or more,
where the other factor is transposed.) Of the element-wise functions, `logaddexp`, `sigmoid` and
`softplus` round differently at the end of a vector; `exp`, `log`, `log1p` and `sqrt` do not.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_ROWS: Final = 8


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` `[..., n, p]` of `a` `[..., n, k]` and `b` `[..., k, p]`, of matrices or batches."""
    count = a.shape[-2]
    if count >= LEAST_ROWS:
        return a @ b
    return (F.pad(a, (0, 0, 0, LEAST_ROWS - count)) @ b)[..., :count, :]


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """`log(exp(a) + exp(b))`, not both of them `-inf`."""
    high = torch.maximum(a, b)
    return high + torch.minimum(a, b).sub_(high).exp_().log1p_()
