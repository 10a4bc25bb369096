"""What the heads share that score a class digit by digit: `mhp.py` and `mhc.py`.

Each level's loss is formed with its gradient (see `level_pass.py`), so that rows and projections
get theirs in the forward pass, with the final scale, and the embeddings' is handed to autograd.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.bank import row_optim as sparse_optim
from mhe_dist.bank.class_layout import balanced_lengths
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.base import NO_SAMPLE, Head, HeadOutput, check_labels
from mhe_dist.heads.fused_loss import ClosedForm, ClosedFormLoss
from mhe_dist.heads.margins import Margin
from mhe_dist.heads.multilevel.beam import LevelPass
from mhe_dist.heads.multilevel.losses import BinaryCrossEntropy, CrossEntropy, Objective
from mhe_dist.heads.multilevel.rows import Level, Replicated, ShardedLevel
from mhe_dist.heads.row_head import HeadSpec, NormTracker


@dataclass(frozen=True)
class Code:
    """The mixed radix of a head: which digits and prefixes have a class.

    A *prefix* of level h is what is left of a class when the digits below h are dropped. Padding
    classes are the last ones, and so are padding prefixes: those that begin no class.

    Attributes:
        num_classes: C.
        lengths: of each level, most significant first; their product is at least C.
    """

    num_classes: int
    lengths: tuple[int, ...]

    @staticmethod
    def of(num_classes: int, lengths: Sequence[int], key: str) -> Code:
        """The code of the configured lengths, by default two near the root of C.

        Raises:
            UserError: the lengths hold fewer than C classes; `key` is where they are configured.
        """
        chosen = tuple(lengths) or tuple(balanced_lengths(num_classes, 2))
        if prod(chosen) < num_classes:
            raise UserError(
                f"{key}={list(chosen)}: the product {prod(chosen)} is less than the "
                f"{num_classes} classes of data.shards; use e.g. "
                f"{balanced_lengths(num_classes, len(chosen))}, or leave it empty"
            )
        return Code(num_classes, chosen)

    def stride(self, level: int) -> int:
        """Classes that share a prefix of `level` (from 0)."""
        return prod(self.lengths[level + 1 :])

    def prefixes(self, level: int) -> int:
        """Prefixes of `level` that begin a class: the first ones."""
        return -(-self.num_classes // self.stride(level))


class Judged(NamedTuple):
    """What a head says of a micro-batch.

    Attributes:
        losses: `[B]`, summed over levels.
        gradients: of the sum of the losses with respect to each level's features.
        correct: `[B]`.
        classes_seen: sum over levels and samples.
    """

    losses: Tensor
    gradients: list[Tensor]
    correct: Tensor
    classes_seen: int

    @staticmethod
    def nothing(features: Tensor) -> Judged:
        """Before any level: no loss, all correct."""
        losses = features.new_zeros(len(features))
        return Judged(losses, [], torch.ones_like(losses, dtype=torch.bool), 0)

    def add(self, through: LevelPass, losses: Tensor, gradient: Tensor) -> Judged:
        """With one more level, `correct` as it was."""
        seen = self.classes_seen + through.classes_seen()
        return Judged(self.losses + losses, [*self.gradients, gradient], self.correct, seen)


class LevelHead(Head):
    """A head of levels, each with a loss of its own; see `Head`.

    Args:
        spec: what to build.
        code: how classes are cut into levels.
        topology: this rank's place.
        multi_label: whether a sample has any number of labels, and the loss is binary.
    """

    def __init__(
        self, spec: HeadSpec, code: Code, topology: Topology, multi_label: bool = False
    ) -> None:
        self.spec, self.code, self.topology, self.multi_label = spec, code, topology, multi_label
        self.objective: Objective = BinaryCrossEntropy() if multi_label else CrossEntropy()
        self.margin = Margin(spec.config.margin).at(0)
        self.optimizer = sparse_optim.build(spec.config.optim)
        self.norms = NormTracker(spec, topology)
        self.rounds = spec.micro_batches // topology.world_size
        self.levels: dict[str, Level] = {}
        self.projections: dict[str, Replicated] = {}
        self._step, self._samples = 0, 0

    @abstractmethod
    def views(self, embeddings: Tensor, projections: list[Tensor]) -> list[Tensor]:
        """Features of each level, differentiable in `embeddings` `[B, D]` and `projections`."""

    @abstractmethod
    def golds(self, labels: Tensor) -> list[Tensor]:
        """Of labels `[B, K]`, distinct local classes of each level `[B, K]`; -1 for none."""

    @abstractmethod
    def judge(
        self, features: list[Tensor], golds: list[Tensor], norms: Tensor | None, share: float | None
    ) -> Judged:
        """Take a micro-batch through the levels."""

    def plan(self, step: int, labels: Tensor) -> None:
        """Check the labels and count the samples; see `Head`."""
        self._step, self.margin = step, self.margin.at(step)
        self.rounds = len(labels) // self.topology.world_size
        self._samples = int(self._kept(self._checked(labels)).sum())
        for part in (*self.levels.values(), *self.projections.values()):
            part.drop()

    def expect(self, step: int, labels: Tensor) -> None:
        """Nothing: which rows a level meets is known when the level above was scored."""

    def _checked(self, labels: Tensor) -> Tensor:
        """Labels `[n, B, K]`: in `[0, C)`, or -1 for none, or `NO_SAMPLE` for what does not count.

        A sample does not count if it is not there or if none of its labels is good and one is bad;
        with many labels per sample it may have none at all.
        """
        if labels.dim() == 3 and not self.multi_label:
            raise ValueError(f"labels {tuple(labels.shape)}: this head takes one per sample")
        labels = labels if labels.dim() == 3 else labels.unsqueeze(-1)
        padding = labels == (-1 if self.multi_label else NO_SAMPLE)
        known = check_labels(
            labels.masked_fill(padding, NO_SAMPLE),
            self.code.num_classes,
            self.spec.config.on_bad_label,
        )
        bad = ((known < 0) & ~padding).any(-1, keepdim=True)
        return known.masked_fill(bad & ~(known >= 0).any(-1, keepdim=True), NO_SAMPLE)

    def _kept(self, checked: Tensor) -> Tensor:
        """Which of the checked labels `[..., B, K]` belong to a sample that counts."""
        return (checked != NO_SAMPLE).any(-1) if self.multi_label else checked[..., 0] >= 0

    def __call__(self, embeddings: Tensor, labels: Tensor) -> HeadOutput:
        """Loss of the next planned micro-batch; see `Head`. All ranks must call."""
        checked = self._checked(labels.unsqueeze(0))[0]
        kept = self._kept(checked).nonzero().squeeze(1)
        weight = self.topology.world_size * self.rounds / max(1, self._samples)
        seen: list[int] = []
        score = partial(self._score, checked[kept], kept.to(embeddings.device), seen)
        loss, correct = ClosedFormLoss.apply(embeddings, score, weight)
        classes_seen = torch.full_like(correct, sum(seen) * weight)
        return HeadOutput(loss, {"accuracy": correct, "classes_seen": classes_seen})

    def _score(
        self, labels: Tensor, place: Tensor, seen: list[int], embeddings: Tensor, keep: bool
    ) -> ClosedForm:
        """Score the samples at `place` of `embeddings`; keep what is learned, if asked."""
        share = 1 / max(1, self._samples) if keep else None
        with torch.enable_grad():
            inside = embeddings.detach()[place].to(self.spec.dtype).requires_grad_()
            learned = [part.read().requires_grad_() for part in self.projections.values()]
            views = self.views(inside, learned)
        norms = None
        if self.norms.needed:
            everyone = embeddings.detach().norm(dim=1).to(self.spec.dtype)
            self.norms.add(everyone)
            norms = everyone[place]
        judged = self.judge([view.detach() for view in views], self.golds(labels), norms, share)
        seen.append(judged.classes_seen)
        grads = torch.autograd.grad(views, [inside, *learned], judged.gradients)
        if share is not None:
            for part, gradient in zip(self.projections.values(), grads[1:], strict=True):
                part.add(gradient * share)
        gradient = torch.zeros_like(embeddings)
        gradient[place] = grads[0].to(gradient)
        correct = judged.correct.to(self.spec.dtype).sum()
        return ClosedForm(judged.losses.sum(), gradient, correct)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the rows touched since `plan`; see `Head`."""
        if self._samples:
            for part in (*self.levels.values(), *self.projections.values()):
                part.update(lr * self.spec.config.optim.lr_scale, self._step)
        self.norms.step()

    def state(self) -> dict[str, Tensor]:
        """`<level>/<field>` and `<projection>/<field>` replicated, `rows/<group>/<level>/<field>`
        sharded; see `Head`."""
        tensors: dict[str, Tensor] = {}
        for name, part in (self.levels | self.projections).items():
            tensors |= part.state(name)
        if self.norms.needed:
            tensors["norms"] = self.norms.running.cpu()
        return tensors

    def wants(self, name: str) -> bool:
        """Whether `name` is replicated or a tensor of one of this rank's groups."""
        parts = name.split("/")
        return parts[0] != "rows" or int(parts[1]) in self.topology.share(self.spec.config.groups)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the replicated rows and those of this rank's groups."""
        for name, part in (self.levels | self.projections).items():
            part.load(name, tensors)
        if self.norms.needed:
            self.norms.running = tensors["norms"].to(self.topology.device)

    def row_ranges(self) -> dict[str, tuple[int, int]]:
        """Global range of each sharded level's prefixes in each group; see `Head`."""
        ranges: dict[str, tuple[int, int]] = {}
        for name, level in self.levels.items():
            if isinstance(level, ShardedLevel):
                ranges |= level.row_ranges(name)
        return ranges
