"""Normal noise of (seed, class): the same bits on any device and in any batch."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from mhe_dist.seeds import GOLDEN, MIX_A, MIX_B, derive, signed

# Interpolation at Chebyshev nodes of [0, 1], coefficients of rising powers; errors below 7e-6,
# 1.3e-6 and 5e-8. In turn (log2(1 + x) - x) / (x * (1 - x)), and with x = y * y
# sin(pi / 2 * y) / y and cos(pi / 2 * y).
LOG2: Final = (0.44268885, -0.27820167, 0.19666100, -0.13144654, 0.06407294, -0.015125447)
SIN: Final = (1.5707952, -0.64592570, 0.079500005, -0.0043705860)
COS: Final = (1.0, -1.2336982, 0.25365067, -0.020810515, 0.00085813447)
# Pairs of normals in one pass: small enough for a core's cache, or for a device's memory.
_HOST_PAIRS: Final = 1 << 14
_DEVICE_PAIRS: Final = 1 << 24


def normal_rows(
    seed: int, classes: Tensor, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise whose row depends on (seed, class, width) only.

    Each row runs splitmix64 from a start that is a hash of (seed, class); Box-Muller makes two
    normals of 64 bits. Only operations that IEEE 754 rounds correctly are used, one at a time, so
    that a row has the same bits on any device and at any position of any batch. No value is beyond
    6.67 in magnitude.

    Args:
        seed: any integer.
        classes: int64 `[N]`, on any device.
        width: D.
        dtype: of the result; the noise is made in float32.

    Returns:
        `[N, D]` on the device of `classes`.
    """
    pairs = (width + 1) // 2
    rows = torch.empty(len(classes), width, dtype=dtype, device=classes.device)
    limit = _HOST_PAIRS if classes.device.type == "cpu" else _DEVICE_PAIRS
    chunk = max(1, limit // max(1, pairs))
    columns = torch.arange(1, pairs + 1, device=classes.device).mul_(signed(GOLDEN, 64))
    # Two rounds per class: the starts of neighbouring classes must not be neighbours.
    start = _mix(_mix(classes + derive(seed, "normal_rows")).add_(signed(GOLDEN, 64)))
    for begin in range(0, len(classes), chunk):
        bits = _mix(start[begin : begin + chunk, None] + columns).view(torch.int32)
        radius, angle = bits[:, :pairs], bits[:, pairs:]
        cosines, sines = _box_muller(radius, angle)
        rows[begin : begin + chunk, :pairs] = cosines
        rows[begin : begin + chunk, pairs:] = sines[:, : width - pairs]
    return rows


def _mix(words: Tensor) -> Tensor:
    """The output function of splitmix64, in place on int64; the arithmetic wraps around."""
    shifted = torch.empty_like(words)
    for shift, factor in ((30, MIX_A), (27, MIX_B), (31, 1)):
        # Masked, because torch shifts the sign in.
        torch.bitwise_right_shift(words, shift, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            words.mul_(signed(factor, 64))
    return words


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals of two random int32, float32 of the same shape.

    The angle covers half the circle; the sign of `radius` chooses the half.
    """
    length = _minus_log2(radius.to(torch.float32).abs_().add_(0.5))
    length = length.mul_(2 * math.log(2)).sqrt_().copysign_(radius)
    half_turns = angle.to(torch.float32).mul_(2.0**-31)
    square = half_turns * half_turns
    sines = _polynomial(square, SIN).mul_(half_turns).mul_(length)
    return _polynomial(square, COS).mul_(length), sines


def _minus_log2(numbers: Tensor) -> Tensor:
    """-log2(x / 2**31) of float32 in `[0.5, 2**31]`, to 2e-6; never negative."""
    bits = numbers.view(torch.int32)
    fraction = (bits & 0x7FFFFF).to(torch.float32).mul_(2.0**-23)
    # Exponent and mantissa read as one fixed-point number are log2, linear between powers of two.
    linear = (bits - ((127 + 31) << 23)).to(torch.float32).mul_(-(2.0**-23))
    bow = _polynomial(fraction, LOG2).mul_(fraction - fraction * fraction)
    return linear.sub_(bow)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule, product and sum apart: a fused one would round differently elsewhere."""
    total = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(coefficients[0])
