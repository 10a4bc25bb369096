"""First rows of classes: noise keyed by (key, class), the same on any rank and device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.kernels.dispatch import use_kernels
from mhe_dist.noise import normal_rows


def noise_rows(key: int, classes: Tensor, width: int, std: float, columns: int) -> Tensor:
    """Normal noise `[..., columns]` of deviation `std` in float32; zero where there is no class.

    Args:
        key: of the noise; a row depends on it, the class and the width.
        classes: int64 `[...]` on the device; negative: no class.
        width: columns of noise.
        std: their deviation.
        columns: of the rows, `width` at least; those beyond are zero (a bias).
    """
    if use_kernels(classes):
        from mhe_dist.kernels.first_rows import first_rows

        return first_rows(key, classes, width, std, columns)
    rows = normal_rows(key, classes.view(-1), width, torch.float32)
    rows = rows.mul_(std).masked_fill_(classes.view(-1, 1) < 0, 0.0)
    return F.pad(rows, (0, columns - width)).view(*classes.shape, columns)
