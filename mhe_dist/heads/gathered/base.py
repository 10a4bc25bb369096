"""Heads that gather: every rank scores the embeddings of all ranks against its own rows.

The softmax runs across the ranks: of each sample, the normalisers, targets and highest cosines
are all-reduced, `O(W * B * K)` numbers for K labels per sample; the embeddings' gradient comes back
by one reduce-scatter. The heads differ only in which units of the bank are in a step's softmax. All
micro-batches of a step use the same units, whose gradient is summed in one tensor of their size.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor

from mhe_dist.bank.bank import Units, chunk_bytes
from mhe_dist.bank.row_optim import Dense
from mhe_dist.distributed.collectives import all_gather
from mhe_dist.distributed.topology import Topology
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.base import HeadOutput, sample_labels
from mhe_dist.heads.fused_loss import FusedLoss, FusedOutput
from mhe_dist.heads.gathered.scores import SelectedRows
from mhe_dist.heads.gathered.selection import GatheredBatch, Selection, positions_in
from mhe_dist.heads.gathered.several_labels import GatheredLabels
from mhe_dist.heads.gathered.softmax import GatheredSoftmax
from mhe_dist.heads.objectives import OBJECTIVES
from mhe_dist.heads.products import with_chosen_products
from mhe_dist.heads.row_head import HeadSpec, RowHead


class GatheredHead(RowHead):
    """A softmax across the ranks over selected units; see `RowHead` for the arguments."""

    def __init__(self, spec: HeadSpec, topology: Topology, length: int, every: int = 0) -> None:
        super().__init__(spec, topology, length, every)
        self.selection = Selection(range(0), 0)
        self.units_per_chunk = 1
        self._batches: list[GatheredBatch] = []
        self._gradient: Tensor | None = None
        self._next, self._samples, self._batch_size = 0, 0, 0
        self._one_label = True
        self._several = partial(GatheredLabels, objective=OBJECTIVES[spec.config.objective])

    @abstractmethod
    def select(self, present: Tensor) -> Selection:
        """Choose the units of the step `self.step_number`.

        Args:
            present: units of the classes in the step's global batch, distinct, ascending `[P]`.
        """

    def hidden(self, batch: GatheredBatch, units: Units) -> Tensor | None:
        """Which of the `units` a sample must not see; see `SelectedRows`."""
        return None

    def offsets(self, batch: GatheredBatch, units: Units) -> Tensor | None:
        """What is added to the logits of negatives of `units`; see `SelectedRows`."""
        return None

    def classes_seen(self, units: Tensor) -> int:
        """Sum over samples, whose own units `[n, K]` are given, of the classes in their softmax."""
        return len(units) * self.selection.classes

    def plan(self, step: int, labels: Tensor) -> None:
        """Select the units of the step and find each sample's row; see `Head`."""
        self.begin(step)
        self.accumulation_steps = len(labels) // self.topology.world_size
        self._next, self._batch_size, self._gradient = 0, labels.shape[1], None
        config = self.spec.config
        self._one_label = labels.dim() == 2 and config.objective == "softmax"
        labels, kept = sample_labels(labels, self.spec.num_classes, config)
        units, slots = self.layout.locate(labels)
        present = torch.unique(units[units >= 0])
        self._samples = int(kept.sum())
        self.selection = self.select(present)
        shape = (self.topology.world_size, self.accumulation_steps)
        units, slots, kept = (part.unflatten(0, shape) for part in (units, slots, kept))
        self._batches = [
            self._plan_batch(units[:, i], slots[:, i], kept[:, i])
            for i in range(self.accumulation_steps)
        ]
        columns = max(self.topology.world_size * self._batch_size, self.width)
        unit_bytes = self.layout.length * columns * self.spec.dtype.itemsize
        self.units_per_chunk = max(1, chunk_bytes(self.topology.device) // unit_bytes)
        self.bank.touch(self.selection.units)

    def _plan_batch(self, units: Tensor, slots: Tensor, kept: Tensor) -> GatheredBatch:
        """Plan a micro-batch of each rank.

        Args:
            units, slots: of the labels `[W, B, K]`, -1 where no label is.
            kept: `[W, B]`, whether a sample counts.
        """
        rank, size = self.topology.rank, units.shape[1]
        samples = torch.nonzero(kept.flatten()).squeeze(1)
        bounds = torch.searchsorted(samples, torch.tensor([rank * size, (rank + 1) * size]))
        units, slots = units.flatten(0, 1)[samples], slots.flatten(0, 1)[samples]
        local = torch.nonzero(self.bank.held(units.flatten())).squeeze(1)
        position = positions_in(self.selection.units, units.flatten()[local])
        columns = position * self.layout.length + slots.flatten()[local]
        columns, order = torch.sort(columns)
        mine = slice(int(bounds[0]), int(bounds[1]))
        return GatheredBatch(samples, mine, units, local[order], columns)

    def __call__(self, embeddings: Tensor, labels: Tensor) -> HeadOutput:
        """Loss of the next planned micro-batch; see `Head`. All ranks must call."""
        batch = self._batches[self._next]
        self._next += 1
        payload = self.payload(embeddings)
        missing = self._batch_size - len(payload)
        payload = torch.nn.functional.pad(payload, (0, 0, 0, missing)) if missing else payload
        features, norms = self.unpack(all_gather(payload, self.topology))
        weight = self.topology.world_size * self.accumulation_steps / max(1, self._samples)
        loss, accuracy = FusedLoss.apply(features, partial(self._score, norms, batch), weight)
        seen = torch.full_like(accuracy, self.classes_seen(batch.units[batch.mine]) * weight)
        return HeadOutput(loss, {"accuracy": accuracy, "classes_seen": seen})

    @with_chosen_products
    def _score(
        self, norms: Tensor | None, batch: GatheredBatch, features: Tensor, with_grad: bool
    ) -> FusedOutput:
        """Score a micro-batch of all ranks, and keep the rows' gradient if `with_grad`."""
        samples = to_device(batch.samples, self.topology.device)
        selected = SelectedRows(
            self.class_rows,
            self.selection.units,
            self.units_per_chunk,
            partial(self.hidden, batch),
            partial(self.offsets, batch),
        )
        norms = None if norms is None else norms[samples]
        make = GatheredSoftmax if self._one_label else self._several
        scores = make(selected, batch, features[samples], norms, self.topology)
        losses, correct = scores.normalise()
        gradient = torch.zeros_like(features)
        if with_grad:
            if self._gradient is None:
                count = len(self.selection.units) * self.layout.length
                self._gradient = features.new_zeros(count, self.width)
            gradient[samples] = scores.gradients(self._gradient, 1 / max(1, self._samples))
        return FusedOutput(losses[batch.mine].sum(), gradient, correct[batch.mine].sum())

    @torch.no_grad()
    @with_chosen_products
    def step(self, lr: float) -> None:
        """Update the rows touched since `plan`; see `Head`."""
        if self._gradient is not None:
            units, length = self.selection.units, self.layout.length
            summed = self._gradient.view(-1, length, self.width)
            lr *= self.spec.config.optim.lr_scale
            for start in range(0, len(units), self.units_per_chunk):
                chunk = slice(start, start + self.units_per_chunk)
                gradient = Dense(summed[chunk], None, self.margin.normalised)
                self.optimizer.update(self.bank, units[chunk], gradient, lr, self.step_number)
        self._gradient = None
        self.bank.release()
        self.norms.step()
