"""Row-sparse SGD in one pass: each touched row and its momentum are read once and written once.

`mhe_dist.bank.row_optim.RowSGD` and `mhe_dist.bank.bank.round_stochastically` are the definitions.
Values differ from theirs by the rounding of float32 sums; the noise that rounds to bfloat16 is
theirs, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhe_dist.kernels import dispatch
from mhe_dist.kernels.dispatch import KernelTraffic

_TILE = 4096  # values of a program's tile


class RowFactors(NamedTuple):
    """The gradient of rows `w` `[U, L, D]`: `g + b * w`, or `a^T e + b * w`.

    Attributes:
        g: `[U, L, D]`, or None if the factors are given.
        a, e: `[U, c, L]` and `[U, c, D]`, or None.
        b: `[U, L]`, or None: nothing along the row.
        of_normalised: whether `g` is the gradient of `w / |w|` instead; `b` is None then.
    """

    g: Tensor | None
    a: Tensor | None
    e: Tensor | None
    b: Tensor | None
    of_normalised: bool = False


def sgd_rows(
    weight: Tensor,
    velocity: Tensor | None,
    local: Tensor,
    gradient: RowFactors,
    lr: float,
    momentum: float,
    weight_decay: float,
    first_unit: int = 0,
    keys: tuple[int, int] = (0, 0),
) -> None:
    """`v <- momentum v + g + weight_decay w; w <- w - lr v` on some units, in place.

    Args:
        weight: `[units, L, D]`, contiguous; bfloat16 is rounded stochastically.
        velocity: the same for the momentum; None: there is none.
        local: int64 `[U]`, distinct positions of units, on the device.
        gradient: float32.
        lr, momentum, weight_decay: as in torch.optim.SGD.
        first_unit: global number of unit 0, which keys the rounding.
        keys: of the rounding of weight and momentum; 32 bits of each are used.
    """
    length, width = weight.shape[1:]
    if not len(local) or not length or not width:
        return
    columns = triton.next_power_of_2(width)
    rows = min(triton.next_power_of_2(length), max(1, _TILE // columns))
    g, a, e, b = (_contiguous(part) for part in gradient[:4])
    stored = len(local) * weight[0].nbytes * (1 if velocity is None else 2)
    given = sum(part.nbytes for part in (g, a, e, b, local) if part is not None)
    dispatch.launch(
        _sgd_kernel,
        (len(local), triton.cdiv(length, rows)),
        KernelTraffic(stored + given, stored),
        weight,
        weight if velocity is None else velocity,
        local,
        weight if g is None else g,
        weight if a is None else a,
        weight if e is None else e,
        weight if b is None else b,
        0 if a is None else a.shape[1],
        lr,
        momentum,
        weight_decay,
        first_unit,
        as_int32(keys[0]),
        as_int32(keys[1]),
        length=length,
        width=width,
        has_velocity=velocity is not None,
        has_g=g is not None,
        has_b=b is not None,
        of_normalised=gradient.of_normalised,
        block_rows=rows,
        block_columns=columns,
        enable_fp_fusion=False,
    )


def round_rows(rows: Tensor, units: Tensor, key: int) -> Tensor:
    """`round_stochastically` in one pass, the same bits: float32 `[U, L, D]` to bfloat16.

    Args:
        rows: float32.
        units: int64 `[U]`, global numbers, on the device.
        key: keys the noise.
    """
    rounded = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
    size = rows[0].numel() if len(rows) else 0
    if size:
        dispatch.launch(
            _round_kernel,
            (len(rows), triton.cdiv(size, _TILE)),
            KernelTraffic(rows.nbytes + units.nbytes, rounded.nbytes),
            rows.contiguous(),
            rounded,
            units,
            as_int32(key),
            size,
            block=_TILE,
        )
    return rounded


def as_int32(key: int) -> int:
    """The int32 with the low 32 bits of a key."""
    return (key & 0xFFFFFFFF) - (1 << 32 if key & 0x80000000 else 0)


def _contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


@triton.jit
def stochastic_bfloat16(values, unit, position, key):
    """float32 `values` rounded to bfloat16 by the noise of (key, unit, position in the unit)."""
    noise = position.to(tl.int32) * -1640531527 + (unit.to(tl.int32) * 374761393 + key)
    noise = (noise ^ (noise >> 15)) * -2048144789
    noise = (((noise ^ (noise >> 13)) * -1028477379) >> 16) & 0xFFFF
    bits = (values.to(tl.int32, bitcast=True) + noise) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _store(pointers, values, mask, unit, position, key):
    """Store in the type of the memory; bfloat16 is rounded stochastically."""
    if pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, stochastic_bfloat16(values, unit, position, key), mask=mask)
    else:
        tl.store(pointers, values, mask=mask)


@triton.jit(do_not_specialize=["key"])
def _round_kernel(rows, rounded, units, key, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * block + tl.arange(0, block)
    mask = position < size
    values = tl.load(rows + row * size + position, mask=mask, other=0.0)
    unit = tl.load(units + row)
    _store(rounded + row * size + position, values, mask, unit, position, key)


@triton.jit(do_not_specialize=["count", "first_unit", "weight_key", "velocity_key"])
def _sgd_kernel(
    weight,
    velocity,
    local,
    g_pointer,
    a_pointer,
    e_pointer,
    b_pointer,
    count,
    lr,
    momentum,
    weight_decay,
    first_unit,
    weight_key,
    velocity_key,
    length: tl.constexpr,
    width: tl.constexpr,
    has_velocity: tl.constexpr,
    has_g: tl.constexpr,
    has_b: tl.constexpr,
    of_normalised: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One program: some rows of one unit."""
    u = tl.program_id(0).to(tl.int64)
    unit = tl.load(local + u)
    slot = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_columns)
    row_inside, column_inside = slot < length, column < width
    inside = row_inside[:, None] & column_inside[None, :]
    position = slot[:, None] * width + column[None, :]
    stored = unit * (length * width) + position
    w = tl.load(weight + stored, mask=inside, other=0.0).to(tl.float32)
    if has_g:
        g = tl.load(g_pointer + u * (length * width) + position, mask=inside, other=0.0)
    else:
        g = tl.zeros([block_rows, block_columns], tl.float32)
        for sample in range(count):
            factor = u * count + sample
            a = tl.load(a_pointer + factor * length + slot, mask=row_inside, other=0.0)
            e = tl.load(e_pointer + factor * width + column, mask=column_inside, other=0.0)
            g += a[:, None] * e[None, :]
    radial = tl.zeros([block_rows], tl.float32) + weight_decay
    if has_b:
        radial += tl.load(b_pointer + u * length + slot, mask=row_inside, other=0.0)
    if of_normalised:
        norm = tl.maximum(tl.sqrt_rn(tl.sum(w * w, 1)), 1e-12)
        inverse = tl.div_rn(1.0, norm)
        radial -= tl.sum(g * w, 1) * (inverse * inverse * inverse)
        g = g * inverse[:, None]
    if has_velocity:
        g = tl.load(velocity + stored, mask=inside, other=0.0).to(tl.float32) * momentum + g
    g += w * radial[:, None]
    if has_velocity:
        _store(velocity + stored, g, inside, first_unit + unit, position, velocity_key)
    _store(weight + stored, w - g * lr, inside, first_unit + unit, position, weight_key)
