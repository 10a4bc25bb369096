"""One micro-batch through one level of local classes, seen from the samples' rank.

The owners of the units score this rank's pairs (`exchange.py`). This rank joins their answers into
each sample's loss (`losses.py`), sends the derivatives back, and receives the gradient of its
features. From the scores of the classes it also chooses the parents of the next level.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.margins import Margin
from mhe_dist.heads.multilevel.exchange import Exchange, Scorer, sum_by
from mhe_dist.heads.multilevel.losses import Objective
from mhe_dist.heads.multilevel.rows import Level


class Beam(NamedTuple):
    """Prefixes of each sample that go down to the next level, best first.

    Attributes:
        prefixes: int64 `[B, k]` on the host; -1 for none.
        paths: `[B, k]`, sum of the scores of the prefix and of all that it descends from.
    """

    prefixes: Tensor
    paths: Tensor

    @staticmethod
    def root(features: Tensor) -> Beam:
        """The parent of all prefixes of the first level, for samples with `features` `[B, D]`."""
        batch = len(features)
        return Beam(torch.zeros(batch, 1, dtype=torch.int64), features.new_zeros(batch, 1))


class LevelPass:
    """One micro-batch in one level, seen from the samples' rank; all ranks must go through it.

    Args:
        level: the rows.
        features: `[B, width]` of this rank's samples, on the device.
        beam: the parents whose children are scored.
        targets: int64 `[B, K]` on the host, distinct prefixes of this level whose parents are in
            `beam`; -1 for none.
        limit: children of each parent that may go on.
        objective: the loss of the level.
        margin: that of the step.
        training: whether the filter of suspicious negatives applies, and the scores along a path
            are logits and not log-scores. (Targets are not among the negatives then. For a softmax
            the two differ by the same amount for all classes of a sample.)
    """

    def __init__(
        self,
        level: Level,
        features: Tensor,
        beam: Beam,
        targets: Tensor,
        limit: int,
        objective: Objective,
        margin: Margin,
        training: bool = True,
    ) -> None:
        self.level, self.beam, self.targets = level, beam, targets
        self.objective, self.margin = objective, margin
        self._features, self.device = features, features.device
        self.exchange = Exchange(beam.prefixes, targets, level.layout, level.topology)
        if training:
            level.bank.touch(self.exchange.pairs.units)
        self._samples = to_device(self.exchange.samples, self.device)
        self._columns = to_device(self.exchange.columns, self.device)
        self.present = to_device(targets >= 0, self.device)
        self._scorer = Scorer(
            level,
            self.exchange.features(features),
            self.exchange.pairs,
            objective,
            margin.scale,
            filter=margin.filter if training else 0.0,
        )
        scores = self._scorer.score(limit)
        numbers = torch.cat([scores.negatives[:, None], scores.targets, scores.best], dim=1)
        numbers, slots = self.exchange.send_back(numbers), self.exchange.send_back(scores.slots)
        parts = features.new_full(beam.prefixes.shape, objective.empty)
        parts[self._samples, self._columns] = numbers[:, 0]
        self.negatives = objective.join(parts)
        self._normaliser = torch.zeros_like(self.negatives) if training else self.negatives
        count = targets.shape[1]
        targets_of_pairs = numbers[:, 1 : count + 1]
        self.target_cosines = sum_by(self.exchange.samples, targets_of_pairs, len(features))
        self.children, self.paths = self._pool(numbers[:, count + 1 :], slots)
        self.target_paths = self._target_paths()

    def _score(self, cosine: Tensor, normaliser: Tensor) -> Tensor:
        """What a class adds to its path."""
        logits = self.objective.logits(cosine, self.margin.scale)
        return self.objective.log_score(logits, normaliser)

    def _pool(self, best: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Best children `[B, k * m]` of all parents of each sample, and their paths."""
        where, batch = (self._samples, self._columns), self.beam.prefixes.shape
        shape = (batch[0], batch[1], best.shape[1])
        units = self.beam.prefixes[self.exchange.samples, self.exchange.columns]
        units = to_device(units, self.device)
        children = torch.full(shape, -1, device=self.device)
        paths = best.new_full(shape, float("-inf"))
        children[where] = slots + (units * self.level.layout.length).unsqueeze(1)
        own = self._score(best, self._normaliser[self._samples].unsqueeze(1))
        paths[where] = own + self.beam.paths[where].unsqueeze(1)
        return children.flatten(1), paths.flatten(1)

    def _target_paths(self) -> Tensor:
        """Paths of the targets `[B, K]`, -inf for none."""
        parents = torch.div(self.targets, self.level.layout.length, rounding_mode="floor")
        column = (self.beam.prefixes[:, None, :] == parents[:, :, None]).int().argmax(-1)
        above = self.beam.paths.gather(1, to_device(column, self.device))
        paths = above + self._score(self.target_cosines, self._normaliser.unsqueeze(1))
        return paths.masked_fill(~self.present, float("-inf"))

    @property
    def correct(self) -> Tensor:
        """Whether the best target has a better path than all other classes that were scored."""
        return self.present.any(1) & (self.target_paths.amax(1) > self.paths.amax(1))

    def classes_seen(self) -> int:
        """Classes scored, summed over this rank's samples."""
        units, layout = self.beam.prefixes[self.beam.prefixes >= 0], self.level.layout
        return int((layout.num_classes - units * layout.length).clamp(max=layout.length).sum())

    def train(
        self, norms: Tensor | None, norm_statistics: Tensor, share: float | None
    ) -> tuple[Tensor, Tensor]:
        """Losses `[B]` and the gradient of their sum `[B, width]`; the level keeps its rows'.

        Args:
            norms: of the embeddings `[B]`, for margins that depend on them.
            norm_statistics: AdaFace's running mean and deviation `[2]`.
            share: scale of the rows' gradient, `1 / N`; None: no gradient is formed, and zeros are
                returned.
        """
        shape, scale = self.target_cosines.shape, self.margin.scale
        spread = None if norms is None else norms[:, None].expand(shape).flatten()
        mean, std = norm_statistics
        phi, slope = self.margin.target(self.target_cosines.flatten(), spread, mean, std)
        logits = self.objective.logits(phi.view(shape), scale)
        result = self.objective.loss_and_grad(self.negatives, logits, self.present)
        if share is None:
            return result.losses, torch.zeros_like(self._features)
        grad = result.target_grad * slope.view(shape) * scale
        message = torch.cat([result.normaliser[:, None], grad], dim=1)[self._samples]
        arrived = self.exchange.send(message)
        gradient = self._scorer.finish(arrived[:, 0], arrived[:, 1:], share)
        return result.losses, self.exchange.gradient(gradient)

    def descend(self, width: int) -> Beam:
        """The `width` best prefixes of each sample; all targets first, however many they are."""
        targets = to_device(self.targets, self.device)
        prefixes = torch.cat([targets, self.children], dim=1)
        paths = torch.cat([self.target_paths, self.paths], dim=1)
        order = paths.clone()
        order[:, : targets.shape[1]].masked_fill_(self.present, float("inf"))
        columns = min(max(width, targets.shape[1]), order.shape[1])
        best, where = order.topk(columns, dim=1)
        count = self.present.sum(1, keepdim=True).clamp_min(width)
        absent = (best == float("-inf")) | (torch.arange(columns, device=self.device) >= count)
        chosen = prefixes.gather(1, where).masked_fill(absent, -1)
        return Beam(chosen.cpu(), paths.gather(1, where).masked_fill(absent, float("-inf")))
