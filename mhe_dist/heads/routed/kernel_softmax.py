"""The routed softmax on a GPU: few launches, hardly more for many groups.

`routed_softmax` is the definition. Here the passes over logits are kernels, the rows of all groups
are read at once, and their logits lie in one buffer. Import it where kernels may compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.batch_invariant import LEAST_ROWS, product
from mhe_dist.heads.grouping import Chunk, GradientFactors
from mhe_dist.heads.products import in_tf32
from mhe_dist.heads.routed.extra_logits import ExtraLogits, negatives_of
from mhe_dist.heads.routed.softmax import RoutedBatch, RoutedScores
from mhe_dist.kernels.own_products import StoredHeads, own_products, sum_own_rows
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
    extra = _ExtraHeads(batch)
    samples = extra.normalise()
    gradient = torch.zeros_like(features)
    own = _OwnHeads(batch, samples, gradient)
    for chunk in batch.chunks:
        own.score(chunk)
    extra.finish(samples, gradient)
    if batch.sums is not None:
        extra.logits.add_row_gradient(batch.sums, batch.dispatch.sample_numbers, batch.share)
    correct = (samples.target > samples.highest).to(features.dtype)
    return RoutedScores(samples.losses, gradient, correct, own.factors())


class _ExtraHeads:
    """The samples of all groups against their groups' extra heads, in two passes."""

    def __init__(self, batch: RoutedBatch) -> None:
        self.class_rows, self.norms = batch.class_rows, batch.norms
        self.logits = ExtraLogits(
            batch.class_rows, batch.features, batch.parts, batch.extra, batch.correction
        )
        self.with_margin = self.slope = torch.empty_like(batch.features[:, 0])

    def normalise(self) -> SampleSums:
        """First pass: what extra heads contribute; final for samples whose own is among them."""
        found = self.logits.statistics()
        phi, self.slope = self.class_rows.target(found.target, self.norms)
        self.with_margin = phi * self.class_rows.margin.scale
        inside = torch.logaddexp(found.log_sum, self.with_margin)
        log_sum = torch.where(self.logits.table.places[3] < 0, found.log_sum, inside)
        return SampleSums(found.target, found.highest, log_sum, log_sum - self.with_margin)

    def finish(self, samples: SampleSums, gradient: Tensor) -> None:
        """Second pass: add to the samples' gradient; the logits are the rows' weights then."""
        self.logits.form_weights(samples.log_sum, self.with_margin, self.slope)
        self.logits.add_gradient(gradient)


@dataclass(frozen=True)
class _ReadRows:
    """Rows of heads, copied for products of matrices.

    Attributes:
        rows, inverse: `[T, L, D]`, and `1 / |w|` `[T, L]`.
        samples: `[T, c]`, the samples of each head.
    """

    rows: Tensor
    inverse: Tensor
    samples: Tensor

    def products(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The samples' products with the rows `[T, c, L]`, and `inverse`."""
        return product(features[self.samples], self.rows.transpose(1, 2)), self.inverse

    def store_sums(self, weights: Tensor, gradient: Tensor) -> None:
        """Store the rows' sums by `weights` `[T, c, L]` in the samples' rows of `gradient`."""
        gradient[self.samples] = product(weights, self.rows)


@dataclass(frozen=True)
class _StoredRows:
    """The same on rows where they lie."""

    heads: StoredHeads

    def products(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See `_ReadRows`."""
        return own_products(self.heads, features)

    def store_sums(self, weights: Tensor, gradient: Tensor) -> None:
        """See `_ReadRows`."""
        sum_own_rows(self.heads, weights, gradient)


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
        places = self._places(chunk)
        index = places[0].view(chunk.index.shape)
        rows = self._rows_of(chunk, index)
        products, inverse = rows.products(self.features)
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
        rows.store_sums(weights, self.gradient)

    def _rows_of(self, chunk: Chunk, index: Tensor) -> _ReadRows | _StoredRows:
        """The rows of a chunk's heads, and their samples `[T, c]`.

        For fewer samples than `LEAST_ROWS` a product of matrices would multiply padding too.
        """
        bank, normalised = self.class_rows.bank, self.class_rows.margin.normalised
        few = chunk.index.shape[1] < LEAST_ROWS
        if few and normalised and in_tf32() and bank.takes_kernels:
            positions = bank.positions(chunk.heads)
            return _StoredRows(StoredHeads(bank.stored["weight"], positions, index))
        return _ReadRows(*self.class_rows.read(chunk.heads), index)

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
