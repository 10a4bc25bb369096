"""The routed softmax on a GPU: few launches, hardly more for many groups.

`routed_softmax` is the definition. Here the passes over logits are kernels, the rows of all groups
are read at once, and their logits lie in one buffer. Import it where kernels may compute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.batch_invariant import LEAST_ROWS, product
from mhe_dist.heads.class_rows import ClassRows
from mhe_dist.heads.grouping import Chunk, GradientFactors
from mhe_dist.heads.routed.softmax import RoutedBatch, RoutedScores
from mhe_dist.kernels.extra_softmax import ExtraTable, extra_statistics, extra_weights
from mhe_dist.kernels.negatives import Negatives
from mhe_dist.kernels.own_softmax import (
    OwnFactors,
    OwnProducts,
    SampleSums,
    own_statistics,
    own_weights,
)


def kernel_softmax(batch: RoutedBatch) -> RoutedScores:
    """Score one micro-batch of all ranks on the rank that owns the heads; see `routed_softmax`."""
    features = batch.features
    logits = _ExtraLogits(batch)
    samples = logits.normalise()
    gradient = torch.zeros_like(features)
    own = _OwnHeads(batch, samples, gradient)
    for chunk in batch.chunks:
        own.score(chunk)
    logits.finish(samples, gradient)
    if batch.sums is not None:
        scaled = features * (batch.class_rows.margin.scale * batch.share)
        for part, weights in zip(batch.parts, logits.blocks, strict=True):
            numbers = batch.dispatch.sample_numbers[part.samples]
            batch.sums[part.group].add(numbers, weights, scaled[part.samples])
    correct = (samples.target > samples.highest).to(features.dtype)
    return RoutedScores(samples.losses, gradient, correct, own.factors())


class _ExtraLogits:
    """The samples of all groups against their groups' extra heads, in two passes."""

    def __init__(self, batch: RoutedBatch) -> None:
        class_rows, features = batch.class_rows, batch.features
        self.class_rows, self.features, self.norms = class_rows, features, batch.norms
        self.negatives, self.parts = negatives_of(class_rows), batch.parts
        self.heads = [batch.extra[part.group] for part in self.parts]
        widths = [len(heads) * class_rows.layout.length for heads in self.heads]
        sizes = [part.size * width for part, width in zip(self.parts, widths, strict=True)]
        self.buffer = features.new_empty(sum(sizes))
        self.blocks = [
            block.view(-1, width)
            for block, width in zip(self.buffer.split(sizes), widths, strict=True)
        ]
        self.rows = self._read(widths)
        self.table = self._table(len(features), batch.correction)
        self.with_margin = self.slope = torch.empty_like(features[:, 0])

    def _read(self, widths: list[int]) -> tuple[Tensor, ...]:
        """The normalised rows `[m * L, D]` of each group, all read at once."""
        if not self.heads:
            return ()
        rows: Tensor = self.class_rows.read_unit_rows(torch.cat(self.heads)).flatten(0, 1)
        return rows.split(widths)

    def _table(self, count: int, correction: bool) -> ExtraTable:
        """Where the logits of each sample lie, planned on the host and sent at once."""
        layout, first = self.class_rows.layout, 0
        places, offsets = torch.zeros(4, count, dtype=torch.int64), torch.zeros(count)
        places[3] = -1
        for part, heads, block in zip(self.parts, self.heads, self.blocks, strict=True):
            width = block.shape[1]
            places[0, part.samples] = first + torch.arange(part.size) * width
            places[1, part.samples] = width
            # Slots without a class are the last ones of the last head.
            missing = (int(heads[-1]) + 1) * layout.length - layout.num_classes
            places[2, part.samples] = width - max(0, missing)
            places[3, part.inside + part.samples.start] = part.column
            others, seen = max(1, layout.heads - 1), max(1, len(heads) - 1)
            offsets[part.samples] = math.log(others / len(heads))
            offsets[part.inside + part.samples.start] = math.log(others / seen)
            first += block.numel()
        device, widest = self.buffer.device, max((len(rows) for rows in self.rows), default=0)
        return ExtraTable(
            to_device(places, device),
            to_device(offsets, device) if correction else None,
            layout.length,
            widest,
            self.buffer.nbytes,
        )

    def normalise(self) -> SampleSums:
        """First pass: what extra heads contribute; final for samples whose own is among them."""
        scale, table = self.negatives.scale, self.table
        scaled = self.features * scale
        for part, rows, block in zip(self.parts, self.rows, self.blocks, strict=True):
            if part.size < LEAST_ROWS:
                block.copy_(product(scaled[part.samples], rows.T))
            else:
                torch.mm(scaled[part.samples], rows.T, out=block)
        found = extra_statistics(self.buffer, table, self.negatives)
        phi, self.slope = self.class_rows.target(found.target, self.norms)
        self.with_margin = phi * scale
        inside = torch.logaddexp(found.log_sum, self.with_margin)
        log_sum = torch.where(table.places[3] < 0, found.log_sum, inside)
        return SampleSums(found.target, found.highest, log_sum, log_sum - self.with_margin)

    def finish(self, samples: SampleSums, gradient: Tensor) -> None:
        """Second pass: add to the samples' gradient; `blocks` are the rows' weights then."""
        extra_weights(
            self.buffer,
            self.table,
            self.negatives,
            samples.log_sum,
            self.with_margin,
            self.slope,
        )
        scale = self.negatives.scale
        for part, rows, block in zip(self.parts, self.rows, self.blocks, strict=True):
            if part.size < LEAST_ROWS:
                gradient[part.samples].add_(product(block, rows), alpha=scale)
            else:
                gradient[part.samples].addmm_(block, rows, alpha=scale)


class _OwnHeads:
    """Samples against their own heads, chunk by chunk, each row read once."""

    def __init__(self, batch: RoutedBatch, samples: SampleSums, gradient: Tensor) -> None:
        self.batch, self.samples, self.gradient = batch, samples, gradient
        self.class_rows, self.features = batch.class_rows, batch.features
        self.negatives = negatives_of(self.class_rows)
        length = self.class_rows.layout.length
        self.weights = self.features.new_empty(len(batch.dispatch.own), length)
        self.radial = torch.empty_like(self.weights)

    def score(self, chunk: Chunk) -> None:
        """Both passes over the rows of a chunk."""
        rows, inverse = self.class_rows.read(chunk.heads)
        places = self._places(chunk)
        index = places[0].view(chunk.index.shape)
        products = product(self.features[index], rows.transpose(1, 2))
        own = OwnProducts(products, inverse, places)
        target, log_sum = own_statistics(own, self.samples, self.negatives)
        norms = None if self.batch.norms is None else self.batch.norms[places[0]]
        phi, slope = self.class_rows.target(target, norms)
        weights = torch.empty_like(products, memory_format=torch.contiguous_format)
        own_weights(
            own,
            self.samples,
            self.negatives,
            self.batch.share,
            log_sum,
            phi * self.negatives.scale,
            slope,
            OwnFactors(weights, self.weights, self.radial),
        )
        self.gradient[index] = product(weights, rows)

    def _places(self, chunk: Chunk) -> Tensor:
        """Sample, slot, position among the factors, and the head's classes; see `OwnProducts`."""
        layout, dispatch = self.class_rows.layout, self.batch.dispatch
        position = chunk.index.view(-1)
        sample = dispatch.own[position]
        classes = (layout.num_classes - chunk.heads * layout.length).clamp(max=layout.length)
        classes = classes.repeat_interleave(chunk.index.shape[1])
        table = torch.stack([sample, dispatch.slots[sample], position, classes])
        return to_device(table, self.features.device)

    def factors(self) -> GradientFactors:
        """The gradient of the rows of own heads."""
        own = to_device(self.batch.dispatch.own, self.features.device)
        return GradientFactors(self.features[own], self.weights, self.radial)


def negatives_of(class_rows: ClassRows) -> Negatives:
    """What the margin makes of the logits of negatives."""
    return Negatives(class_rows.margin.scale, class_rows.margin.filter)
