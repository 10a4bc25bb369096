"""Rows of a bank for matrix products: gathered, measured and normalised in one pass.

`mhe_dist.bank.bank.Bank.read_for_products` holds the definition. Values differ from its by the
rounding of the sums of squares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhe_dist.kernels import dispatch
from mhe_dist.kernels.dispatch import KernelTraffic

_TILE = 4096  # values of a program's tile


def read_rows(weight: Tensor, local: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
    """Some units' rows `[U, L, D]` in float32, and `1 / |w|` of each row `[U, L]`.

    Args:
        weight: `[units, L, D]`, contiguous, float32 or bfloat16.
        local: int64 `[U]`, positions of units, on the device.
        scaled: whether the rows are given as `w / |w|`.
    """
    length, width = weight.shape[1:]
    rows = torch.empty((len(local), length, width), dtype=torch.float32, device=weight.device)
    inverse = torch.empty(rows.shape[:2], dtype=torch.float32, device=weight.device)
    if rows.numel():
        columns = triton.next_power_of_2(width)
        block = min(triton.next_power_of_2(length), max(1, _TILE // columns))
        dispatch.launch(
            _read_kernel,
            (len(local), triton.cdiv(length, block)),
            KernelTraffic(
                len(local) * weight[0].nbytes + local.nbytes, rows.nbytes + inverse.nbytes
            ),
            weight,
            local,
            rows,
            inverse,
            length=length,
            width=width,
            scaled=scaled,
            block_rows=block,
            block_columns=columns,
        )
    return rows, inverse


@triton.jit
def _read_kernel(
    weight,
    local,
    rows,
    inverses,
    length: tl.constexpr,
    width: tl.constexpr,
    scaled: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One program: some rows of one unit."""
    u = tl.program_id(0).to(tl.int64)
    unit = tl.load(local + u)
    slot = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_columns)
    inside = (slot < length)[:, None] & (column < width)[None, :]
    position = slot[:, None] * width + column[None, :]
    w = tl.load(weight + unit * (length * width) + position, mask=inside, other=0.0)
    w = w.to(tl.float32)
    inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 1)), 1e-12))
    if scaled:
        w = w * inverse[:, None]
    tl.store(rows + u * (length * width) + position, w, mask=inside)
    tl.store(inverses + u * length + slot, inverse, mask=slot < length)
