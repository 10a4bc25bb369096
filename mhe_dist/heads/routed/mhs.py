"""Multi-Head Sampling by `route`: each embedding travels to the rank that owns its head.

Cost of a step: `B * (1 + m) * L * D` multiply-adds and the traffic of the touched rows; nothing is
proportional to C or to W. The loss and its gradient are formed in closed form while a chunk of
rows is in cache, so that a step reads each touched row once in the forward pass and reads and
writes it once in the update; no gradient of the size of the rows is kept.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mhe_dist import seeds
from mhe_dist.bank.row_optim import Dense, LowRank
from mhe_dist.distributed.collectives import all_to_all
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import HeadOutput, check_labels
from mhe_dist.heads.fused_loss import FusedLoss, FusedOutput
from mhe_dist.heads.grouping import Chunk, GradientFactors, chunks_by_head
from mhe_dist.heads.products import with_chosen_products
from mhe_dist.heads.routed.dispatch import Dispatch, plan_dispatch
from mhe_dist.heads.routed.softmax import ExtraGradient, routed_softmax
from mhe_dist.heads.row_head import HeadSpec, RowHead


class MhsRoute(RowHead):
    """Own head and m extra heads of its group for every sample; see `RowHead` for the arguments."""

    def __init__(self, spec: HeadSpec, topology: Topology) -> None:
        config = spec.config.mhs
        super().__init__(spec, topology, config.length, spec.repartition_steps)
        self.extra_heads = config.extra_heads if config.negatives != "own" else 0
        self._dispatches: list[Dispatch] = []
        self._chunks: list[list[Chunk]] = []
        self._extra: dict[int, Tensor] = {}
        self._own: list[GradientFactors] = []
        self._sums: dict[int, ExtraGradient] = {}
        self._next, self._samples = 0, 0

    def draw(self, step: int, group: int) -> Tensor:
        """The extra heads of a group in a step, ascending global numbers, int64 on the host."""
        heads = self.layout.group_heads(group)
        rng = seeds.generator(self.spec.seed, "extra heads", step, group)
        count = min(self.extra_heads, len(heads))
        drawn = seeds.sample_without_replacement(len(heads), count, rng)
        return torch.from_numpy(drawn) + heads.start

    def plan(self, step: int, labels: Tensor) -> None:
        """Draw the extra heads and find out to which rank each sample goes; see `Head`."""
        if labels.dim() > 2:
            raise ValueError(f"labels {tuple(labels.shape)}: this head takes one per sample")
        self.begin(step)
        self._next, self.accumulation_steps = 0, len(labels) // self.topology.world_size
        labels = check_labels(labels, self.spec.num_classes, self.spec.config.on_bad_label)
        self._samples = int((labels >= 0).sum())
        heads, slots = self.layout.locate(labels)
        present = set(self.layout.group_of(heads).unique().tolist())
        self._extra = {group: self.draw(step, group) for group in self.groups if group in present}
        shape, rank = (self.topology.world_size, self.accumulation_steps, -1), self.topology.rank
        heads, slots = heads.view(shape), slots.view(shape)
        numbers = torch.arange(labels.numel()).view(shape)
        self._dispatches = [
            plan_dispatch(self.layout, heads[:, i], slots[:, i], numbers[:, i], self._extra, rank)
            for i in range(self.accumulation_steps)
        ]
        own = [dispatch.heads[dispatch.own] for dispatch in self._dispatches]
        self._chunks = [chunks_by_head(heads, self.bank.units_per_chunk) for heads in own]
        self._own, self._sums = [], {group: ExtraGradient() for group in self._extra}
        self.bank.touch(torch.unique(torch.cat([*self._extra.values(), *own])))

    def units_of_step(self, step: int, labels: Tensor) -> Tensor:
        """Own heads, and the extra ones of this rank's groups; see `RowHead`."""
        heads = self.layout.locate(labels)[0].flatten()
        groups = self.layout.group_of(heads[self.bank.held(heads)]).unique()
        return torch.unique(torch.cat([heads, *(self.draw(step, g) for g in groups.tolist())]))

    def __call__(self, embeddings: Tensor, labels: Tensor) -> HeadOutput:
        """Loss of the next planned micro-batch; see `Head`."""
        dispatch, chunks = self._dispatches[self._next], self._chunks[self._next]
        self._next += 1
        features, norms = self.unpack(self._exchange(embeddings, dispatch))
        weight = self.topology.world_size * self.accumulation_steps / max(1, self._samples)
        score = partial(self._score, norms, dispatch, chunks)
        loss, accuracy = FusedLoss.apply(features, score, weight)
        seen = torch.full_like(accuracy, self._classes_seen(dispatch) * weight)
        return HeadOutput(loss, {"accuracy": accuracy, "classes_seen": seen})

    def _exchange(self, embeddings: Tensor, dispatch: Dispatch) -> Tensor:
        """Payload of the samples whose heads are here, in the sorted order of `dispatch`."""
        device = self.topology.device
        payload = self.payload(embeddings)[dispatch.send_order.to(device, non_blocking=True)]
        arrived = all_to_all(payload, dispatch.send, dispatch.receive, self.topology)
        return arrived[dispatch.order.to(device, non_blocking=True)]

    def _classes_seen(self, dispatch: Dispatch) -> int:
        """Sum over the samples of a dispatch of the classes in their softmax."""
        own = int(self.classes_in(dispatch.heads[dispatch.own]).sum())
        extra = {group: int(self.classes_in(heads).sum()) for group, heads in self._extra.items()}
        sizes = {part.group: part.samples.stop - part.samples.start for part in dispatch.groups}
        return own + sum(extra[group] * size for group, size in sizes.items())

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
        scores = routed_softmax(
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
        if with_grad:
            self._own.append(scores.own)
        return FusedOutput(scores.losses.sum(), scores.gradient, scores.correct.sum())

    @torch.no_grad()
    @with_chosen_products
    def step(self, lr: float) -> None:
        """Update the rows touched since `plan`; see `Head`."""
        lr *= self.spec.config.optim.lr_scale
        for group, sums in self._sums.items():
            heads, summed = self._extra[group], sums.total()
            if summed is not None:
                summed = summed.view(len(heads), -1, self.width)
                gradient = Dense(summed, None, self.margin.normalised)
                self.optimizer.update(self.bank, heads, gradient, lr, self.step_number)
        if self._own:
            own = GradientFactors.join(self._own)
            for chunk in self._own_chunks():
                self.optimizer.update(
                    self.bank, chunk.heads, self._gradient(own, chunk), lr, self.step_number
                )
        self._own, self._sums = [], {}
        self.bank.release()
        self.norms.step()

    def _own_chunks(self) -> list[Chunk]:
        """The own heads of the step, each once, with its samples in their canonical order."""
        if self.accumulation_steps == 1:
            return self._chunks[0]
        heads = torch.cat([d.heads[d.own] for d in self._dispatches])
        order = torch.cat([d.sample_numbers[d.own] for d in self._dispatches]).argsort()
        chunks = chunks_by_head(heads[order], self.bank.units_per_chunk)
        return [replace(chunk, index=order[chunk.index]) for chunk in chunks]

    def _gradient(self, own: GradientFactors, chunk: Chunk) -> LowRank:
        """Gradient of the rows of a chunk's heads."""
        index = chunk.index.to(self.topology.device, non_blocking=True)
        weights, features, radial = own.weights[index], own.features[index], own.radial[index]
        if chunk.padding is not None:
            padding = chunk.padding.to(weights.device, non_blocking=True).unsqueeze(-1)
            weights, radial = weights.masked_fill(padding, 0), radial.masked_fill(padding, 0)
        return LowRank(weights, features, radial.sum(1) if self.margin.normalised else None)
