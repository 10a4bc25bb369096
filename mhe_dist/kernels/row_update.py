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
from mhe_dist.seeds import signed

_TILE = 4096  # values of a program's tile
# With shared factors: a program multiplies all samples, so it should hold many rows.
_SHARED_TILE, _SHARED_WARPS, _SHARED_STAGES = 16384, 8, 2
_SHARED_SAMPLES = tl.constexpr(16)  # that are multiplied at a time
_LEAST_DOT = 16  # rows, columns and samples of a product of tiles


class RowFactors(NamedTuple):
    """The gradient of rows `w` `[U, L, D]`: `g + b * w`, or `a^T e + b * w`.

    Attributes:
        g: `[U, L, D]`, or None if the factors are given.
        a, e: `[U, c, L]` and `[U, c, D]`, or None. With `places`: the factors of all units, as
            `mhe_dist.bank.row_optim.SharedFactors` has them; multiplied in TF32.
        b: `[U, L]`, or None: nothing along the row.
        of_normalised: whether `g` is the gradient of `w / |w|` instead; `b` is None then.
        places: int64 `[4, U]` on the device, or None.
    """

    g: Tensor | None
    a: Tensor | None
    e: Tensor | None
    b: Tensor | None
    of_normalised: bool = False
    places: Tensor | None = None


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
    g, a, e, b = (_contiguous(part) for part in gradient[:4])
    places = gradient.places
    tile = sgd_tile(length, width, places is not None)
    stored = len(local) * weight[0].nbytes * (1 if velocity is None else 2)
    given = sum(part.nbytes for part in (g, a, e, b, places, local) if part is not None)
    dispatch.launch(
        _sgd_kernel,
        (len(local), triton.cdiv(length, tile["block_rows"])),
        KernelTraffic(stored + given, stored),
        weight,
        weight if velocity is None else velocity,
        local,
        weight if g is None else g,
        weight if a is None else a,
        weight if e is None else e,
        weight if b is None else b,
        local if places is None else places,
        len(local) if a is None or places is not None else a.shape[1],
        lr,
        momentum,
        weight_decay,
        first_unit,
        signed(keys[0], 32),
        signed(keys[1], 32),
        length=length,
        width=width,
        has_velocity=velocity is not None,
        has_g=g is not None,
        has_b=b is not None,
        of_normalised=gradient.of_normalised,
        shared=places is not None,
        **tile,
        enable_fp_fusion=False,
    )


def sgd_tile(length: int, width: int, shared: bool) -> dict[str, int]:
    """Rows and columns that a program holds, and how it is compiled, for units `[L, D]`."""
    rows, columns = triton.next_power_of_2(length), triton.next_power_of_2(width)
    if not shared:
        rows = min(rows, max(1, _TILE // columns))
        return {"block_rows": rows, "block_columns": columns}
    columns = max(_LEAST_DOT, columns)
    return {
        "block_rows": max(_LEAST_DOT, min(rows, _SHARED_TILE // columns)),
        "block_columns": columns,
        "num_warps": _SHARED_WARPS,
        "num_stages": _SHARED_STAGES,
    }


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
            signed(key, 32),
            size,
            block=_TILE,
        )
    return rounded


def _contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


@triton.jit
def stochastic_bfloat16(values, unit, position, key):
    """float32 `values` rounded to bfloat16 by the noise of (key, unit, position in the unit).

    What is not finite stays so: the noise would carry a NaN's bits over into the sign.
    """
    noise = position.to(tl.int32) * -1640531527 + (unit.to(tl.int32) * 374761393 + key)
    noise = (noise ^ (noise >> 15)) * -2048144789
    noise = (((noise ^ (noise >> 13)) * -1028477379) >> 16) & 0xFFFF
    bits = values.to(tl.int32, bitcast=True)
    quiet = tl.where((bits & 0x7FFFFF) != 0, 0x400000, 0)  # a NaN keeps a bit of its own
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(finite, bits + noise, bits | quiet) & -65536
    return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)


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


@triton.jit
def _own_sum(
    a_pointer, e_pointer, u, count, slot, column, length: tl.constexpr, width: tl.constexpr
):
    """`a^T e` of some rows of a unit, with samples of its own."""
    a_pointer += u * count * length
    e_pointer += u * count * width
    total = tl.zeros([slot.shape[0], column.shape[0]], tl.float32)
    for sample in range(count):
        a = tl.load(a_pointer + sample * length + slot, mask=slot < length, other=0.0)
        e = tl.load(e_pointer + sample * width + column, mask=column < width, other=0.0)
        total += a[:, None] * e[None, :]
    return total


@triton.jit
def _shared_sum(
    a_pointer, e_pointer, places, units, slot, column, length: tl.constexpr, width: tl.constexpr
):
    """`a^T e` of some rows of this program's unit, with the samples of its group, in TF32."""
    places += tl.program_id(0)
    # In rows and units, so that the compiler knows how addresses are aligned.
    a_pointer += tl.load(places) * length
    stride = tl.load(places + units) * length
    e_pointer += tl.load(places + 2 * units) * width
    count = tl.load(places + 3 * units).to(tl.int32)
    total = tl.zeros([slot.shape[0], column.shape[0]], tl.float32)
    for start in range(0, count, _SHARED_SAMPLES):
        sample = start + tl.arange(0, _SHARED_SAMPLES)
        there = sample < count
        a = tl.load(
            a_pointer + sample[None, :] * stride + slot[:, None],
            mask=there[None, :] & (slot < length)[:, None],
            other=0.0,
        )
        e = tl.load(
            e_pointer + sample[:, None] * width + column[None, :],
            mask=there[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total = tl.dot(a, e, total, input_precision="tf32")
    return total


@triton.jit(do_not_specialize=["count", "first_unit", "weight_key", "velocity_key"])
def _sgd_kernel(
    weight,
    velocity,
    local,
    g_pointer,
    a_pointer,
    e_pointer,
    b_pointer,
    places,
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
    shared: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One program: some rows of one unit. `count`: samples of a unit, or units if `shared`."""
    u = tl.program_id(0).to(tl.int64)
    unit = tl.load(local + u)
    slot = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_columns)
    row_inside, column_inside = slot < length, column < width
    inside = row_inside[:, None] & column_inside[None, :]
    position = slot[:, None] * width + column[None, :]
    stored = unit * (length * width) + position
    if has_g:
        g = tl.load(g_pointer + u * (length * width) + position, mask=inside, other=0.0)
    elif shared:
        g = _shared_sum(a_pointer, e_pointer, places, count, slot, column, length, width)
    else:
        g = _own_sum(a_pointer, e_pointer, u, count, slot, column, length, width)
    w = tl.load(weight + stored, mask=inside, other=0.0).to(tl.float32)
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
    if shared and of_normalised:
        # Kept since the norm was formed, it would take the registers that hold the sum.
        w = tl.load(weight + stored, mask=inside, other=0.0, volatile=True).to(tl.float32)
    g += w * radial[:, None]
    if has_velocity:
        _store(velocity + stored, g, inside, first_unit + unit, position, velocity_key)
    _store(weight + stored, w - g * lr, inside, first_unit + unit, position, weight_key)
