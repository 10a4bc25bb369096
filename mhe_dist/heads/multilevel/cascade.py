"""Multi-Head Cascade: each level scores the children of the best prefixes of the level above.

Level 1 scores all its prefixes with a linear layer. Level h + 1 scores
`<Embedding[child], Linear_h(F)>` for the children of the k candidates of level h, which are the
best by the sum of the scores on their path and always include the targets' prefixes. The losses of
the levels are summed: cross-entropy, or with many labels per sample the binary cross-entropy of
every class that is scored.

The rows of level 1 and the projections are replicated. Those of a lower level, one per prefix and
in the last level one per class, are sharded by parent and updated only where a candidate's children
were scored. Padding prefixes, which begin no class, are masked and never updated.

Margins are those of the other heads: with a normalised one, a score is s times the cosine of a row
and the projected embedding, the margin applies to the targets of every level, and the projections
start as identities, so that a cascade begins as cosines with the embedding itself. `none` is the
paper's inner product, with a bias per row. With many labels per sample every score is lowered by an
offset of its level, since otherwise cosines must be negative for a class to be improbable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import TopK
from mhe_dist.heads.multilevel.base import LevelHead, LevelLoss, MixedRadix
from mhe_dist.heads.multilevel.beam import Beam, LevelPass
from mhe_dist.heads.multilevel.losses import BinaryCrossEntropy, CrossEntropy, Objective
from mhe_dist.heads.multilevel.rows import ReplicatedRows, ShardedLevel, SharedLevel
from mhe_dist.heads.row_head import PREDICT_BYTES, HeadSpec, features_of


class MultiHeadCascade(LevelHead):
    """A cascade of any number of levels; see the module.

    `accuracy` counts samples whose best path among those scored ends in a target; `classes_seen`
    counts the rows scored in all levels.
    """

    def __init__(self, spec: HeadSpec, topology: Topology) -> None:
        config = spec.config.mhc
        radix = MixedRadix.of(spec.num_classes, config.lengths, "head.mhc.lengths")
        super().__init__(spec, radix, topology, spec.config.cascade_is_multi_label)
        self.candidates = config.candidates
        purpose = "cascade level_1"
        first = SharedLevel(radix.prefixes(0), purpose, self.optimizer, spec, topology)
        self.levels["level_1"] = first
        for level, length in list(enumerate(radix.lengths))[1:]:
            name = f"level_{level + 1}"
            layout = LabelLayout(radix.prefixes(level), length, spec.config.chosen_groups, 0)
            purpose = f"cascade {name}"
            self.levels[name] = ShardedLevel(layout, purpose, self.optimizer, spec, topology)
            self.projections[f"projection_{level + 1}"] = ReplicatedRows(
                spec.width, spec.width + 1, self._identity, self.optimizer, spec, topology
            )
        self.objectives = [self._objective(level) for level in range(len(radix.lengths))]

    def _objective(self, level: int) -> Objective:
        """The loss of a level, from 0."""
        if not self.multi_label:
            return CrossEntropy()
        parents = min(self.candidates, self.radix.prefixes(level - 1)) if level else 1
        scored = min(parents * self.radix.lengths[level], self.radix.prefixes(level))
        # The cosine of two random directions has a variance of 1 / D. Of products it is not known.
        variance = self.margin.scale**2 / self.spec.width if self.margin.normalised else 0.0
        return BinaryCrossEntropy(BinaryCrossEntropy.offset_of(scored, variance))

    def _identity(self, units: Tensor) -> Tensor:
        """First rows of a projection, `[1, D, D + 1]`: the identity, and no bias."""
        eye = torch.eye(self.spec.width, dtype=self.spec.dtype, device=self.topology.device)
        return F.pad(eye, (0, 1)).unsqueeze(0)

    def level_features(self, embeddings: Tensor, projections: list[Tensor]) -> list[Tensor]:
        """The embedding for level 1, its projections for the others; see `LevelHead`."""
        projected = [F.linear(embeddings, rows[:, :-1], rows[:, -1]) for rows in projections]
        return [features_of(inputs, self.margin) for inputs in (embeddings, *projected)]

    def targets(self, labels: Tensor) -> list[Tensor]:
        """The distinct prefixes of each level; see `LevelHead`."""
        targets = []
        for level in range(len(self.radix.lengths)):
            prefixes = torch.where(labels < 0, -1, labels // self.radix.stride(level))
            prefixes = prefixes.sort(dim=-1).values
            again = F.pad(prefixes.diff(dim=-1) == 0, (1, 0))
            targets.append(prefixes.masked_fill(again, -1))
        return targets

    def score_levels(
        self,
        features: list[Tensor],
        targets: list[Tensor],
        norms: Tensor | None,
        share: float | None,
    ) -> LevelLoss:
        """From level to level; see `LevelHead`."""
        loss, beam = LevelLoss.zero(features[0]), Beam.root(features[0])
        for level, objective, inputs, target in zip(
            self.levels.values(), self.objectives, features, targets, strict=True
        ):
            level_pass = LevelPass(
                level, inputs, beam, target, self.candidates, objective, self.margin
            )
            losses, gradient = level_pass.train(norms, self.norms.running, share)
            loss = loss.add(losses, gradient, level_pass.classes_seen())
            if len(loss.gradients) < len(self.levels):
                beam = level_pass.descend(self.candidates)
        return loss._replace(correct=level_pass.correct)

    def predict(self, embeddings: Tensor, k: int) -> TopK:
        """Top-k by a beam of `max(k, candidates)`; scores are sums of log-scores; see `Head`."""
        return self._predict(embeddings, k, self.candidates)

    def predict_exhaustively(self, embeddings: Tensor, k: int) -> TopK:
        """As `predict`, by a beam so wide that every class is scored: C scores for each sample."""
        return self._predict(embeddings, k, self.radix.prefixes(len(self.levels) - 2))

    @torch.no_grad()
    def _predict(self, embeddings: Tensor, k: int, candidates: int) -> TopK:
        width = max(k, candidates)
        widest = max(level.layout.length for level in self.levels.values())
        size = max(1, PREDICT_BYTES // (8 * widest * width))
        count = all_reduce(torch.tensor(-(-len(embeddings) // size)), self.topology, "max")
        return TopK.join(
            [
                self._beam_search(embeddings[number * size : (number + 1) * size], k, width)
                for number in range(max(1, int(count)))
            ]
        )

    def _beam_search(self, embeddings: Tensor, k: int, width: int) -> TopK:
        """Top-k of some samples by a beam of `width` prefixes; a rank may have none."""
        projections = [part.read() for part in self.projections.values()]
        features = self.level_features(embeddings.to(self.spec.dtype), projections)
        beam = Beam.root(features[0])
        none = torch.empty(len(embeddings), 0, dtype=torch.int64)
        for level, objective, inputs in zip(
            self.levels.values(), self.objectives, features, strict=True
        ):
            level_pass = LevelPass(
                level, inputs, beam, none, width, objective, self.margin, training=False
            )
            beam = level_pass.descend(width)
        missing = (0, max(0, k - beam.prefixes.shape[1]))
        classes = F.pad(beam.prefixes[:, :k], missing, value=-1)
        scores = F.pad(beam.paths[:, :k], missing, value=float("-inf"))
        return TopK(classes.to(scores.device), scores)
