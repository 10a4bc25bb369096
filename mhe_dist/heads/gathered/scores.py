"""Gathered samples scored against the selected rows of this rank, chunk by chunk, in two passes.

The first pass sums up the exponentials of each sample's logits. The second one, when the sums are
known over all ranks, forms the gradients; it takes logits up again that were kept, and makes the
others anew.
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
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.class_rows import ClassRows, hide
from mhe_dist.heads.gathered.selection import GatheredBatch
from mhe_dist.heads.margins import keep_negatives
from mhe_dist.sizes import LOGITS_BYTES


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


class RowChunk(NamedTuple):
    """Some of the selected units, and the targets among their rows.

    Attributes:
        units: global numbers.
        rows: the slice of their rows among those of all selected units.
        targets: numbers of the targets whose class is here, see `GatheredBatch`; on the device.
        samples, columns: the sample of each of these targets, and its column in the chunk.
    """

    units: Units
    rows: slice
    targets: Tensor
    samples: Tensor
    columns: Tensor


class GatheredScores:
    """The logits of a micro-batch of all ranks; what is made of them is up to the subclasses.

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
        targets = batch.units.numel()
        self.target = self.log_sum.new_zeros(targets)
        self.with_margin = torch.zeros_like(self.target)
        self.slope = torch.zeros_like(self.target)
        self.kept: dict[int, Tensor] = {}
        self.room = LOGITS_BYTES

    def chunks(self) -> Iterator[RowChunk]:
        """The selected units, some at a time."""
        units, length = self.selected.units, self.class_rows.layout.length
        device, size = self.scaled.device, self.selected.units_per_chunk
        targets = to_device(self.batch.local, device)
        columns = to_device(self.batch.columns, device)
        each = self.batch.units.shape[1]
        samples = targets if each == 1 else targets.div(each, rounding_mode="floor")
        starts = torch.arange(0, len(units) + size, size)
        bounds = torch.searchsorted(self.batch.columns, starts * length).tolist()
        for start, low, high in zip(starts.tolist(), bounds, bounds[1:], strict=False):
            chunk = units[start : start + size]
            first = start * length
            rows = slice(first, first + len(chunk) * length)
            here = slice(low, high)
            yield RowChunk(chunk, rows, targets[here], samples[here], columns[here] - first)

    def unit_rows(self, chunk: RowChunk) -> Tensor:
        """What features are multiplied with `[rows, width]`."""
        return self.class_rows.read_unit_rows(chunk.units).flatten(0, 1)

    def cosines(self, chunk: RowChunk, rows: Tensor | None = None) -> Tensor:
        """Scaled cosines `[n, rows]`, -inf where a sample sees nothing."""
        layout = self.class_rows.layout
        logits = self.scaled @ (self.unit_rows(chunk) if rows is None else rows).T
        padding = layout.heads * layout.length - layout.num_classes
        if padding and len(chunk.units) and int(chunk.units[-1]) == layout.heads - 1:
            logits[:, -padding:] = float("-inf")
        hidden = self.selected.hidden(chunk.units)
        if hidden is not None:
            _by_unit(logits, hidden).masked_fill_(hidden.unsqueeze(-1), float("-inf"))
        return logits

    def apply_margin(self, logits: Tensor, chunk: RowChunk) -> None:
        """Store the targets of a chunk: scaled cosine, the same with its margin, slope."""
        target = logits[chunk.samples, chunk.columns]
        norms = None if self.norms is None else self.norms[chunk.samples]
        phi, slope = self.class_rows.target(target / self.scale, norms)
        self.target[chunk.targets] = target
        self.with_margin[chunk.targets] = phi * self.scale
        self.slope[chunk.targets] = slope

    def sum_up(self) -> Tensor:
        """First pass over the rows: `log_sum` and `highest` of this rank's.

        Returns:
            the highest of both over all ranks `[2, n]`; all ranks must call.
        """
        for chunk in self.chunks():
            logits = self.cosines(chunk)
            self.apply_margin(logits, chunk)
            # The target counts no more: were it among the others, equal embeddings would be right.
            hide(logits, (chunk.samples, chunk.columns))
            self.highest = torch.maximum(self.highest, logits.amax(1))
            self.finish(logits, chunk)
            self.log_sum = torch.logaddexp(self.log_sum, logits.logsumexp(1))
            self.keep(logits, chunk)
        peaks = torch.stack([self.log_sum, self.highest])
        return all_reduce(peaks, self.topology, "max")

    def finish(self, logits: Tensor, chunk: RowChunk) -> Tensor:
        """Filter and correct the logits of negatives, in place; those of targets are not kept."""
        threshold = self.class_rows.margin.filter
        if threshold:
            logits.masked_fill_(~keep_negatives(logits, threshold * self.scale), float("-inf"))
        offsets = self.selected.offsets(chunk.units)
        if offsets is not None:
            _by_unit(logits, offsets).add_(offsets.unsqueeze(-1))
        return logits

    def keep(self, logits: Tensor, chunk: RowChunk) -> None:
        """Keep the logits of a chunk for the second pass, if there is room."""
        size = logits.numel() * logits.element_size()
        if size <= self.room:
            self.kept[chunk.rows.start] = logits
            self.room -= size


def _by_unit(logits: Tensor, values: Tensor) -> Tensor:
    """`logits` `[n, U * L]` as `[n, U, L]`, for values `[U]` or `[n, U]`."""
    units = values.shape[-1]
    return logits.view(len(logits), units, logits.shape[-1] // max(1, units))
