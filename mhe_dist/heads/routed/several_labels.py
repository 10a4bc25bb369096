"""Losses of routed samples with several labels: the sums of their heads travel, not the rows.

The rank that owns a head or a group sums up the negatives in it, as if they were all. The sums of
a sample's heads and groups go to its own rank, which joins them, forms the loss (see
`mhe_dist.heads.objectives`) and answers with its derivatives. Of a negative that is
`push * exp(z_j - S)`. So what the owner has formed of `exp(z_j - peak)`, the gradients among it,
needs but one factor for each sample and head: each row is read once.

The gradient of an embedding is a sum over heads, groups and ranks. It is added up in float64 on a
grid that makes sums exact, so that it depends neither on the order nor on W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.batch_invariant import product
from mhe_dist.heads.class_rows import ClassRows, hide
from mhe_dist.heads.grouping import Chunk, GradientFactors
from mhe_dist.heads.margins import keep_negatives
from mhe_dist.heads.objectives import LabelObjective
from mhe_dist.heads.routed.extra_gradient import ExtraGradient, ExtraGradients
from mhe_dist.heads.routed.label_dispatch import GroupVisits, LabelDispatch, Meetings
from mhe_dist.heads.routed.softmax import hide_padding
from mhe_dist.sizes import LOGITS_BYTES

# float64 counts multiples of this exactly up to 512, far above the entries of a gradient.
GRID: Final = 2.0**-44


def grid_counts(values: Tensor) -> Tensor:
    """How many times `GRID` each of `values` is, rounded, in float64: sums are exact in any order.

    `values` are overwritten. They are scaled by a power of two, so nothing is rounded before.
    """
    return values.mul_(1 / GRID).round_().double()


class JoinedLosses(NamedTuple):
    """What a rank finds for its own samples.

    Attributes:
        losses: `[B]`.
        correct: `[B]`, 1 where a label has a higher cosine than every class that is none.
        answer: `[t, 2]` for each of their labels, in the order of `LabelDispatch.labels`: with
            `shift` of its sample, negatives have the derivative `exp(z_j - shift)`; and the pull.
    """

    losses: Tensor
    correct: Tensor
    answer: Tensor


def join_labels(
    sums: Tensor, dispatch: LabelDispatch, index: Tensor, objective: LabelObjective
) -> JoinedLosses:
    """Join the sums of all heads and groups of this rank's samples.

    Every table has the shape of the micro-batch, which does not depend on W, nor do its bits.

    Args:
        sums: `[t, 5]`, see `RoutedLabels.sums`, in the order of `dispatch.labels`.
        dispatch: whose labels they are.
        index: `dispatch.labels` on the device.
        objective: what is made of the sums.
    """
    lists = (dispatch.batch, dispatch.size)
    table = sums.new_full((dispatch.batch * dispatch.size, 5), float("-inf"))
    table[index] = sums
    negatives = table[:, :2].reshape(dispatch.batch, -1).logsumexp(1)
    highest, target, with_margin = (table[:, i].view(lists) for i in (2, 3, 4))
    mask = with_margin > float("-inf")
    found = objective(negatives, with_margin.masked_fill(~mask, 0), mask)
    shift = (negatives - found.push.log()).masked_fill(found.push == 0, float("inf"))
    answer = torch.stack([shift.unsqueeze(1).expand(lists), found.pull], dim=-1)
    correct = (target.amax(1) > highest.amax(1)).to(sums.dtype)
    return JoinedLosses(found.losses, correct, answer.view(-1, 2)[index])


class LabelGradients(NamedTuple):
    """Gradients of the sum of the losses.

    Attributes:
        features: of what arrived `[n, D]`, float64, as multiples of `GRID`.
        own: of the rows of own heads, scaled by `share`.
    """

    features: Tensor
    own: GradientFactors


@dataclass
class _Sums:
    """What is known of pairs or visits `[p]`.

    Attributes:
        samples: the sample of each.
        log_sum, highest: of its negatives, with one entry more that stands for no pair.
        peak: what was taken from the logits before they were exponentiated.
        gradient: of the features `[p, D]`, to be multiplied with `exp(peak - shift)`.
    """

    samples: Tensor
    log_sum: Tensor
    highest: Tensor
    peak: Tensor
    gradient: Tensor

    @staticmethod
    def of(meetings: Meetings, features: Tensor) -> _Sums:
        """Nothing is known yet."""
        count = len(meetings.units)
        lowest = features.new_full((count + 1,), float("-inf"))
        return _Sums(
            to_device(meetings.samples, features.device),
            lowest,
            lowest.clone(),
            features.new_zeros(count),
            features.new_zeros(count, features.shape[1]),
        )

    def exponentiate(self, where: slice | Tensor, logits: Tensor, highest: Tensor) -> Tensor:
        """Store the sums of `logits` `[..., L]` of negatives, -inf for none, and return `exp`.

        Args:
            where: which pairs or visits they are of.
            logits: overwritten.
            highest: their highest cosines.
        """
        peak = logits.amax(-1).clamp_min_(torch.finfo(logits.dtype).min)
        values = logits.sub_(peak.unsqueeze(-1)).exp_()
        self.log_sum[where] = values.sum(-1).log_().add_(peak)
        self.highest[where], self.peak[where] = highest, peak
        return values


class RoutedLabels:
    """The labels that arrived on a rank, against its rows, in two passes.

    Args:
        class_rows: the rows of this rank.
        features: `[n, D]` of the samples that arrived.
        norms: of their embeddings `[n]`, for margins that depend on them.
        dispatch: who they are.
        chunks: the own heads; `index` counts in `dispatch.pairs`.
        extra: extra heads of each group.
        with_grad: whether the second pass follows.
    """

    def __init__(
        self,
        class_rows: ClassRows,
        features: Tensor,
        norms: Tensor | None,
        dispatch: LabelDispatch,
        chunks: list[Chunk],
        extra: dict[int, Tensor],
        with_grad: bool,
    ) -> None:
        self.class_rows, self.dispatch, self.with_grad = class_rows, dispatch, with_grad
        self.features, self.norms = features, norms
        self.device, self.scale = features.device, class_rows.margin.scale
        self.pairs = _Sums.of(dispatch.pairs, features)
        self.visits = _Sums.of(dispatch.visits, features)
        self.label_samples = to_device(dispatch.label_samples, self.device)
        count, length = len(dispatch.slots), class_rows.layout.length
        self.target = features.new_zeros(count)
        self.with_margin, self.slope = torch.zeros_like(self.target), torch.zeros_like(self.target)
        self.unit_rows = features.new_zeros(count, features.shape[1])
        self.inverse = torch.zeros_like(self.target)
        self.weights = features.new_empty(len(dispatch.pairs.units), length)
        self.radial = torch.empty_like(self.weights)
        self.offsets = None
        if dispatch.offsets is not None:
            self.offsets = to_device(dispatch.offsets.to(features.dtype), self.device)
        self._labels = dispatch.pairs.table()
        for chunk in chunks:
            self._score_own(chunk)
        self._score_extras(extra)

    def sums(self) -> Tensor:
        """What a sample's rank must know of each arrived label `[T, 5]`.

        Log-sum-exp of the negatives of its own head, and of its group's extra heads, each given by
        the first of the sample's labels in them and -inf by the others; the highest cosine among
        these negatives; the label's cosine, and its logit with the margin.
        """
        count = len(self.dispatch.slots)
        pair = to_device(self.dispatch.pairs.source(count), self.device)
        visit = to_device(self.dispatch.visits.source(count), self.device)
        highest = torch.maximum(self.pairs.highest[pair], self.visits.highest[visit])
        own, extra = self.pairs.log_sum[pair], self.visits.log_sum[visit]
        return torch.stack([own, extra, highest, self.target, self.with_margin], dim=1)

    def gradients(self, answer: Tensor, sums: ExtraGradients, share: float) -> LabelGradients:
        """Second pass.

        Args:
            answer: of the arrived labels `[T, 2]`, see `JoinedLosses`.
            sums: where the gradient of the extra rows is added, by group.
            share: scale of the rows' gradient, `1 / N`.
        """
        shift, pull = answer.unbind(1)
        coefficient = pull * self.slope * -self.scale
        own = self._factors(self.dispatch.pairs, self.pairs, shift)
        extra = self._extra_gradients(shift, coefficient, sums, share)
        index = torch.cat([self.pairs.samples, self.visits.samples, self.label_samples])
        parts = torch.cat(
            [
                self.pairs.gradient.mul_(own.unsqueeze(1)),
                extra,
                self.unit_rows.mul_(coefficient.unsqueeze(1)),
            ]
        )
        gradient = torch.zeros(self.features.shape, dtype=torch.float64, device=self.device)
        gradient.index_add_(0, index, grid_counts(parts))
        return LabelGradients(gradient, self._own_factors(own, coefficient, share))

    def _factors(self, meetings: Meetings, sums: _Sums, shift: Tensor) -> Tensor:
        """`exp(peak - shift)` `[p]`."""
        first = to_device(meetings.first, self.device)
        return (sums.peak - shift[first]).exp_()

    def _own_factors(self, factor: Tensor, coefficient: Tensor, share: float) -> GradientFactors:
        """The gradient of own heads' rows, that of the labels' rows in its place."""
        pairs = self.dispatch.pairs
        label = to_device(pairs.labels, self.device)
        where = (
            to_device(pairs.of_labels, self.device),
            to_device(self.dispatch.slots[pairs.labels], self.device),
        )
        factor = (factor * share).unsqueeze(1)
        weight = coefficient[label] * self.inverse[label] * share
        self.weights.mul_(factor)[where] = weight
        self.radial.mul_(factor)[where] = -self.target[label] * weight * self.inverse[label]
        return GradientFactors(self.features[self.pairs.samples], self.weights, self.radial)

    def _score_own(self, chunk: Chunk) -> None:
        """First pass over the rows of some own heads."""
        rows, inverse = self.class_rows.read(chunk.heads)
        inverse = inverse.unsqueeze(1)
        index = to_device(chunk.index, self.device)
        features = self.features[self.pairs.samples[index]]
        cosine = product(features, rows.transpose(1, 2)).mul_(inverse)
        logits = hide_padding(
            cosine * self.scale, self.class_rows.padding(chunk.heads), in_place=True
        )
        self._store_targets(chunk, cosine, logits, rows, inverse)
        highest = logits.amax(-1) / self.scale
        if threshold := self.class_rows.margin.filter:
            logits.masked_fill_(~keep_negatives(cosine, threshold), float("-inf"))
        weight = self.pairs.exponentiate(index, logits, highest)
        if self.with_grad:
            weight = weight.mul_(inverse * self.scale)
            self.pairs.gradient[index] = product(weight, rows)
            self.weights[index] = weight
            self.radial[index] = cosine.mul_(weight).mul_(inverse).neg_()

    def _store_targets(
        self, chunk: Chunk, cosine: Tensor, logits: Tensor, rows: Tensor, inverse: Tensor
    ) -> None:
        """Store the labels of some own heads, and hide them among the logits."""
        table = self._labels[chunk.index]
        unit, member, each = (table >= 0).nonzero(as_tuple=True)
        labels = table[unit, member, each]
        there = (unit, member, self.dispatch.slots[labels], labels)
        unit, member, slot, label = (to_device(part, self.device) for part in there)
        hide(logits, (unit, member, slot))
        own_inverse = inverse.squeeze(1)[unit, slot]
        self.inverse[label] = own_inverse
        self._store(label, cosine[unit, member, slot], rows[unit, slot] * own_inverse.unsqueeze(1))

    def _store(self, label: Tensor, cosine: Tensor, unit_rows: Tensor) -> None:
        """Store cosines and normalised rows of some labels."""
        norms = None if self.norms is None else self.norms[self.label_samples[label]]
        phi, slope = self.class_rows.target(cosine, norms)
        self.target[label], self.slope[label] = cosine, slope
        self.with_margin[label], self.unit_rows[label] = phi * self.scale, unit_rows

    def _score_extras(self, extra: dict[int, Tensor]) -> None:
        """First pass over all extra rows."""
        parts = [_Visits(self, part, extra[part.group]) for part in self.dispatch.groups]
        self.parts = parts
        self._keep = self.with_grad and sum(part.nbytes for part in parts) <= LOGITS_BYTES
        self._kept: dict[tuple[int, int], Tensor] = {}
        for part in parts:
            for where in part.slices():
                self._score_extra(part, where)

    def _extra_gradients(
        self, shift: Tensor, coefficient: Tensor, sums: ExtraGradients, share: float
    ) -> Tensor:
        """Second pass over all extra rows: hand on their gradient, and return the visits' `[v, D]`.

        Args:
            shift: of the arrived labels, see `JoinedLosses`.
            coefficient: of the arrived labels, the derivative of the loss by the cosine.
            sums, share: see `gradients`.
        """
        factor = self._factors(self.dispatch.visits, self.visits, shift)
        for part in self.parts:
            for where in part.slices():
                self._add_extra(part, where, factor, coefficient, sums[part.group], share)
        return self.visits.gradient.mul_(factor.unsqueeze(1))

    def _score_extra(self, part: _Visits, where: slice) -> None:
        """First pass over a group's extra rows, for some visits."""
        values = self._exponentials(part, where)
        if self.with_grad:
            self.visits.gradient[where] = product(values, part.rows).mul_(self.scale)
        if self._keep:
            self._kept[part.group, where.start] = values

    def _exponentials(self, part: _Visits, where: slice) -> Tensor:
        """`exp(z - peak)` `[v, m * L]` of the negatives among a group's extra rows."""
        features = self.features[self.visits.samples[where]] * self.scale
        logits = hide_padding(product(features, part.rows.T), part.padding, in_place=True)
        label, row, column = part.inside(where)
        self._store(label, logits[row, column] / self.scale, part.rows[column])
        hide(logits, (row, column))
        highest = logits.amax(-1) / self.scale
        if threshold := self.class_rows.margin.filter:
            logits.masked_fill_(~keep_negatives(logits / self.scale, threshold), float("-inf"))
        if self.offsets is not None:
            offset = self.offsets[self.visits.samples[where]]
            part.correct(logits, where, offset)
        return self.visits.exponentiate(where, logits, highest)

    def _add_extra(
        self,
        part: _Visits,
        where: slice,
        factor: Tensor,
        coefficient: Tensor,
        gradient: ExtraGradient,
        share: float,
    ) -> None:
        """Hand on the gradient of a group's extra rows that some visits give."""
        values = self._kept.pop((part.group, where.start), None)
        values = self._exponentials(part, where) if values is None else values
        label, row, column = part.inside(where)
        values.mul_(factor[where].unsqueeze(1))[row, column] = coefficient[label] / self.scale
        numbers = self.dispatch.sample_numbers[self.dispatch.visits.samples[where]]
        features = self.features[self.visits.samples[where]] * (self.scale * share)
        gradient.add(numbers, values, features)


class _Visits:
    """The extra rows of a group, and who meets them; see `GroupVisits`."""

    def __init__(self, labels: RoutedLabels, part: GroupVisits, heads: Tensor) -> None:
        self.part, self.group, self.count, self.device = part, part.group, len(heads), labels.device
        self.length = labels.class_rows.layout.length
        padding = labels.class_rows.padding(heads)
        self.padding = None if padding is None else padding.view(-1)
        self.rows = labels.class_rows.read_unit_rows(heads).flatten(0, 1)
        row_bytes = len(self.rows) * self.rows.element_size()
        self.nbytes = (part.visits.stop - part.visits.start) * row_bytes
        self._slice = max(1, LOGITS_BYTES // (4 * row_bytes))

    def slices(self) -> list[slice]:
        """The visits, some at a time."""
        start, stop = self.part.visits.start, self.part.visits.stop
        starts = range(start, stop, self._slice)
        return [slice(first, min(first + self._slice, stop)) for first in starts]

    def inside(self, where: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Labels whose class is among the extra rows, with row and column, on the device."""
        here = self._here(where)
        row = self.part.rows[here] - (where.start - self.part.visits.start)
        parts = (self.part.labels[here], row, self.part.columns[here])
        label, row, column = (to_device(values, self.device) for values in parts)
        return label, row, column

    def correct(self, logits: Tensor, where: slice, offset: Tensor) -> None:
        """Add `offset` `[v]` to the logits of all heads but a sample's own, in place."""
        here = self._here(where)
        row = self.part.rows[here] - (where.start - self.part.visits.start)
        own = torch.unique(row * self.count + self.part.columns[here] // self.length)
        row, head = (to_device(v, self.device) for v in (own // self.count, own % self.count))
        by_head = offset.unsqueeze(1).repeat(1, self.count)
        by_head.index_put_((row, head), offset.new_zeros(()))
        logits.view(len(logits), self.count, -1).add_(by_head.unsqueeze(-1))

    def _here(self, where: slice) -> slice:
        """The labels inside of some visits, which are sorted by visit."""
        start = self.part.visits.start
        bounds = torch.tensor([where.start - start, where.stop - start])
        first, last = torch.searchsorted(self.part.rows, bounds).tolist()
        return slice(first, last)
