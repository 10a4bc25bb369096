"""ArcFace's margin and its derivative in one launch.

`mhe_dist.heads.margins` holds the definition. With `cos(theta + m) = cos(theta) cos(m) -
sin(theta) sin(m)` no inverse function is needed; values differ by rounding.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhe_dist.kernels import dispatch
from mhe_dist.kernels.dispatch import KernelTraffic

_BLOCK = 256


def angular_margin(
    cosine: Tensor, m2: float, m3: float, drop: float, edge: float
) -> tuple[Tensor, Tensor]:
    """`cos(theta + m2) - m3`, and `cos(theta) - drop - m3` from `theta + m2 > pi` on.

    Args:
        cosine: `cos(theta)`, float32, contiguous.
        m2: the angle, in [0, pi].
        m3: what is subtracted.
        drop: the step down where the angle would pass pi.
        edge: how far from +-1 the cosine is kept where the derivative is formed.

    Returns:
        The values and their derivatives with respect to `cosine`.
    """
    phi, slope = torch.empty_like(cosine), torch.empty_like(cosine)
    count = cosine.numel()
    if count:
        dispatch.launch(
            _angular_kernel,
            (triton.cdiv(count, _BLOCK),),
            KernelTraffic(cosine.nbytes, 2 * cosine.nbytes),
            cosine,
            phi,
            slope,
            count,
            math.cos(m2),
            math.sin(m2),
            m3,
            drop,
            1 - edge,
            block=_BLOCK,
        )
    return phi, slope


@triton.jit(do_not_specialize=["count"])
def _angular_kernel(
    cosines, phis, slopes, count, cos_m, sin_m, m3, drop, limit, block: tl.constexpr
):
    """One program: some cosines."""
    position = tl.program_id(0) * block + tl.arange(0, block)
    mask = position < count
    cosine = tl.load(cosines + position, mask=mask, other=0.0)
    inner = tl.minimum(tl.maximum(cosine, -limit), limit)
    sine = tl.sqrt_rn((1 - inner) * (1 + inner))
    slope = tl.div_rn(sine * cos_m + inner * sin_m, sine)
    phi = inner * cos_m - sine * sin_m + slope * (cosine - inner)
    turned = inner < -cos_m
    tl.store(phis + position, tl.where(turned, cosine - drop, phi) - m3, mask=mask)
    tl.store(slopes + position, tl.where(turned, 1.0, slope), mask=mask)
