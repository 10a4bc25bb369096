"""Softmax over a sample's extra heads, its target perhaps among them: two passes over the logits.

The first finds what the margin and the normaliser need, the second puts the derivatives in the
logits' place; nothing else of their size is stored.

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
from mhe_dist.kernels.negatives import Negatives, finite, negative_logits

_TILE = 2048  # logits that a program holds at a time


class TargetStatistics(NamedTuple):
    """What the first pass finds, of each sample.

    Attributes:
        target: cosine of the target, without margin; 0 if it is elsewhere.
        highest: highest cosine of the other classes, dropped ones too; -inf if there are none.
        log_sum: log-sum-exp of the other classes' logits; -inf if there are none.
    """

    target: Tensor
    highest: Tensor
    log_sum: Tensor


class ExtraTable(NamedTuple):
    """Where each sample's logits over the extra heads lie in one buffer.

    Attributes:
        places: int64 `[4, n]` on the device: the first logit, how many are stored, how many of
            these stand for a class (the first ones), and the column of the target, -1: elsewhere.
        offsets: `[n]`, what is added to logits of heads other than the target's; None: nothing.
        length: L, classes of a head.
        widest: most logits of a sample.
        nbytes: of all logits.
    """

    places: Tensor
    offsets: Tensor | None
    length: int
    widest: int
    nbytes: int


def extra_statistics(logits: Tensor, table: ExtraTable, negatives: Negatives) -> TargetStatistics:
    """First pass over the extra heads; `logits` are scaled cosines, float32, in one buffer."""
    count = table.places.shape[1]
    target, highest, log_sum = logits.new_empty(3, count)
    if count:
        dispatch.launch(
            _extra_statistics_kernel,
            (count,),
            KernelTraffic(table.nbytes + table.places.nbytes, 3 * target.nbytes),
            logits,
            table.places,
            table.places if table.offsets is None else table.offsets,
            target,
            highest,
            log_sum,
            count,
            table.widest,
            *negatives,
            **_extra_constants(table, negatives),
        )
    return TargetStatistics(target, highest, log_sum)


def extra_weights(
    logits: Tensor,
    table: ExtraTable,
    negatives: Negatives,
    log_sum: Tensor,
    with_margin: Tensor,
    slope: Tensor,
) -> None:
    """Second pass over the extra heads: derivatives with respect to logits take their place.

    Args:
        logits, table, negatives: as in the first pass.
        log_sum: `[n]`, over all classes of each sample.
        with_margin: `[n]`, the target's logit.
        slope: `[n]`, the derivative of the margin.
    """
    count = table.places.shape[1]
    if not count or not table.widest:
        return
    constants = _extra_constants(table, negatives)
    dispatch.launch(
        _extra_weights_kernel,
        (count, triton.cdiv(table.widest, constants["block"])),
        KernelTraffic(table.nbytes + table.places.nbytes + 3 * slope.nbytes, table.nbytes),
        logits,
        table.places,
        table.places if table.offsets is None else table.offsets,
        log_sum,
        with_margin,
        slope,
        count,
        *negatives,
        **constants,
    )


def _extra_constants(table: ExtraTable, negatives: Negatives) -> dict[str, int | bool]:
    return {
        "length": table.length,
        "filtered": negatives.threshold > 0,
        "corrected": table.offsets is not None,
        "block": max(16, min(_TILE, triton.next_power_of_2(table.widest))),
    }


@triton.jit
def _offset(pointer, column, own, length: tl.constexpr):
    """What is added to logits of heads other than the target's."""
    elsewhere = (own < 0) | (column // length != own // length)
    return tl.where(elsewhere, tl.load(pointer), 0.0)


@triton.jit(do_not_specialize=["count", "widest"])
def _extra_statistics_kernel(
    logits,
    places,
    offsets,
    targets,
    highests,
    log_sums,
    count,
    widest,
    scale,
    threshold,
    length: tl.constexpr,
    filtered: tl.constexpr,
    corrected: tl.constexpr,
    block: tl.constexpr,
):
    """One program: all logits of a sample."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.load(places + sample)
    classes = tl.load(places + 2 * count + sample)
    own = tl.load(places + 3 * count + sample)
    highest = tl.full([block], float("-inf"), tl.float32)
    peak = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, widest, block):
        column = start + tl.arange(0, block)
        other = (column < classes) & (column != own)
        z = tl.load(logits + first + column, mask=other, other=float("-inf"))
        highest = tl.maximum(highest, z)
        z = negative_logits(z, scale, threshold, filtered)
        if corrected:
            z += _offset(offsets + sample, column, own, length)
        higher = tl.maximum(peak, z)
        total = total * tl.exp(peak - finite(higher)) + tl.exp(z - finite(higher))
        peak = higher
    top = tl.max(peak, 0)
    total_sum = tl.sum(total * tl.exp(peak - finite(top)), 0)
    target = tl.load(logits + first + own, mask=own >= 0, other=0.0)
    tl.store(targets + sample, tl.div_rn(target, scale))
    tl.store(highests + sample, tl.div_rn(tl.max(highest, 0), scale))
    tl.store(log_sums + sample, finite(top) + tl.log(total_sum))


@triton.jit(do_not_specialize=["count"])
def _extra_weights_kernel(
    logits,
    places,
    offsets,
    log_sums,
    with_margins,
    slopes,
    count,
    scale,
    threshold,
    length: tl.constexpr,
    filtered: tl.constexpr,
    corrected: tl.constexpr,
    block: tl.constexpr,
):
    """One program: some logits of a sample."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.load(places + sample)
    stored = tl.load(places + count + sample)
    classes = tl.load(places + 2 * count + sample)
    own = tl.load(places + 3 * count + sample)
    log_sum = tl.load(log_sums + sample)
    column = tl.program_id(1) * block + tl.arange(0, block)
    z = tl.load(logits + first + column, mask=column < classes, other=float("-inf"))
    z = negative_logits(z, scale, threshold, filtered)
    if corrected:
        z += _offset(offsets + sample, column, own, length)
    at_target = (tl.exp(tl.load(with_margins + sample) - log_sum) - 1) * tl.load(slopes + sample)
    p = tl.where(column == own, at_target, tl.exp(z - log_sum))
    tl.store(logits + first + column, p, mask=column < stored)
