"""Noise of first rows in one pass; `mhe_dist.noise.normal_rows` is the definition.

No operation is fused or reordered, so the bits are those of the definition on the same device. (On
CPUs torch takes its square roots from MKL, which misses the nearest float32 in some of them.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhe_dist.kernels import dispatch
from mhe_dist.kernels.dispatch import KernelTraffic
from mhe_dist.noise import COS, LOG2, SIN
from mhe_dist.seeds import GOLDEN, MIX_A, MIX_B, derive

_TILE = 1024  # values of a program
_GOLDEN = tl.constexpr(GOLDEN)
_MIX_A = tl.constexpr(MIX_A)
_MIX_B = tl.constexpr(MIX_B)


def first_rows(key: int, classes: Tensor, width: int, std: float, columns: int) -> Tensor:
    """Rows `[..., columns]`, float32; see `mhe_dist.bank.initial_rows.noise_rows`."""
    rows = torch.empty(*classes.shape, columns, dtype=torch.float32, device=classes.device)
    if rows.numel():
        block = min(triton.next_power_of_2(columns), _TILE)
        dispatch.launch(
            _first_rows_kernel,
            (classes.numel(), triton.cdiv(columns, block)),
            KernelTraffic(classes.nbytes, rows.nbytes),
            classes.contiguous(),
            rows,
            derive(key, "normal_rows"),
            std,
            width=width,
            columns=columns,
            pairs=(width + 1) // 2,
            log2=LOG2,
            sine=SIN,
            cosine=COS,
            block=block,
            enable_fp_fusion=False,
        )
    return rows


@triton.jit
def _mix(words):
    """The output function of splitmix64 on uint64."""
    words = (words ^ (words >> 30)) * _MIX_A
    words = (words ^ (words >> 27)) * _MIX_B
    return words ^ (words >> 31)


@triton.jit
def _word(start, number):
    """The int32 of that number in the sequence of a row."""
    words = _mix(start + ((number >> 1) + 1).to(tl.uint64) * _GOLDEN)
    words = words >> ((number & 1) * 32).to(tl.uint64)
    return (words & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _polynomial(x, coefficients: tl.constexpr):
    """Horner's rule, product and sum apart."""
    count: tl.constexpr = len(coefficients)
    total = x * coefficients[count - 1]
    for i in tl.static_range(2, count):
        total = (total + coefficients[count - i]) * x
    return total + coefficients[0]


@triton.jit
def _minus_log2(numbers, log2: tl.constexpr):
    """-log2(x / 2**31) of float32 in `[0.5, 2**31]`."""
    bits = numbers.to(tl.int32, bitcast=True)
    fraction = (bits & 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07
    linear = (bits - 1325400064).to(tl.float32) * -1.1920928955078125e-07
    return linear - _polynomial(fraction, log2) * (fraction - fraction * fraction)


@triton.jit(do_not_specialize=["key"])
def _first_rows_kernel(
    classes,
    rows,
    key,
    std,
    width: tl.constexpr,
    columns: tl.constexpr,
    pairs: tl.constexpr,
    log2: tl.constexpr,
    sine: tl.constexpr,
    cosine: tl.constexpr,
    block: tl.constexpr,
):
    """One program: some columns of the row of one class."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    number = tl.load(classes + row)
    start = _mix(_mix(number.to(tl.uint64) + key.to(tl.uint64)) + _GOLDEN)
    pair = tl.where(column < pairs, column, column - pairs)
    radius, angle = _word(start, pair), _word(start, pair + pairs)
    length = _minus_log2(tl.abs(radius.to(tl.float32)) + 0.5, log2) * 1.3862943649291992
    length = tl.sqrt_rn(length)
    length = tl.where(radius < 0, -length, length)
    half_turns = angle.to(tl.float32) * 4.656612873077393e-10
    square = half_turns * half_turns
    cosines = _polynomial(square, cosine) * length
    sines = _polynomial(square, sine) * half_turns * length
    noise = tl.where(column < pairs, cosines, sines) * std
    noise = tl.where((column < width) & (number >= 0), noise, 0.0)
    tl.store(rows + row * columns + column, noise, mask=column < columns)
