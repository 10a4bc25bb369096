"""Samples against the rows of their own heads, on rows where they lie in a bank.

A head has one sample or a few, so there is little to multiply: a pass over its rows does it, and no
copy of them is made. Both passes compute in float32. `mhe_dist.heads.routed.kernel_softmax` holds
the definition; values differ from its by the rounding of float32 sums.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mhe_dist.kernels import dispatch
from mhe_dist.kernels.dispatch import KernelTraffic

_TILE, _COLUMNS = 4096, 128  # values of a program's tile; its columns where it adds up rows


class StoredHeads(NamedTuple):
    """Some heads and their samples.

    Attributes:
        weight: `[units, L, D]`, contiguous, float32 or bfloat16.
        local: int64 `[T]`, positions of the heads, on the device.
        samples: int64 `[T, c]` on the device, the samples of each head; some may be there twice.
    """

    weight: Tensor
    local: Tensor
    samples: Tensor

    @property
    def read(self) -> int:
        """Bytes of the rows and the tables; a head's rows are in cache for its second sample."""
        rows = len(self.local) * self.weight[0].nbytes
        return rows + self.local.nbytes + self.samples.nbytes


def own_products(heads: StoredHeads, features: Tensor) -> tuple[Tensor, Tensor]:
    """Products `[T, c, L]` of samples and rows, and `1 / |w|` of each row `[T, L]`, float32.

    Args:
        heads: which rows and samples.
        features: `[n, D]`, float32, the columns side by side.
    """
    count, length, width = heads.samples.shape[1], *heads.weight.shape[1:]
    products = features.new_empty(len(heads.local), count, length)
    inverse = features.new_empty(len(heads.local), length)
    columns = triton.next_power_of_2(width)
    block = min(triton.next_power_of_2(length), max(1, _TILE // columns))
    given = heads.samples.numel() * width * features.itemsize
    dispatch.launch(
        _products_kernel,
        (len(heads.local), triton.cdiv(length, block)),
        KernelTraffic(heads.read + given, products.nbytes + inverse.nbytes),
        *heads,
        features,
        products,
        inverse,
        count,
        features.stride(0),
        length=length,
        width=width,
        block_rows=block,
        block_columns=columns,
    )
    return products, inverse


def sum_own_rows(heads: StoredHeads, weights: Tensor, gradient: Tensor) -> None:
    """Store the sum of each sample's own rows, times weights, in its row of `gradient`.

    Args:
        heads: which rows and samples; a sample that is there twice has the same weights twice.
        weights: `[T, c, L]`, float32, contiguous.
        gradient: `[n, D]`, float32, contiguous; rows of other samples stay as they are.
    """
    length, width = heads.weight.shape[1:]
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    written = heads.samples.numel() * width * gradient.itemsize
    dispatch.launch(
        _sum_kernel,
        (heads.samples.numel(), triton.cdiv(width, columns)),
        KernelTraffic(heads.read + weights.nbytes, written),
        *heads,
        weights,
        gradient,
        heads.samples.shape[1],
        length=length,
        width=width,
        block_rows=min(triton.next_power_of_2(length), _TILE // columns),
        block_columns=columns,
    )


@triton.jit(do_not_specialize=["count"])
def _products_kernel(
    weight,
    local,
    samples,
    features,
    products,
    inverses,
    count,
    stride,
    length: tl.constexpr,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One program: some rows of one head, and all its samples."""
    head = tl.program_id(0).to(tl.int64)
    unit = tl.load(local + head)
    slot = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_columns)
    row_inside, column_inside = slot < length, column < width
    inside = row_inside[:, None] & column_inside[None, :]
    position = unit * (length * width) + slot[:, None] * width + column[None, :]
    w = tl.load(weight + position, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 1)), 1e-12))
    tl.store(inverses + head * length + slot, inverse, mask=row_inside)
    for number in range(count):
        row = head * count + number
        sample = tl.load(samples + row)
        feature = tl.load(features + sample * stride + column, mask=column_inside, other=0.0)
        product = tl.sum(w * feature[None, :], 1)
        tl.store(products + row * length + slot, product, mask=row_inside)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(
    weight,
    local,
    samples,
    weights,
    gradient,
    count,
    length: tl.constexpr,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One program: some columns of one sample. Programs of repeated samples store the same."""
    row = tl.program_id(0).to(tl.int64)
    sample = tl.load(samples + row)
    unit = tl.load(local + row // count)
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    column_inside = column < width
    total = tl.zeros([block_rows, block_columns], tl.float32)
    for start in range(0, length, block_rows):
        slot = start + tl.arange(0, block_rows)
        row_inside = slot < length
        inside = row_inside[:, None] & column_inside[None, :]
        position = unit * (length * width) + slot[:, None] * width + column[None, :]
        w = tl.load(weight + position, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(weights + row * length + slot, mask=row_inside, other=0.0)
        total += w * factor[:, None]
    tl.store(gradient + sample * width + column, tl.sum(total, 0), mask=column_inside)
