"""Multi-Head Sampling by `route`: each embedding travels to the rank that owns its head.

With several labels per sample it travels once to each rank that owns one of their heads (see
`several_labels.py`); the sample's negatives are those of these heads and of their groups.

Cost of a step: `B * (1 + m) * L * D` multiply-adds and the traffic of the touched rows; nothing is
proportional to C or to W. The loss and its gradient are formed in closed form while a chunk of
rows is in cache, so that a step reads each touched row once in the forward pass and reads and
writes it once in the update; no gradient of the size of the rows is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mhe_dist import seeds
from mhe_dist.bank.row_optim import LowRank, RowSGD
from mhe_dist.distributed.collectives import all_to_all
from mhe_dist.distributed.topology import Topology
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.base import HeadOutput, sample_labels
from mhe_dist.heads.fused_loss import FusedLoss, FusedOutput
from mhe_dist.heads.grouping import Chunk, GradientFactors, chunks_by_head
from mhe_dist.heads.objectives import OBJECTIVES
from mhe_dist.heads.products import with_chosen_products
from mhe_dist.heads.routed.dispatch import Dispatch, GroupPart, plan_dispatch
from mhe_dist.heads.routed.extra_gradient import ExtraGradients
from mhe_dist.heads.routed.label_dispatch import (
    GroupVisits,
    LabelDispatch,
    plan_label_dispatch,
)
from mhe_dist.heads.routed.several_labels import GRID, RoutedLabels, join_labels
from mhe_dist.heads.routed.softmax import RoutedBatch, RoutedScores, routed_softmax
from mhe_dist.heads.row_head import HeadSpec, RowHead
from mhe_dist.kernels.dispatch import MAX_LENGTH, use_kernels
from mhe_dist.sizes import LOGITS_BYTES


class MhsRoute(RowHead):
    """Own head and m extra heads of its group for every sample, or those of each of its labels.

    See `RowHead` for the arguments.
    """

    def __init__(self, spec: HeadSpec, topology: Topology) -> None:
        config = spec.config.mhs
        super().__init__(spec, topology, config.chosen_length, spec.repartition_steps)
        self.extra_heads = config.chosen_extra_heads if config.negatives != "own" else 0
        self._objective = OBJECTIVES[spec.config.objective]
        self._dispatches: list[Dispatch] | list[LabelDispatch] = []
        self._chunks: list[list[Chunk]] = []
        self._extra: dict[int, Tensor] = {}
        self._own: list[GradientFactors] = []
        self._sums = self._no_gradients()
        self._next, self._samples, self._one_label = 0, 0, True

    def draw(self, step: int, group: int) -> Tensor:
        """The extra heads of a group in a step, ascending global numbers, int64 on the host."""
        heads = self.layout.group_heads(group)
        rng = seeds.generator(self.spec.seed, "extra heads", step, group)
        count = min(self.extra_heads, len(heads))
        drawn = seeds.sample_without_replacement(len(heads), count, rng)
        return torch.from_numpy(drawn) + heads.start

    def plan(self, step: int, labels: Tensor) -> None:
        """Draw the extra heads and find out to which ranks each sample goes; see `Head`."""
        self.begin(step)
        self._next, self.accumulation_steps = 0, len(labels) // self.topology.world_size
        config = self.spec.config
        self._one_label = labels.dim() == 2 and config.objective == "softmax"
        labels, kept = sample_labels(labels, self.spec.num_classes, config)
        self._samples = int(kept.sum())
        heads, slots = self.layout.locate(labels)
        groups = self.layout.group_of(heads)
        here = groups[(groups >= self.groups.start) & (groups < self.groups.stop)].unique()
        self._extra = {g: self.draw(step, g) for g in here.tolist()}
        if self._one_label:
            self._dispatches = self._plan_samples(heads.squeeze(-1), slots.squeeze(-1))
        else:
            self._dispatches = self._plan_labels(heads, slots, groups)
        own = [dispatch.own_heads for dispatch in self._dispatches]
        self._chunks = [self._chunks_of(heads) for heads in own]
        self._own, self._sums = [], self._no_gradients()
        self.bank.touch(torch.unique(torch.cat([*self._extra.values(), *own])))

    def _by_micro_batch(self, heads: Tensor, slots: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`[n, B, ...]` as `[W, B, ...]` for each micro-batch of a rank, and samples' numbers."""
        numbers = torch.arange(heads.shape[0] * heads.shape[1]).view(heads.shape[:2])
        shape = (self.topology.world_size, self.accumulation_steps)
        heads, slots, numbers = (table.unflatten(0, shape) for table in (heads, slots, numbers))
        steps = range(self.accumulation_steps)
        return [(heads[:, i], slots[:, i], numbers[:, i]) for i in steps]

    def _plan_samples(self, heads: Tensor, slots: Tensor) -> list[Dispatch]:
        """Plan micro-batches of samples with one label; tables `[n, B]`."""
        return [
            plan_dispatch(self.layout, *tables, self._extra, self.topology.rank)
            for tables in self._by_micro_batch(heads, slots)
        ]

    def _plan_labels(self, heads: Tensor, slots: Tensor, groups: Tensor) -> list[LabelDispatch]:
        """Plan micro-batches of samples with several labels; tables `[n, B, K]`."""
        # What a sample sees of other ranks' groups counts in the share that it sees.
        drawn = None
        if self.spec.config.mhs.correction:
            present = groups[groups >= 0].unique().tolist()
            drawn = {group: self.draw(self.step_number, group) for group in present}
        return [
            plan_label_dispatch(self.layout, *tables, self._extra, drawn, self.topology.rank)
            for tables in self._by_micro_batch(heads, slots)
        ]

    def units_of_step(self, step: int, labels: Tensor) -> Tensor:
        """Own heads, and the extra ones of this rank's groups; see `RowHead`."""
        heads = self.layout.locate(labels)[0].flatten()
        groups = self.layout.group_of(heads[self.bank.held(heads)]).unique()
        return torch.unique(torch.cat([heads, *(self.draw(step, g) for g in groups.tolist())]))

    def __call__(self, embeddings: Tensor, labels: Tensor) -> HeadOutput:
        """Loss of the next planned micro-batch; see `Head`."""
        dispatch, chunks = self._dispatches[self._next], self._chunks[self._next]
        self._next += 1
        weight = self.topology.world_size * self.accumulation_steps / max(1, self._samples)
        if isinstance(dispatch, LabelDispatch):
            score_labels = partial(self._score_labels, dispatch, chunks)
            loss, accuracy = FusedLoss.apply(self.payload(embeddings), score_labels, weight)
        else:
            features, norms = self.unpack(self._exchange(embeddings, dispatch))
            score = partial(self._score, norms, dispatch, chunks)
            loss, accuracy = FusedLoss.apply(features, score, weight)
        seen = torch.full_like(accuracy, self._classes_seen(dispatch) * weight)
        return HeadOutput(loss, {"accuracy": accuracy, "classes_seen": seen})

    def _exchange(self, embeddings: Tensor, dispatch: Dispatch) -> Tensor:
        """Payload of the samples whose heads are here, in the sorted order of `dispatch`."""
        device = self.topology.device
        payload = self.payload(embeddings)[to_device(dispatch.send_order, device)]
        arrived = all_to_all(payload, dispatch.send, dispatch.receive, self.topology)
        return arrived[to_device(dispatch.order, device)]

    def _classes_seen(self, dispatch: Dispatch | LabelDispatch) -> int:
        """Sum over the samples of a dispatch of the classes in their softmax."""
        own = int(self.classes_in(dispatch.own_heads).sum())
        extra = {group: int(self.classes_in(heads).sum()) for group, heads in self._extra.items()}
        return own + sum(extra[part.group] * part.size for part in dispatch.groups)

    def _softmax_of(self, batch: RoutedBatch) -> Callable[[RoutedBatch], RoutedScores]:
        """What scores a batch: kernels where they may, if its logits fit in memory at once."""
        if not self._takes_kernels(batch.features, batch.parts):
            return routed_softmax
        from mhe_dist.heads.routed.kernel_softmax import kernel_softmax

        return kernel_softmax

    def _labels_of(self, dispatch: LabelDispatch, features: Tensor) -> type[RoutedLabels]:
        """What scores labels; as `_softmax_of`."""
        corrected = dispatch.offsets is not None
        if corrected or not dispatch.groups or not self._takes_kernels(features, dispatch.groups):
            return RoutedLabels
        from mhe_dist.heads.routed.kernel_labels import KernelLabels

        return KernelLabels

    def _takes_kernels(
        self, features: Tensor, parts: Sequence[GroupPart] | Sequence[GroupVisits]
    ) -> bool:
        """Whether kernels may compute, and all logits over extra heads fit in memory at once."""
        length = self.layout.length
        logits = sum(len(self._extra[part.group]) * part.size for part in parts) * length
        fit = length <= MAX_LENGTH and logits * features.element_size() <= LOGITS_BYTES
        return fit and features.dtype == torch.float32 and use_kernels(features)

    @with_chosen_products
    def _score(
        self,
        norms: Tensor | None,
        dispatch: Dispatch,
        chunks: list[Chunk],
        features: Tensor,
        with_grad: bool,
    ) -> FusedOutput:
        """Score a dispatch, and keep the rows' gradient if `with_grad`."""
        batch = RoutedBatch(
            self.class_rows,
            features,
            norms,
            dispatch,
            chunks,
            self._extra,
            sums=self._sums if with_grad else None,
            share=1 / max(1, self._samples),
            correction=self.spec.config.mhs.correction,
        )
        scores = self._softmax_of(batch)(batch)
        if with_grad:
            self._own.append(scores.own)
        return FusedOutput(scores.losses.sum(), scores.gradient, scores.correct.sum())

    @with_chosen_products
    def _score_labels(
        self, dispatch: LabelDispatch, chunks: list[Chunk], payload: Tensor, with_grad: bool
    ) -> FusedOutput:
        """Score the labels that arrive, and join what the owners of this rank's labels find.

        Args:
            dispatch, chunks: as planned.
            payload: of this rank's samples `[b, width]`; see `payload`.
            with_grad: whether to keep the rows' gradient.
        """
        topology, device = self.topology, self.topology.device
        samples, index = (to_device(v, device) for v in (dispatch.samples, dispatch.labels))
        there, back = dispatch.labels_send, dispatch.labels_receive
        arrived = all_to_all(payload[samples], dispatch.send, dispatch.receive, topology)
        features, norms = self.unpack(arrived)
        labels = self._labels_of(dispatch, features)(
            self.class_rows, features, norms, dispatch, chunks, self._extra, with_grad
        )
        sums = all_to_all(labels.sums(), back, there, topology)
        joined = join_labels(sums, dispatch, index, self._objective)
        gradient = torch.zeros_like(payload)
        if with_grad:
            answer = all_to_all(joined.answer, there, back, topology)
            found = labels.gradients(answer, self._sums, 1 / max(1, self._samples))
            self._own.append(found.own)
            parts = all_to_all(found.features, dispatch.receive, dispatch.send, topology)
            total = torch.zeros(len(payload), self.width, dtype=parts.dtype, device=device)
            gradient[:, : self.width] = total.index_add_(0, samples, parts).mul_(GRID)
        return FusedOutput(joined.losses.sum(), gradient, joined.correct.sum())

    @torch.no_grad()
    @with_chosen_products
    def step(self, lr: float) -> None:
        """Update the rows touched since `plan`; see `Head`."""
        lr *= self.spec.config.optim.lr_scale
        for heads, gradient in self._sums.updates():
            self.optimizer.update(self.bank, heads, gradient, lr, self.step_number)
        if self._own:
            own = GradientFactors.join(self._own)
            for chunk in self._own_chunks():
                self.optimizer.update(
                    self.bank, chunk.heads, self._gradient(own, chunk), lr, self.step_number
                )
        self._own, self._sums = [], self._no_gradients()
        self.bank.release()
        self.norms.step()

    def _no_gradients(self) -> ExtraGradients:
        """Where those of the extra rows of a step go."""
        sums_once = self.accumulation_steps == 1 and isinstance(self.optimizer, RowSGD)
        takes_factors = sums_once and self.bank.takes_kernels
        return ExtraGradients(self._extra, self.margin.normalised, takes_factors)

    def _own_chunks(self) -> list[Chunk]:
        """The own heads of the step, each once, with its samples in their canonical order."""
        if self.accumulation_steps == 1:
            return self._chunks[0]
        heads = torch.cat([dispatch.own_heads for dispatch in self._dispatches])
        order = torch.cat([dispatch.own_numbers for dispatch in self._dispatches]).argsort()
        chunks = self._chunks_of(heads[order])
        return [replace(chunk, index=order[chunk.index]) for chunk in chunks]

    def _chunks_of(self, heads: Tensor) -> list[Chunk]:
        """Samples, or pairs, grouped by their own heads."""
        return chunks_by_head(heads, self.bank.units_per_chunk)

    def _gradient(self, own: GradientFactors, chunk: Chunk) -> LowRank:
        """Gradient of the rows of a chunk's heads."""
        index = to_device(chunk.index, self.topology.device)
        weights, features, radial = own.weights[index], own.features[index], own.radial[index]
        if chunk.padding is not None:
            padding = to_device(chunk.padding, weights.device).unsqueeze(-1)
            weights, radial = weights.masked_fill(padding, 0), radial.masked_fill(padding, 0)
        return LowRank(weights, features, radial.sum(1) if self.margin.normalised else None)
