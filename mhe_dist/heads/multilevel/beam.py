"""One micro-batch through one level of local classes, seen from the samples' rank.

The rank asks the owners of the units for what they make of its pairs (`pairs.py`), joins that into
each sample's loss (`objectives.py`), tells them, and gets the gradient of its features; with the
scores of the classes it also chooses the parents of the next level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mhe_dist.heads.multilevel.exchange import Exchange, Scorer, sum_by
from mhe_dist.heads.multilevel.rows import Level

if TYPE_CHECKING:
    from mhe_dist.heads.multilevel.base import LevelHead


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
        head: margin, objective.
        level: whose rows.
        features: `[B, width]` of this rank's samples, on the device.
        beam: the parents whose children are scored.
        golds: int64 `[B, K]` on the host, distinct prefixes of this level whose parents are in
            `beam`; -1 for none.
        most: children of each parent that may go on.
        training: whether the filter of suspicious negatives applies, and the scores along a path
            are logits and not log-scores. (Golds are not among the negatives then. For a softmax
            both differ by what is the same for all classes of a sample.)
    """

    def __init__(
        self,
        head: LevelHead,
        level: Level,
        features: Tensor,
        beam: Beam,
        golds: Tensor,
        most: int,
        training: bool = True,
    ) -> None:
        self.head, self.level, self.beam, self.golds = head, level, beam, golds
        self._features = features
        self.device, objective, scale = features.device, head.objective, head.margin.scale
        self.exchange = Exchange(beam.prefixes, golds, level.layout, level.topology)
        self._samples = self.exchange.samples.to(self.device)
        self._columns = self.exchange.columns.to(self.device)
        self.present = (golds >= 0).to(self.device)
        threshold = head.spec.config.margin.filter if training else 0.0
        here, pairs = self.exchange.features(features), self.exchange.pairs
        self._scorer = Scorer(level, here, pairs, objective, scale, threshold)
        scores = self._scorer.look(most)
        numbers = torch.cat([scores.negatives[:, None], scores.golds, scores.best], dim=1)
        numbers, slots = self.exchange.answer(numbers), self.exchange.answer(scores.slots)
        pieces = features.new_full(beam.prefixes.shape, objective.nothing)
        pieces[self._samples, self._columns] = numbers[:, 0]
        self.negatives = objective.join(pieces)
        self._normaliser = torch.zeros_like(self.negatives) if training else self.negatives
        count = golds.shape[1]
        golds_of_pairs = numbers[:, 1 : count + 1]
        self.cosines = sum_by(self.exchange.samples, golds_of_pairs, len(features))
        self.children, self.paths = self._pool(numbers[:, count + 1 :], slots)
        self.gold_paths = self._gold_paths()

    def _score(self, cosine: Tensor, normaliser: Tensor) -> Tensor:
        """What a class adds to its path."""
        return self.head.objective.log_score(cosine * self.head.margin.scale, normaliser)

    def _pool(self, best: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Best children `[B, k * m]` of all parents of each sample, and their paths."""
        where, shape = (self._samples, self._columns), (*self.beam.prefixes.shape, best.shape[1])
        units = self.beam.prefixes[self.exchange.samples, self.exchange.columns].to(self.device)
        children = torch.full(shape, -1, device=self.device)
        paths = best.new_full(shape, float("-inf"))
        children[where] = slots + (units * self.level.layout.length).unsqueeze(1)
        own = self._score(best, self._normaliser[self._samples].unsqueeze(1))
        paths[where] = own + self.beam.paths[where].unsqueeze(1)
        return children.flatten(1), paths.flatten(1)

    def _gold_paths(self) -> Tensor:
        """Paths of the golds `[B, K]`, -inf for none."""
        parents = torch.div(self.golds, self.level.layout.length, rounding_mode="floor")
        column = (self.beam.prefixes[:, None, :] == parents[:, :, None]).int().argmax(-1)
        above = self.beam.paths.gather(1, column.to(self.device))
        paths = above + self._score(self.cosines, self._normaliser.unsqueeze(1))
        return paths.masked_fill(~self.present, float("-inf"))

    @property
    def correct(self) -> Tensor:
        """Whether no class of the level that was scored has a better path than the best gold."""
        return self.present.any(1) & (self.gold_paths.amax(1) >= self.paths.amax(1))

    def classes_seen(self) -> int:
        """Classes scored, summed over this rank's samples."""
        units, layout = self.beam.prefixes[self.beam.prefixes >= 0], self.level.layout
        return int((layout.num_classes - units * layout.length).clamp(max=layout.length).sum())

    def train(self, norms: Tensor | None, share: float | None) -> tuple[Tensor, Tensor]:
        """Losses `[B]` and the gradient of their sum `[B, width]`; the level keeps its rows'.

        `share` is the scale of the rows' gradient; if None, no gradient is formed and it is zero.
        """
        head, shape = self.head, self.cosines.shape
        spread = None if norms is None else norms[:, None].expand(shape).flatten()
        mean, std = head.norms.running
        phi, slope = head.margin.target(self.cosines.flatten(), spread, mean, std)
        scale = head.margin.scale
        settled = head.objective.settle(self.negatives, phi.view(shape) * scale, self.present)
        if share is None:
            return settled.losses, torch.zeros_like(self._features)
        golds = settled.gold * slope.view(shape) * scale
        message = torch.cat([settled.total[:, None], golds], dim=1)[self._samples]
        arrived = self.exchange.ask(message)
        gradient = self._scorer.finish(arrived[:, 0], arrived[:, 1:], share)
        return settled.losses, self.exchange.gradient(gradient)

    def descend(self, most: int) -> Beam:
        """The `most` best prefixes of each sample, all golds first, however many they are."""
        golds = self.golds.to(self.device)
        prefixes = torch.cat([golds, self.children], dim=1)
        paths = torch.cat([self.gold_paths, self.paths], dim=1)
        order = paths.clone()
        order[:, : golds.shape[1]].masked_fill_(self.present, float("inf"))
        width = min(max(most, golds.shape[1]), order.shape[1])
        best, where = order.topk(width, dim=1)
        limit = self.present.sum(1, keepdim=True).clamp_min(most)
        absent = (best == float("-inf")) | (torch.arange(width, device=self.device) >= limit)
        chosen = prefixes.gather(1, where).masked_fill(absent, -1)
        return Beam(chosen.cpu(), paths.gather(1, where).masked_fill(absent, float("-inf")))
