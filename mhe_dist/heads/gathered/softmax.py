"""Softmax cross-entropy of gathered samples over the selected rows of all ranks, in closed form.

With unit rows `u`, logits `z = s * cos` (the margin applied to the target) and `p = softmax(z)`,
the gradient of a unit embedding is `s * sum_j q_j u_j` and that of a unit row `s * sum_i q_i e_i`,
where `q = p`, but `(p - 1) * dphi` at the target. What the normalisation of the rows makes of it
is found once a step, in the head's `step`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mhe_dist.bank.bank import Units
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.heads.margins import keep_negatives

if TYPE_CHECKING:
    from mhe_dist.heads.gathered.base import GatheredHead
    from mhe_dist.heads.gathered.selection import GatheredRound

# Logits of a rank that are kept between the two passes over them; those beyond are made again.
LOGITS_BYTES = 1 << 28


class _Chunk(NamedTuple):
    """Some of the selected units, and the targets among their rows.

    Attributes:
        units: global numbers.
        rows: where their rows are among those of all selected units.
        samples, columns: samples whose class is here, and its column in the chunk; on the device.
    """

    units: Units
    rows: slice
    samples: Tensor
    columns: Tensor


class GatheredSoftmax:
    """A round's samples against this rank's selected rows, in two passes.

    The first finds each sample's normaliser, the second, when that is known over all ranks, forms
    the gradients.

    Args:
        head: whose rows, margin and selection.
        turn: the round.
        features: `[n, width]` of its samples.
        norms: of their embeddings `[n]`, for margins that depend on them.
    """

    def __init__(
        self, head: GatheredHead, turn: GatheredRound, features: Tensor, norms: Tensor | None
    ) -> None:
        self.head, self.turn, self.norms = head, turn, norms
        self.scale = head.margin.scale
        self.scaled = features * self.scale
        self.log_sum = features.new_full((len(features),), float("-inf"))
        self.highest = self.log_sum.clone()
        self.target = torch.zeros_like(self.log_sum)
        self.with_margin = torch.zeros_like(self.log_sum)
        self.slope = torch.zeros_like(self.log_sum)
        self.kept: dict[int, Tensor] = {}
        self.room = LOGITS_BYTES

    def normalise(self) -> tuple[Tensor, Tensor]:
        """First pass: losses `[n]`, and 1 where no class seen has a higher cosine `[n]`.

        The same on every rank; all ranks must call.
        """
        for chunk in self._chunks():
            logits = self._cosines(chunk)
            self.highest = torch.maximum(self.highest, logits.amax(1))
            self._apply_margin(logits, chunk)
            self._finish(logits, chunk)
            self.log_sum = torch.logaddexp(self.log_sum, logits.logsumexp(1))
            self._keep(logits, chunk)
        topology = self.head.topology
        top, highest = all_reduce(torch.stack([self.log_sum, self.highest]), topology, "max")
        sums = torch.stack([(self.log_sum - top).exp(), self.target, self.with_margin])
        total, target, with_margin = all_reduce(sums, topology)
        self.log_sum = top + total.log()
        return self.log_sum - with_margin, (target >= highest).to(target.dtype)

    def gradients(self, rows_gradient: Tensor, share: float) -> Tensor:
        """Second pass: gradient of the sum of the losses.

        Args:
            rows_gradient: of the selected unit rows `[U * L, width]`; `share` times that of this
                round is added.

        Returns:
            What this rank's rows contribute to that of the features, `[n, width]`.
        """
        gradient = torch.zeros_like(self.scaled)
        for chunk in self._chunks():
            rows = self._unit_rows(chunk)
            logits = self.kept.pop(chunk.rows.start, None)
            if logits is None:
                logits = self._finish(self._cosines(chunk, rows), chunk)
            q = logits.sub_(self.log_sum.unsqueeze(1)).exp_()
            where = (chunk.samples, chunk.columns)
            q[where] = (q[where] - 1) * self.slope[chunk.samples]
            gradient.addmm_(q, rows)
            rows_gradient[chunk.rows].addmm_(q.T, self.scaled, alpha=share)
        return gradient.mul_(self.scale)

    def _chunks(self) -> Iterator[_Chunk]:
        units, length = self.head.selection.units, self.head.layout.length
        device, step = self.scaled.device, self.head.chunk_units
        samples, columns = (
            t.to(device, non_blocking=True) for t in (self.turn.local, self.turn.columns)
        )
        starts = torch.arange(0, len(units) + step, step)
        bounds = torch.searchsorted(self.turn.columns, starts * length).tolist()
        for start, low, high in zip(starts.tolist(), bounds, bounds[1:], strict=False):
            chunk = units[start : start + step]
            first = start * length
            rows = slice(first, first + len(chunk) * length)
            yield _Chunk(chunk, rows, samples[low:high], columns[low:high] - first)

    def _unit_rows(self, chunk: _Chunk) -> Tensor:
        """What features are multiplied with `[rows, width]`."""
        rows = self.head.bank.read(chunk.units).flatten(0, 1)
        if not self.head.margin.normalised:
            return rows
        return rows * self.head.inverse_norms(rows).unsqueeze(1)

    def _cosines(self, chunk: _Chunk, rows: Tensor | None = None) -> Tensor:
        """Scaled cosines `[n, rows]`, -inf where a sample sees nothing."""
        logits = self.scaled @ (self._unit_rows(chunk) if rows is None else rows).T
        beyond = self.head.layout.heads * self.head.layout.length - self.head.spec.num_classes
        if beyond and len(chunk.units) and int(chunk.units[-1]) == self.head.layout.heads - 1:
            logits[:, -beyond:] = float("-inf")
        hidden = self.head.hidden(self.turn, chunk.units)
        if hidden is not None:
            _by_unit(logits, hidden).masked_fill_(hidden.unsqueeze(-1), float("-inf"))
        return logits

    def _apply_margin(self, logits: Tensor, chunk: _Chunk) -> None:
        """Note the targets of a chunk: scaled cosine, the same with its margin, slope."""
        target = logits[chunk.samples, chunk.columns]
        norms = None if self.norms is None else self.norms[chunk.samples]
        phi, slope = self.head.with_margin(target / self.scale, norms)
        self.target[chunk.samples] = target
        self.with_margin[chunk.samples] = phi * self.scale
        self.slope[chunk.samples] = slope

    def _finish(self, logits: Tensor, chunk: _Chunk) -> Tensor:
        """Filter, correct and set the targets, in place."""
        threshold = self.head.spec.config.margin.filter
        if threshold:
            logits.masked_fill_(~keep_negatives(logits, threshold * self.scale), float("-inf"))
        offsets = self.head.offsets(self.turn, chunk.units)
        if offsets is not None:
            _by_unit(logits, offsets).add_(offsets.unsqueeze(-1))
        logits[chunk.samples, chunk.columns] = self.with_margin[chunk.samples]
        return logits

    def _keep(self, logits: Tensor, chunk: _Chunk) -> None:
        size = logits.numel() * logits.element_size()
        if size <= self.room:
            self.kept[chunk.rows.start] = logits
            self.room -= size


def _by_unit(logits: Tensor, values: Tensor) -> Tensor:
    """`logits` `[n, U * L]` as `[n, U, L]`, for values `[U]` or `[n, U]`."""
    units = values.shape[-1]
    return logits.view(len(logits), units, logits.shape[-1] // max(1, units))
