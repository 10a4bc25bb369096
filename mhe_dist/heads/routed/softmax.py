"""Softmax cross-entropy of routed samples over their own head and their group's extra heads.

All in closed form: with `z = s * cos` (the margin applied to the target), `p = softmax(z)` and
`dcos = s * (p - onehot) * dphi` at the target, the gradient of a unit embedding is
`sum_j dcos_j w_j / |w_j|`, and that of a row is `a^T e + b * w` with `a = dcos / |w|` and
`b = -sum dcos * cos / |w|^2` (the normalisation's projection).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.batch_invariant import log_add_exp, product
from mhe_dist.heads.class_rows import ClassRows, hide
from mhe_dist.heads.grouping import Chunk, GradientFactors
from mhe_dist.heads.margins import Margin, keep_negatives
from mhe_dist.heads.routed.dispatch import Dispatch, GroupPart
from mhe_dist.heads.routed.extra_gradient import ExtraGradient, ExtraGradients
from mhe_dist.sizes import LOGITS_BYTES


@dataclass(frozen=True)
class RoutedBatch:
    """One micro-batch of all ranks, as the rank that owns the heads scores it.

    Attributes:
        class_rows: the rows of this rank.
        features: `[n, D]` in the sorted order of `dispatch`.
        norms: of the embeddings `[n]`, for margins that depend on them.
        dispatch: which samples are here.
        chunks: the own heads among them; `index` counts in `dispatch.own`.
        extra: extra heads of each group.
        sums: where the gradient of the extra rows is added; None: it is not wanted.
        share: scale of the rows' gradient, `1 / N`.
        correction: whether `log(1 / q)` is added to sampled negatives.
    """

    class_rows: ClassRows
    features: Tensor
    norms: Tensor | None
    dispatch: Dispatch
    chunks: list[Chunk]
    extra: dict[int, Tensor]
    sums: ExtraGradients | None
    share: float
    correction: bool

    @property
    def parts(self) -> list[GroupPart]:
        """The groups that have samples here and extra heads."""
        return [part for part in self.dispatch.groups if part.size and len(self.extra[part.group])]


class RoutedScores(NamedTuple):
    """What the samples of one dispatch lead to.

    Attributes:
        losses: `[n]` of the samples in sorted order.
        gradient: of the sum of the losses with respect to the features `[n, D]`.
        correct: `[n]`, 1 where the target has a higher cosine than every other class seen.
        own: the gradient of the rows of own heads, scaled by `share`.
    """

    losses: Tensor
    gradient: Tensor
    correct: Tensor
    own: GradientFactors


@dataclass
class _Samples:
    """What is known of the samples, in sorted order, while chunks of rows are read.

    `highest` is the highest cosine of classes other than the target: were the target among them, a
    network that gives every image the same embedding would score as perfect.
    """

    features: Tensor
    norms: Tensor | None
    losses: Tensor
    gradient: Tensor
    log_sum: Tensor
    target: Tensor
    highest: Tensor

    @staticmethod
    def of(features: Tensor, norms: Tensor | None) -> _Samples:
        """Before any row."""
        lowest = features.new_full((len(features),), float("-inf"))
        zero = torch.zeros_like(lowest)
        return _Samples(
            features,
            norms,
            zero,
            torch.zeros_like(features),
            lowest,
            lowest.clone(),
            lowest.clone(),
        )

    def correct(self) -> Tensor:
        """`[n]`, see `RoutedScores`."""
        return (self.target > self.highest).to(self.features.dtype)

    def norms_of(self, index: Tensor) -> Tensor | None:
        """Norms of some samples, where norms are needed."""
        return None if self.norms is None else self.norms[index]


def routed_softmax(batch: RoutedBatch) -> RoutedScores:
    """Score one micro-batch of all ranks on the rank that owns the heads."""
    samples, dispatch = _Samples.of(batch.features, batch.norms), batch.dispatch
    parts = [
        _ExtraPart(batch.class_rows, samples, part, batch.extra[part.group], batch.correction)
        for part in batch.parts
    ]
    for part in parts:
        part.normalise()
    own = _score_own(batch, samples)
    for part in parts:
        gradient = None if batch.sums is None else batch.sums[part.group]
        part.finish(gradient, dispatch.sample_numbers, batch.share)
    return RoutedScores(samples.losses, samples.gradient, samples.correct(), own)


def _score_own(batch: RoutedBatch, samples: _Samples) -> GradientFactors:
    """Samples against their own heads, chunk by chunk, each row read once."""
    class_rows, dispatch = batch.class_rows, batch.dispatch
    device, scale = samples.features.device, class_rows.margin.scale
    own = to_device(dispatch.own, device)
    slots = to_device(dispatch.slots, device)
    weights = samples.features.new_empty(len(dispatch.own), class_rows.layout.length)
    radial = torch.empty_like(weights)
    for chunk in batch.chunks:
        position = to_device(chunk.index, device)
        index = own[position]
        rows, inverse = class_rows.read(chunk.heads)
        inverse = inverse.unsqueeze(1)
        padding = class_rows.padding(chunk.heads)
        cosine = product(samples.features[index], rows.transpose(1, 2)).mul_(inverse)
        slot = slots[index].unsqueeze(-1)
        target = cosine.gather(-1, slot).squeeze(-1)
        phi, slope = class_rows.target(target, samples.norms_of(index))
        logits = _logits(class_rows.margin, cosine, padding)
        logits.scatter_(-1, slot, phi.unsqueeze(-1) * scale)
        log_sum = log_add_exp(logits.logsumexp(-1), samples.log_sum[index])
        highest = hide_padding(cosine.scatter_(-1, slot, float("-inf")), padding).amax(-1)
        cosine.scatter_(-1, slot, target.unsqueeze(-1))
        p = logits.sub_(log_sum.unsqueeze(-1)).exp_()
        at_target = (p.gather(-1, slot) - 1) * slope.unsqueeze(-1)
        weight = p.scatter_(-1, slot, at_target).mul_(inverse * scale)
        samples.losses[index] = log_sum - phi * scale
        samples.log_sum[index], samples.target[index] = log_sum, target
        samples.highest[index] = torch.maximum(samples.highest[index], highest)
        samples.gradient[index] = product(weight, rows)
        weights[position] = weight.mul_(batch.share)
        radial[position] = cosine.mul_(weight).mul_(inverse).neg_()
    return GradientFactors(samples.features[own], weights, radial)


class _Exponentials(NamedTuple):
    """The extra logits of some samples, as the second pass needs them.

    Attributes:
        values: `exp(logits - peak)` `[n, m * L]`.
        peak: `[n]`.
        target, phi, slope: of the targets inside, the cosine, that with its margin, and its
            derivative.
    """

    values: Tensor
    peak: Tensor
    target: Tensor
    phi: Tensor
    slope: Tensor


class _ExtraPart:
    """The samples of one group against the group's extra heads, in two passes.

    The first finds each sample's normaliser over the extra heads, the second, when the own heads
    are known too, forms the gradients. Rows are normalised and embeddings scaled before they are
    multiplied, so that the passes over `[n, m * L]` are few.
    """

    def __init__(
        self,
        class_rows: ClassRows,
        samples: _Samples,
        part: GroupPart,
        heads: Tensor,
        correction: bool,
    ) -> None:
        self.class_rows, self.samples, self.correction = class_rows, samples, correction
        self.part, self.group, self.count = part, part.group, len(heads)
        self.scale = class_rows.margin.scale
        padding = class_rows.padding(heads)
        self.padding = None if padding is None else padding.view(-1)
        self.rows = class_rows.read_unit_rows(heads).flatten(0, 1)
        row_bytes = len(self.rows) * self.rows.element_size()
        self.slice = max(1, LOGITS_BYTES // (4 * row_bytes))
        kept = (part.samples.stop - part.samples.start) * row_bytes <= LOGITS_BYTES
        self.kept: dict[int, _Exponentials] | None = {} if kept else None

    def normalise(self) -> None:
        """First pass: log-sum-exp and highest cosine over the extra heads."""
        samples, scale = self.samples, self.scale
        for where, inside, column in self._slices():
            found, highest = self._exponentials(where, inside, column)
            samples.log_sum[where] = found.values.sum(-1).log_().add_(found.peak)
            samples.highest[where] = highest / scale
            targets = inside + where.start
            samples.target[targets] = found.target
            samples.losses[targets] = samples.log_sum[targets] - found.phi * scale
            if self.kept is not None:
                self.kept[where.start] = found

    def finish(self, gradient: ExtraGradient | None, sample_numbers: Tensor, share: float) -> None:
        """Second pass: the samples' gradient, and for `gradient` that of the extra rows.

        Args:
            gradient: where that of the normalised rows is added; None: it is not wanted.
            sample_numbers: canonical numbers of all samples here `[n]`, host.
            share: scale of the rows' gradient.
        """
        samples, scale = self.samples, self.scale
        for where, inside, column in self._slices():
            if self.kept is None:
                found, _ = self._exponentials(where, inside, column)
            else:
                found = self.kept.pop(where.start)
            p = found.values.mul_((found.peak - samples.log_sum[where]).exp_().unsqueeze(-1))
            p[inside, column] = (p[inside, column] - 1) * found.slope
            samples.gradient[where] += product(p, self.rows).mul_(scale)
            if gradient is not None:
                gradient.add(sample_numbers[where], p, samples.features[where] * (scale * share))

    def _slices(self) -> list[tuple[slice, Tensor, Tensor]]:
        """Slices of the samples, with who has its own head among the extra ones, and where."""
        part, device = self.part, self.rows.device
        slices = []
        for start in range(part.samples.start, part.samples.stop, self.slice):
            stop = min(start + self.slice, part.samples.stop)
            inside = part.inside + part.samples.start
            held = (inside >= start) & (inside < stop)
            index = to_device(inside[held] - start, device)
            column = to_device(part.column[held], device)
            slices.append((slice(start, stop), index, column))
        return slices

    def _exponentials(
        self, where: slice, inside: Tensor, column: Tensor
    ) -> tuple[_Exponentials, Tensor]:
        """The exponentials of some samples, and the highest logit `[n]` of the other classes."""
        class_rows, scale = self.class_rows, self.scale
        features = self.samples.features[where] * scale
        logits = hide_padding(product(features, self.rows.T), self.padding, in_place=True)
        scaled = logits[inside, column]
        hide(logits, (inside, column))
        highest = logits.amax(-1)
        target = scaled / scale
        phi, slope = class_rows.target(target, self.samples.norms_of(inside + where.start))
        with_margin, peak = phi * scale, highest
        threshold = class_rows.margin.filter
        if threshold:
            logits.masked_fill_(~keep_negatives(logits / scale, threshold), float("-inf"))
        if self.correction:
            self._correct(logits, inside, column)
        if threshold or self.correction:
            # The filter may drop all of them, and -inf less -inf is no number.
            peak = logits.amax(-1).clamp_min_(torch.finfo(logits.dtype).min)
        logits[inside, column] = with_margin
        # Of what is summed up alone: below the cosine without margin all may vanish.
        peak = peak.index_put((inside,), torch.maximum(peak[inside], with_margin))
        values = logits.sub_(peak.unsqueeze(-1)).exp_()
        return _Exponentials(values, peak, target, phi, slope), highest

    def _correct(self, logits: Tensor, inside: Tensor, column: Tensor) -> None:
        """Add `log(1 / q)` to sampled negatives; q is the share of the other heads that is seen."""
        layout = self.class_rows.layout
        others, seen = max(1, layout.heads - 1), max(1, self.count - 1)
        by_head = logits.view(len(logits), self.count, -1)
        by_head += math.log(others / self.count)
        by_head[inside] += math.log(self.count / seen)
        by_head[inside, column // layout.length] -= math.log(others / seen)


def _logits(margin: Margin, cosine: Tensor, padding: Tensor | None) -> Tensor:
    """Scaled cosines `[..., L]`; padding and the negatives that the filter drops at -inf."""
    logits = cosine * margin.scale
    if threshold := margin.filter:
        logits.masked_fill_(~keep_negatives(cosine, threshold), float("-inf"))
    return hide_padding(logits, padding, in_place=True)


def hide_padding(values: Tensor, padding: Tensor | None, in_place: bool = False) -> Tensor:
    """`values` `[..., L]` with -inf at padding slots `[L]` or `[T, L]` (of `[T, c, L]`)."""
    if padding is None:
        return values
    mask = padding if padding.dim() == 1 else padding.unsqueeze(1)
    fill = values.masked_fill_ if in_place else values.masked_fill
    return fill(mask, float("-inf"))
