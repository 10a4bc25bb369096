"""Softmax over the classes of a sample's own head and all others met: two passes over products.

The first finds what the margin and the normaliser need, the second forms the derivatives.

`mhe_dist.heads.routed.softmax` holds the definition, `mhe_dist.heads.routed.kernel_softmax` is what
calls. Values differ from the definition's by the rounding of float32 sums.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mhe_dist.kernels import dispatch
from mhe_dist.kernels.dispatch import KernelTraffic
from mhe_dist.kernels.negatives import Negatives, finite, log_add, negative_logits


class OwnProducts(NamedTuple):
    """Samples against the rows of their own heads, a chunk of heads.

    Attributes:
        products: float32 `[T, c, L]`, a head's consecutive in the last two dimensions.
        inverse: `[T, L]`, `1 / |w|`.
        places: int64 `[4, T * c]` on the device: the sample, the slot of its class, its position in
            the factors of the rows' gradient, and how many slots of the head hold a class.
    """

    products: Tensor
    inverse: Tensor
    places: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
        """What kernels take of it."""
        heads, count, _ = self.products.shape
        return (*self, heads * count, count, self.products.stride(0))

    @property
    def constants(self) -> dict[str, int]:
        """Shapes that kernels are compiled for."""
        length = self.products.shape[2]
        return {"length": length, "block": max(16, triton.next_power_of_2(length))}

    @property
    def nbytes(self) -> int:
        """Of what is read."""
        return self.products.nbytes + self.inverse.nbytes + self.places.nbytes


class SampleSums(NamedTuple):
    """What is known of all samples `[n]` of a micro-batch, updated in place.

    Attributes:
        target: cosine of the target.
        highest: highest cosine of the classes met that are not the target.
        log_sum: of the logits met.
        losses: of the samples.
    """

    target: Tensor
    highest: Tensor
    log_sum: Tensor
    losses: Tensor


def own_statistics(
    own: OwnProducts, sums: SampleSums, negatives: Negatives
) -> tuple[Tensor, Tensor]:
    """First pass over own heads: cosine of the target, log-sum-exp of all others, `[T * c]` each.

    The others are those of the own head, and those that `sums.log_sum` stands for. `target` and
    `highest` of `sums` are updated.
    """
    count = own.places.shape[1]
    target, log_sum = own.products.new_empty(2, count)
    dispatch.launch(
        _own_statistics_kernel,
        (count,),
        KernelTraffic(own.nbytes + 2 * target.nbytes, 4 * target.nbytes),
        *own.arguments,
        target,
        log_sum,
        sums.log_sum,
        sums.target,
        sums.highest,
        *negatives,
        filtered=negatives.threshold > 0,
        **own.constants,
    )
    return target, log_sum


class OwnFactors(NamedTuple):
    """Where the second pass leaves what it forms.

    Attributes:
        products: `[T, c, L]`, weights of the rows in the gradient of the features.
        rows: `[o, L]`, weights of the features in that of the rows.
        radial: `[o, L]`, its part along the rows.
    """

    products: Tensor
    rows: Tensor
    radial: Tensor


def own_weights(
    own: OwnProducts,
    sums: SampleSums,
    negatives: Negatives,
    share: float,
    log_sum: Tensor,
    with_margin: Tensor,
    slope: Tensor,
    factors: OwnFactors,
) -> None:
    """Second pass over own heads; `log_sum` and `losses` of `sums` are updated.

    Args:
        own, sums, negatives: as in the first pass.
        share: scale of the rows' gradient.
        log_sum: `[T * c]` of all others, as the first pass returned it.
        with_margin: `[T * c]`, the target's logit.
        slope: `[T * c]`, the derivative of the margin.
        factors: written.
    """
    count = own.places.shape[1]
    dispatch.launch(
        _own_weights_kernel,
        (count,),
        KernelTraffic(own.nbytes + 3 * slope.nbytes, 3 * own.products.nbytes + 2 * slope.nbytes),
        *own.arguments,
        log_sum,
        with_margin,
        slope,
        sums.log_sum,
        sums.losses,
        *factors,
        *negatives,
        share,
        filtered=negatives.threshold > 0,
        **own.constants,
    )


@triton.jit
def _own_row(products, inverses, places, rows, count, stride, row, length, block: tl.constexpr):
    """Cosines of a sample to the classes of its head, its sample, slot and the valid slots."""
    sample = tl.load(places + row)
    own = tl.load(places + rows + row)
    classes = tl.load(places + 3 * rows + row)
    head = row // count
    slot = tl.arange(0, block)
    position = head * stride + (row - head * count) * length + slot
    inverse = tl.load(inverses + head * length + slot, mask=slot < length, other=0.0)
    cosine = tl.load(products + position, mask=slot < length, other=0.0) * inverse
    return cosine, inverse, sample, own, (slot < classes) & (slot != own)


@triton.jit(do_not_specialize=["rows", "count", "stride"])
def _own_statistics_kernel(
    products,
    inverses,
    places,
    rows,
    count,
    stride,
    targets,
    log_sums,
    sample_log_sums,
    sample_targets,
    sample_highest,
    scale,
    threshold,
    filtered: tl.constexpr,
    length: tl.constexpr,
    block: tl.constexpr,
):
    """One program: a sample. Programs of repeated samples store what the others store."""
    row = tl.program_id(0).to(tl.int64)
    cosine, _, sample, own, other = _own_row(
        products, inverses, places, rows, count, stride, row, length, block
    )
    target = tl.sum(tl.where(tl.arange(0, block) == own, cosine, 0.0), 0)
    highest = tl.max(tl.where(other, cosine, float("-inf")), 0)
    z = negative_logits(tl.where(other, cosine * scale, float("-inf")), scale, threshold, filtered)
    peak = finite(tl.max(z, 0))
    log_sum = peak + tl.log(tl.sum(tl.exp(z - peak), 0))
    tl.store(targets + row, target)
    tl.store(log_sums + row, log_add(log_sum, tl.load(sample_log_sums + sample)))
    tl.store(sample_targets + sample, target)
    tl.store(sample_highest + sample, tl.maximum(highest, tl.load(sample_highest + sample)))


@triton.jit(do_not_specialize=["rows", "count", "stride"])
def _own_weights_kernel(
    products,
    inverses,
    places,
    rows,
    count,
    stride,
    log_sums,
    with_margins,
    slopes,
    sample_log_sums,
    sample_losses,
    weights,
    row_weights,
    radials,
    scale,
    threshold,
    share,
    filtered: tl.constexpr,
    length: tl.constexpr,
    block: tl.constexpr,
):
    """One program: a sample. Programs of repeated samples store what the others store."""
    row = tl.program_id(0).to(tl.int64)
    cosine, inverse, sample, own, other = _own_row(
        products, inverses, places, rows, count, stride, row, length, block
    )
    slot = tl.arange(0, block)
    with_margin = tl.load(with_margins + row)
    log_sum = log_add(tl.load(log_sums + row), with_margin)
    z = negative_logits(tl.where(other, cosine * scale, float("-inf")), scale, threshold, filtered)
    at_target = (tl.exp(with_margin - log_sum) - 1) * tl.load(slopes + row)
    weight = tl.where(slot == own, at_target, tl.exp(z - log_sum)) * (inverse * scale)
    inside = slot < length
    tl.store(weights + row * length + slot, weight, mask=inside)
    factor = tl.load(places + 2 * rows + row) * length + slot
    tl.store(row_weights + factor, weight * share, mask=inside)
    tl.store(radials + factor, -cosine * weight * share * inverse, mask=inside)
    tl.store(sample_log_sums + sample, log_sum)
    tl.store(sample_losses + sample, log_sum - with_margin)
