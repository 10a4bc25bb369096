"""Softmax cross-entropy of gathered samples over the selected rows of all ranks, in closed form.

With unit rows `u`, logits `z = s * cos` (the margin applied to the target) and `p = softmax(z)`,
the gradient of a unit embedding is `s * sum_j q_j u_j` and that of a unit row `s * sum_i q_i e_i`,
where `q = p`, but `(p - 1) * dphi` at the target. The head's `step` turns that into the gradient of
the row itself, once a step (`mhe_dist.bank.row_optim.Dense`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.bank.bank import Units
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.class_rows import ClassRows, hide
from mhe_dist.heads.gathered.selection import GatheredBatch
from mhe_dist.heads.margins import keep_negatives

# Logits of a rank that are kept between the two passes over them; those beyond are made again.
LOGITS_BYTES = 1 << 28


@dataclass(frozen=True)
class SelectedRows:
    """The rows of this rank in the softmax of one micro-batch.

    Attributes:
        class_rows: all rows of this rank.
        units: those that are selected, ascending global numbers.
        units_per_chunk: units that are scored together.
        hidden: of some units, the mask `[n, U]` on the device of those that a sample must not see;
            None: each sample sees all of them.
        offsets: of some units, what is added to the logits of negatives, `[U]` or `[n, U]` on the
            device; None: nothing.
    """

    class_rows: ClassRows
    units: Units
    units_per_chunk: int
    hidden: Callable[[Units], Tensor | None]
    offsets: Callable[[Units], Tensor | None]


class _Chunk(NamedTuple):
    """Some of the selected units, and the targets among their rows.

    Attributes:
        units: global numbers.
        rows: the slice of their rows among those of all selected units.
        samples, columns: samples whose class is here, and its column in the chunk; on the device.
    """

    units: Units
    rows: slice
    samples: Tensor
    columns: Tensor


class GatheredSoftmax:
    """The samples of a micro-batch of all ranks against this rank's selected rows, in two passes.

    The first finds each sample's normaliser, the second, when that is known over all ranks, forms
    the gradients.

    Args:
        selected: the rows.
        batch: where the samples' own rows are.
        features: `[n, width]` of the samples.
        norms: of their embeddings `[n]`, for margins that depend on them.
        topology: the ranks that the softmax runs across.
    """

    def __init__(
        self,
        selected: SelectedRows,
        batch: GatheredBatch,
        features: Tensor,
        norms: Tensor | None,
        topology: Topology,
    ) -> None:
        self.selected, self.batch, self.norms, self.topology = selected, batch, norms, topology
        self.class_rows, self.scale = selected.class_rows, selected.class_rows.margin.scale
        self.scaled = features * self.scale
        self.log_sum = features.new_full((len(features),), float("-inf"))
        self.highest = self.log_sum.clone()
        self.target = torch.zeros_like(self.log_sum)
        self.with_margin = torch.zeros_like(self.log_sum)
        self.slope = torch.zeros_like(self.log_sum)
        self.kept: dict[int, Tensor] = {}
        self.room = LOGITS_BYTES

    def normalise(self) -> tuple[Tensor, Tensor]:
        """First pass: losses `[n]`, and 1 where the target beats every other class seen `[n]`.

        The same on every rank; all ranks must call.
        """
        for chunk in self._chunks():
            logits = self._cosines(chunk)
            self._apply_margin(logits, chunk)
            # The target counts no more: were it among the others, equal embeddings would be right.
            hide(logits, (chunk.samples, chunk.columns))
            self.highest = torch.maximum(self.highest, logits.amax(1))
            self._finish(logits, chunk)
            self.log_sum = torch.logaddexp(self.log_sum, logits.logsumexp(1))
            self._keep(logits, chunk)
        peaks = torch.stack([self.log_sum, self.highest])
        top, highest = all_reduce(peaks, self.topology, "max")
        sums = torch.stack([(self.log_sum - top).exp(), self.target, self.with_margin])
        total, target, with_margin = all_reduce(sums, self.topology)
        self.log_sum = top + total.log()
        return self.log_sum - with_margin, (target > highest).to(target.dtype)

    def gradients(self, rows_gradient: Tensor, share: float) -> Tensor:
        """Second pass: gradient of the sum of the losses.

        Args:
            rows_gradient: of the selected unit rows `[U * L, width]`; `share` times that of this
                micro-batch is added.
            share: scale of the rows' gradient, `1 / N`.

        Returns:
            The part of the features' gradient that this rank's rows give, `[n, width]`.
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
        units, length = self.selected.units, self.class_rows.layout.length
        device, size = self.scaled.device, self.selected.units_per_chunk
        samples = self.batch.local.to(device, non_blocking=True)
        columns = self.batch.columns.to(device, non_blocking=True)
        starts = torch.arange(0, len(units) + size, size)
        bounds = torch.searchsorted(self.batch.columns, starts * length).tolist()
        for start, low, high in zip(starts.tolist(), bounds, bounds[1:], strict=False):
            chunk = units[start : start + size]
            first = start * length
            rows = slice(first, first + len(chunk) * length)
            yield _Chunk(chunk, rows, samples[low:high], columns[low:high] - first)

    def _unit_rows(self, chunk: _Chunk) -> Tensor:
        """What features are multiplied with `[rows, width]`."""
        return self.class_rows.read_unit_rows(chunk.units).flatten(0, 1)

    def _cosines(self, chunk: _Chunk, rows: Tensor | None = None) -> Tensor:
        """Scaled cosines `[n, rows]`, -inf where a sample sees nothing."""
        layout = self.class_rows.layout
        logits = self.scaled @ (self._unit_rows(chunk) if rows is None else rows).T
        padding = layout.heads * layout.length - layout.num_classes
        if padding and len(chunk.units) and int(chunk.units[-1]) == layout.heads - 1:
            logits[:, -padding:] = float("-inf")
        hidden = self.selected.hidden(chunk.units)
        if hidden is not None:
            _by_unit(logits, hidden).masked_fill_(hidden.unsqueeze(-1), float("-inf"))
        return logits

    def _apply_margin(self, logits: Tensor, chunk: _Chunk) -> None:
        """Store the targets of a chunk: scaled cosine, the same with its margin, slope."""
        target = logits[chunk.samples, chunk.columns]
        norms = None if self.norms is None else self.norms[chunk.samples]
        phi, slope = self.class_rows.target(target / self.scale, norms)
        self.target[chunk.samples] = target
        self.with_margin[chunk.samples] = phi * self.scale
        self.slope[chunk.samples] = slope

    def _finish(self, logits: Tensor, chunk: _Chunk) -> Tensor:
        """Filter, correct and set the targets, in place."""
        threshold = self.class_rows.margin.filter
        if threshold:
            logits.masked_fill_(~keep_negatives(logits, threshold * self.scale), float("-inf"))
        offsets = self.selected.offsets(chunk.units)
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
