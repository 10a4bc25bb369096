"""Softmax over the extra heads' unit rows in which logits live in tiles alone.

`mhe_dist.heads.routed.softmax` is the definition. The forward pass keeps a running log-sum-exp; the
backward passes make the logits of a tile again. Nothing of size samples x rows is stored: the rows
are cut into a fixed number of parts, and intermediates are a few sums per part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_SAMPLES = 16  # of a tile
_ROWS = 32
_COLUMNS = 64
_LOG_SUM_PARTS = 64  # of the rows; each is a program of its own for each tile of samples
_GRADIENT_PARTS = 8


class Targets(NamedTuple):
    """The targets of samples, as the passes need them.

    Attributes:
        column: int64 `[n]`, the row of the sample's own class; -1: its head is not among the rows.
        logit: `[n]`, the target's logit with its margin; anything where there is no column.
        slope: `[n]`, derivative of the margin with respect to the cosine.
        offset: `[n]`, added to the logits of the other heads' rows (the sampling correction).
        head: rows of a head; those of a sample's own head get no offset.
    """

    column: Tensor
    logit: Tensor
    slope: Tensor
    offset: Tensor
    head: int


class RowSet(NamedTuple):
    """What the samples are scored against.

    Attributes:
        rows: float32 `[R, D]`, normalised already where the margin wants that.
        hidden: bool `[R]`, True at padding; None: all rows are classes.
        scale: s, of the logits.
        filter: cosine above which a negative does not count; 0: all count.
    """

    rows: Tensor
    hidden: Tensor | None
    scale: float
    filter: float = 0.0


def extra_log_sum(features: Tensor, rows: RowSet, targets: Targets) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each sample's logits `[n]`, and the highest cosine of its negatives `[n]`.

    The filter and the offsets do not change that cosine. Without a row that counts, both are -inf.

    Args:
        features: float32 `[n, D]`.
        rows: the rows of the extra heads.
        targets: of the samples.
    """
    count, total = len(features), len(rows.rows)
    parts, split = _parts(total, _LOG_SUM_PARTS)
    partial = features.new_full((3, parts, count), float("-inf"))
    if count and total:
        _log_sum_kernel[(triton.cdiv(count, _SAMPLES), parts)](
            *_arguments(features, rows, targets),
            split,
            partial,
            **_constants(features, rows, targets),
        )
    peak, log_total, highest = partial
    return torch.logsumexp(peak + log_total, 0), highest.amax(0)


def feature_gradient(features: Tensor, rows: RowSet, targets: Targets, log_sum: Tensor) -> Tensor:
    """Gradient of the sum of the losses with respect to the features, `[n, D]`.

    Args:
        features, rows, targets: as for `extra_log_sum`.
        log_sum: `[n]`, over all classes that a sample sees, those beyond these rows included.
    """
    count, total = len(features), len(rows.rows)
    parts, split = _parts(total, _GRADIENT_PARTS)
    partial = features.new_zeros(parts, *features.shape)
    if count and total:
        blocks = triton.cdiv(features.shape[1], _COLUMNS)
        _feature_gradient_kernel[(triton.cdiv(count, _SAMPLES), parts, blocks)](
            *_arguments(features, rows, targets),
            split,
            log_sum.contiguous(),
            partial,
            **_constants(features, rows, targets),
        )
    return partial.sum(0)


def row_gradient(features: Tensor, rows: RowSet, targets: Targets, log_sum: Tensor) -> Tensor:
    """Gradient of the sum of the losses with respect to the rows as given, `[R, D]`.

    Samples are summed in their order; see `feature_gradient` for the arguments.
    """
    gradient = torch.zeros_like(rows.rows)
    if len(features) and len(rows.rows):
        blocks = triton.cdiv(features.shape[1], _COLUMNS)
        _row_gradient_kernel[(triton.cdiv(len(rows.rows), _ROWS), blocks)](
            *_arguments(features, rows, targets),
            log_sum.contiguous(),
            gradient,
            **_constants(features, rows, targets),
        )
    return gradient


def _parts(total: int, limit: int) -> tuple[int, int]:
    """How many parts the rows are cut into, and the rows of each."""
    split = max(1, triton.cdiv(total, limit * _ROWS)) * _ROWS
    return max(1, triton.cdiv(total, split)), split


def _arguments(features: Tensor, rows: RowSet, targets: Targets) -> tuple[Tensor | float, ...]:
    hidden = rows.rows if rows.hidden is None else rows.hidden.to(torch.int8)
    parts = (features, rows.rows, hidden, *targets[:4])
    return (*(part.contiguous() for part in parts), len(features), len(rows.rows), rows.scale)


def _constants(features: Tensor, rows: RowSet, targets: Targets) -> dict[str, int | float | bool]:
    return {
        "threshold": rows.filter,
        "head": targets.head,
        "width": features.shape[1],
        "has_hidden": rows.hidden is not None,
        "samples": _SAMPLES,
        "tile": _ROWS,
        "columns": _COLUMNS,
    }


@triton.jit
def _load_block(pointer, index, total, first, width: tl.constexpr, block: tl.constexpr):
    """Columns from `first` on of some rows of a matrix, zero beyond its end."""
    column = first + tl.arange(0, block)
    mask = (index < total)[:, None] & (column < width)[None, :]
    return tl.load(pointer + index.to(tl.int64)[:, None] * width + column[None, :], mask, other=0.0)


@triton.jit
def _cosines(
    features,
    rows,
    sample,
    row,
    count,
    row_count,
    width: tl.constexpr,
    samples: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    """Products of a tile's features and rows, summed over blocks of columns."""
    total = tl.zeros([samples, tile], tl.float32)
    for first in range(0, width, block):
        e = _load_block(features, sample, count, first, width, block)
        w = _load_block(rows, row, row_count, first, width, block)
        total += tl.dot(e, tl.trans(w), input_precision="ieee")
    return total


@triton.jit
def _logits(
    cosine,
    row,
    row_count,
    hidden_pointer,
    column,
    target,
    offset,
    scale,
    threshold: tl.constexpr,
    head: tl.constexpr,
    has_hidden: tl.constexpr,
):
    """Logits of a tile with targets, filter and offsets; cosines with neither targets nor padding.

    -inf stands at what does not count. Also says where the targets are.
    """
    seen = row < row_count
    if has_hidden:
        seen = seen & (tl.load(hidden_pointer + row, mask=seen, other=1) == 0)
    is_target = row[None, :] == column[:, None]
    logits = cosine * scale
    own_head = (column >= 0)[:, None] & ((row // head)[None, :] == (column // head)[:, None])
    logits += tl.where(own_head, 0.0, offset[:, None])
    if threshold > 0:
        logits = tl.where(cosine > threshold, float("-inf"), logits)
    logits = tl.where(seen[None, :], logits, float("-inf"))
    logits = tl.where(is_target, target[:, None], logits)
    negatives = tl.where(seen[None, :] & (is_target == 0), cosine, float("-inf"))
    return logits, negatives, is_target


@triton.jit
def _log_sum_kernel(
    features,
    rows,
    hidden,
    columns_of,
    targets_of,
    slopes_of,
    offsets_of,
    count,
    row_count,
    scale,
    split,
    partial,
    threshold: tl.constexpr,
    head: tl.constexpr,
    width: tl.constexpr,
    has_hidden: tl.constexpr,
    samples: tl.constexpr,
    tile: tl.constexpr,
    columns: tl.constexpr,
):
    """One program: some samples against `split` rows."""
    sample = tl.program_id(0) * samples + tl.arange(0, samples)
    inside = sample < count
    column = tl.load(columns_of + sample, mask=inside, other=-1)
    target = tl.load(targets_of + sample, mask=inside, other=0.0)
    offset = tl.load(offsets_of + sample, mask=inside, other=0.0)
    peak = tl.full([samples], float("-inf"), tl.float32)
    total = tl.full([samples], 0.0, tl.float32)
    highest = tl.full([samples], float("-inf"), tl.float32)
    first = tl.program_id(1) * split
    for start in range(first, tl.minimum(first + split, row_count), tile):
        row = start + tl.arange(0, tile)
        cosine = _cosines(
            features, rows, sample, row, count, row_count, width, samples, tile, columns
        )
        logits, negatives, _ = _logits(
            cosine,
            row,
            row_count,
            hidden,
            column,
            target,
            offset,
            scale,
            threshold=threshold,
            head=head,
            has_hidden=has_hidden,
        )
        highest = tl.maximum(highest, tl.max(negatives, 1))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        peak = new_peak
    size = tl.num_programs(1) * count
    at = partial + tl.program_id(1) * count + sample
    tl.store(at, peak, mask=inside)
    tl.store(at + size, tl.log(total), mask=inside)
    tl.store(at + 2 * size, highest, mask=inside)


@triton.jit
def _dlogits(logits, is_target, log_sum, slope, scale):
    """Derivative of the losses with respect to the cosines of a tile."""
    p = tl.exp(logits - log_sum[:, None])
    return tl.where(is_target, (p - 1.0) * slope[:, None], p) * scale


@triton.jit
def _feature_gradient_kernel(
    features,
    rows,
    hidden,
    columns_of,
    targets_of,
    slopes_of,
    offsets_of,
    count,
    row_count,
    scale,
    split,
    log_sums,
    partial,
    threshold: tl.constexpr,
    head: tl.constexpr,
    width: tl.constexpr,
    has_hidden: tl.constexpr,
    samples: tl.constexpr,
    tile: tl.constexpr,
    columns: tl.constexpr,
):
    """One program: some samples against `split` rows, for a block of the gradient's columns."""
    sample = tl.program_id(0) * samples + tl.arange(0, samples)
    inside = sample < count
    column = tl.load(columns_of + sample, mask=inside, other=-1)
    target = tl.load(targets_of + sample, mask=inside, other=0.0)
    slope = tl.load(slopes_of + sample, mask=inside, other=0.0)
    offset = tl.load(offsets_of + sample, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + sample, mask=inside, other=0.0)
    gradient = tl.zeros([samples, columns], tl.float32)
    first = tl.program_id(1) * split
    for start in range(first, tl.minimum(first + split, row_count), tile):
        row = start + tl.arange(0, tile)
        cosine = _cosines(
            features, rows, sample, row, count, row_count, width, samples, tile, columns
        )
        logits, _, is_target = _logits(
            cosine,
            row,
            row_count,
            hidden,
            column,
            target,
            offset,
            scale,
            threshold=threshold,
            head=head,
            has_hidden=has_hidden,
        )
        q = _dlogits(logits, is_target, log_sum, slope, scale)
        w = _load_block(rows, row, row_count, tl.program_id(2) * columns, width, columns)
        gradient += tl.dot(q, w, input_precision="ieee")
    d = tl.program_id(2) * columns + tl.arange(0, columns)
    at = (tl.program_id(1) * count + sample).to(tl.int64)[:, None] * width + d[None, :]
    tl.store(partial + at, gradient, mask=inside[:, None] & (d < width)[None, :])


@triton.jit
def _row_gradient_kernel(
    features,
    rows,
    hidden,
    columns_of,
    targets_of,
    slopes_of,
    offsets_of,
    count,
    row_count,
    scale,
    log_sums,
    gradient_of,
    threshold: tl.constexpr,
    head: tl.constexpr,
    width: tl.constexpr,
    has_hidden: tl.constexpr,
    samples: tl.constexpr,
    tile: tl.constexpr,
    columns: tl.constexpr,
):
    """One program: some rows against all samples in their order, for a block of columns."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    gradient = tl.zeros([tile, columns], tl.float32)
    for start in range(0, count, samples):
        sample = start + tl.arange(0, samples)
        inside = sample < count
        column = tl.load(columns_of + sample, mask=inside, other=-1)
        target = tl.load(targets_of + sample, mask=inside, other=0.0)
        slope = tl.load(slopes_of + sample, mask=inside, other=0.0)
        offset = tl.load(offsets_of + sample, mask=inside, other=0.0)
        log_sum = tl.load(log_sums + sample, mask=inside, other=float("inf"))
        cosine = _cosines(
            features, rows, sample, row, count, row_count, width, samples, tile, columns
        )
        logits, _, is_target = _logits(
            cosine,
            row,
            row_count,
            hidden,
            column,
            target,
            offset,
            scale,
            threshold=threshold,
            head=head,
            has_hidden=has_hidden,
        )
        q = _dlogits(logits, is_target, log_sum, slope, scale)
        e = _load_block(features, sample, count, tl.program_id(1) * columns, width, columns)
        gradient += tl.dot(tl.trans(q), e, input_precision="ieee")
    d = tl.program_id(1) * columns + tl.arange(0, columns)
    at = row.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(gradient_of + at, gradient, mask=(row < row_count)[:, None] & (d < width)[None, :])
