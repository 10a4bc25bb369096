"""What the heads that score a class digit by digit share: `product.py` and `cascade.py`.

Each level's loss is formed with its gradient (see `beam.py`). So rows and projections get theirs in
the forward pass, in the final scale; the embeddings' goes to autograd.
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

from mhe_dist.bank.class_layout import balanced_lengths
from mhe_dist.bank.row_optim import build_row_optimizer
from mhe_dist.bank.saved_rows import SavedRows
from mhe_dist.distributed.topology import Topology
from mhe_dist.distributed.transfer import to_device
from mhe_dist.errors import UserError
from mhe_dist.heads.base import (
    NO_SAMPLE,
    Head,
    HeadOutput,
    HeadState,
    check_label_lists,
    check_labels,
)
from mhe_dist.heads.fused_loss import FusedLoss, FusedOutput
from mhe_dist.heads.margins import Margin
from mhe_dist.heads.multilevel.rows import Level, ReplicatedRows, ShardedLevel
from mhe_dist.heads.products import with_chosen_products
from mhe_dist.heads.row_head import HeadSpec, NormTracker


@dataclass(frozen=True)
class MixedRadix:
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
    def of(num_classes: int, lengths: Sequence[int], key: str) -> MixedRadix:
        """The configured lengths, by default two near the root of C.

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
        return MixedRadix(num_classes, chosen)

    @property
    def last_digits(self) -> list[int]:
        """The digits of class C - 1."""
        last = self.num_classes - 1
        return [last // self.stride(level) % n for level, n in enumerate(self.lengths)]

    def stride(self, level: int) -> int:
        """Classes that share a prefix of `level` (from 0)."""
        return prod(self.lengths[level + 1 :])

    def prefixes(self, level: int) -> int:
        """Prefixes of `level` that begin a class: the first ones."""
        return -(-self.num_classes // self.stride(level))


class LevelLoss(NamedTuple):
    """What a micro-batch leads to in all levels.

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
    def zero(features: Tensor) -> LevelLoss:
        """Before any level: no loss, all correct."""
        losses = features.new_zeros(len(features))
        return LevelLoss(losses, [], torch.ones_like(losses, dtype=torch.bool), 0)

    def add(self, losses: Tensor, gradient: Tensor, classes_seen: int) -> LevelLoss:
        """With one more level, `correct` as it was."""
        seen = self.classes_seen + classes_seen
        return LevelLoss(self.losses + losses, [*self.gradients, gradient], self.correct, seen)


class LevelHead(Head):
    """A head of levels, each with a loss of its own; see `Head`.

    Args:
        spec: what to build.
        radix: how classes are cut into levels.
        topology: the ranks.
        multi_label: whether a sample has any number of labels, and the loss is binary.
    """

    def __init__(
        self, spec: HeadSpec, radix: MixedRadix, topology: Topology, multi_label: bool = False
    ) -> None:
        self.spec, self.radix, self.topology, self.multi_label = spec, radix, topology, multi_label
        self.margin = Margin(spec.config.margin).at(0)
        self.optimizer = build_row_optimizer(spec.config.optim)
        self.norms = NormTracker(spec, topology)
        self.accumulation_steps = spec.micro_batches // topology.world_size
        self.levels: dict[str, Level] = {}
        self.projections: dict[str, ReplicatedRows] = {}
        self._step, self._samples = 0, 0

    @abstractmethod
    def level_features(self, embeddings: Tensor, projections: list[Tensor]) -> list[Tensor]:
        """Features of each level, differentiable in `embeddings` `[B, D]` and `projections`."""

    @abstractmethod
    def targets(self, labels: Tensor) -> list[Tensor]:
        """Of labels `[B, K]`, distinct local classes of each level `[B, K]`; -1 for none."""

    @abstractmethod
    def score_levels(
        self,
        features: list[Tensor],
        targets: list[Tensor],
        norms: Tensor | None,
        share: float | None,
    ) -> LevelLoss:
        """Take a micro-batch through the levels.

        Args:
            features: `[B, width]` of each level.
            targets: as the method of that name gives them.
            norms: of the embeddings `[B]`, for margins that depend on them.
            share: scale of the rows' gradient, `1 / N`; None: it is not wanted.
        """

    def plan(self, step: int, labels: Tensor) -> None:
        """Check the labels and count the samples; see `Head`."""
        self._step, self.margin = step, self.margin.at(step)
        self.accumulation_steps = len(labels) // self.topology.world_size
        self._samples = int(self._kept(self._checked(labels)).sum())
        self.norms.begin()
        for part in (self.levels | self.projections).values():
            part.clear_gradient()

    def prefetch(self, step: int, labels: Tensor) -> None:
        """Nothing: the rows of a level are known only when the level above has been scored."""

    def _checked(self, labels: Tensor) -> Tensor:
        """Labels `[n, B, K]`: in `[0, C)`, or what stands for none; see `check_label_lists`.

        A head for one label per sample has -1 there, for whatever reason (`check_labels`).
        """
        if labels.dim() == 3 and not self.multi_label:
            raise ValueError(f"labels {tuple(labels.shape)}: this head takes one per sample")
        labels = labels if labels.dim() == 3 else labels.unsqueeze(-1)
        check = check_label_lists if self.multi_label else check_labels
        return check(labels, self.radix.num_classes, self.spec.config.on_bad_label)

    def _kept(self, checked: Tensor) -> Tensor:
        """Which of the checked labels `[..., B, K]` belong to a sample that counts."""
        return (checked != NO_SAMPLE).any(-1) if self.multi_label else checked[..., 0] >= 0

    def __call__(self, embeddings: Tensor, labels: Tensor) -> HeadOutput:
        """Loss of the next planned micro-batch; see `Head`. All ranks must call."""
        checked = self._checked(labels.unsqueeze(0))[0]
        kept = self._kept(checked).nonzero().squeeze(1)
        weight = self.topology.world_size * self.accumulation_steps / max(1, self._samples)
        seen: list[int] = []
        score = partial(self._score, checked[kept], to_device(kept, embeddings.device), seen)
        loss, correct = FusedLoss.apply(embeddings, score, weight)
        classes_seen = torch.full_like(correct, sum(seen) * weight)
        return HeadOutput(loss, {"accuracy": correct, "classes_seen": classes_seen})

    @with_chosen_products
    def _score(
        self, labels: Tensor, index: Tensor, seen: list[int], embeddings: Tensor, with_grad: bool
    ) -> FusedOutput:
        """Score the samples at `index` of `embeddings`; keep the rows' gradient if `with_grad`."""
        share = 1 / max(1, self._samples) if with_grad else None
        with torch.enable_grad():
            inputs = embeddings.detach()[index].to(self.spec.dtype).requires_grad_()
            projections = [part.read().requires_grad_() for part in self.projections.values()]
            features = self.level_features(inputs, projections)
        norms = None
        if self.norms.needed:
            all_norms = embeddings.detach().norm(dim=1).to(self.spec.dtype)
            self.norms.add(all_norms)
            norms = all_norms[index]
        detached = [of_level.detach() for of_level in features]
        loss = self.score_levels(detached, self.targets(labels), norms, share)
        seen.append(loss.classes_seen)
        grads = torch.autograd.grad(features, [inputs, *projections], loss.gradients)
        if share is not None:
            for part, gradient in zip(self.projections.values(), grads[1:], strict=True):
                part.add_gradient(gradient * share)
        gradient = torch.zeros_like(embeddings)
        gradient[index] = grads[0].to(gradient)
        correct = loss.correct.to(self.spec.dtype).sum()
        return FusedOutput(loss.losses.sum(), gradient, correct)

    @torch.no_grad()
    @with_chosen_products
    def step(self, lr: float) -> None:
        """Update the rows touched since `plan`; see `Head`."""
        if self._samples:
            for part in (self.levels | self.projections).values():
                part.update(lr * self.spec.config.optim.lr_scale, self._step)
        self.norms.step()

    def state(self) -> HeadState:
        """`<level>/<field>` and `<projection>/<field>` replicated, `rows/<group>/<level>/<field>`
        owned; see `Head`."""
        replicated: dict[str, Tensor] = {}
        owned: dict[str, Tensor | SavedRows] = {}
        for name, part in (self.levels | self.projections).items():
            state = part.state(name)
            replicated |= state.replicated
            owned |= state.owned
        if self.norms.needed:
            replicated["norms"] = self.norms.running.cpu()
        return HeadState(replicated, owned)

    def loads(self, name: str) -> bool:
        """Whether `name` is replicated or a tensor of one of this rank's groups."""
        parts = name.split("/")
        return parts[0] != "rows" or int(parts[1]) in self.topology.share(
            self.spec.config.chosen_groups
        )

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
