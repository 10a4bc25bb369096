"""Multi-Head Product: a classifier for each digit of the class, all on the same embedding.

Padding: classes from C on are the last ones in the order of the digits. A digit that no class has
gets no row, so that it is neither a negative nor a prediction. Which digits of a lower head are
padding depends on the digits above it; there every digit belongs to some class (unless all digits
above are zero in every class), so all of them are trained, and `predict` leaves out the products
that are padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhe_dist.bank.class_layout import digits
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import TopK
from mhe_dist.heads.multilevel.base import LevelHead, LevelLoss, MixedRadix
from mhe_dist.heads.multilevel.beam import Beam, LevelPass
from mhe_dist.heads.multilevel.losses import CrossEntropy
from mhe_dist.heads.multilevel.rows import SharedLevel
from mhe_dist.heads.row_head import PREDICT_BYTES, HeadSpec, features_of


class MultiHeadProduct(LevelHead):
    """One linear layer of `sum(n_h)` rows, replicated, and a cross-entropy per head, summed.

    `accuracy` counts samples whose digits are all right, `classes_seen` the rows of all heads. The
    margin applies to the target of every head.
    """

    def __init__(self, spec: HeadSpec, topology: Topology) -> None:
        radix = MixedRadix.of(spec.num_classes, spec.config.mhp.lengths, "head.mhp.lengths")
        super().__init__(spec, radix, topology)
        for head, length in enumerate(radix.lengths):
            used, name = min(length, radix.prefixes(head)), f"head_{head + 1}"
            purpose = f"product {name}"
            self.levels[name] = SharedLevel(used, purpose, self.optimizer, spec, topology)

    def level_features(self, embeddings: Tensor, projections: list[Tensor]) -> list[Tensor]:
        """The same features for each head; see `LevelHead`."""
        return [features_of(embeddings, self.margin)] * len(self.levels)

    def targets(self, labels: Tensor) -> list[Tensor]:
        """The digits; see `LevelHead`."""
        return list(digits(labels, self.radix.lengths).unbind(-1))

    def score_levels(
        self,
        features: list[Tensor],
        targets: list[Tensor],
        norms: Tensor | None,
        share: float | None,
    ) -> LevelLoss:
        """Every head on its own; see `LevelHead`."""
        loss = LevelLoss.zero(features[0])
        for level, inputs, target in zip(self.levels.values(), features, targets, strict=True):
            beam = Beam.root(inputs)
            level_pass = LevelPass(level, inputs, beam, target, 1, CrossEntropy(), self.margin)
            losses, gradient = level_pass.train(norms, self.norms.running, share)
            loss = loss.add(losses, gradient, level_pass.classes_seen())
            loss = loss._replace(correct=loss.correct & level_pass.correct)
        return loss

    @torch.no_grad()
    def predict(self, embeddings: Tensor, k: int) -> TopK:
        """Exact top-k over all classes; scores are sums of log-softmax; see `Head`."""
        row_bytes = sum(level.layout.length for level in self.levels.values()) * 8
        return TopK.join(
            [
                best_products(self._log_scores(part), self.radix, k)
                for part in embeddings.split(max(1, PREDICT_BYTES // row_bytes))
            ]
        )

    def _log_scores(self, embeddings: Tensor) -> list[Tensor]:
        features = features_of(embeddings.to(self.spec.dtype), self.margin)
        scores = []
        for level in self.levels.values():
            rows = level.bank.read(torch.zeros(1).long())[0]
            if self.margin.normalised:
                rows = torch.nn.functional.normalize(rows, dim=1)
            scores.append((features @ rows.T * self.margin.scale).log_softmax(-1))
        return scores


def best_products(scores: list[Tensor], radix: MixedRadix, k: int) -> TopK:
    """The k best sums of one score per digit, over the C classes, exactly.

    Head by head, the k best *free* prefixes are kept, those that are less than the prefix of class
    C - 1, so that any digits may follow. A better completion of a prefix that is not among them
    would have k better ones before it. Beside them goes the one *tight* prefix, that of class
    C - 1; it becomes free with any digit below that class's next digit. Cost: k * k for each
    sample and head, beside the top-k of its scores.

    Args:
        scores: `[B, n_h]` of each head; fewer columns where digits are padding.
        radix: the lengths and C.
        k: classes wanted; more than C give class -1 with score -inf.
    """
    batch, last = scores[0].shape[0], radix.last_digits
    free, paths = scores[0].new_empty(batch, 0).long(), scores[0].new_empty(batch, 0)
    tight, tight_path = 0, scores[0].new_zeros(batch, 1)
    for length, own, bound in zip(radix.lengths, scores, last, strict=True):
        found: list[TopK] = []  # without empty parts, which an exported model cannot do with
        if free.shape[1]:
            best, digit = own.topk(min(k, own.shape[1]), dim=1)
            prefixes = (free.unsqueeze(2) * length + digit.unsqueeze(1)).flatten(1)
            found.append(TopK(prefixes, (paths.unsqueeze(2) + best.unsqueeze(1)).flatten(1)))
        if bound:
            best, digit = own[:, :bound].topk(min(k, bound), dim=1)
            found.append(TopK(tight * length + digit, tight_path + best))
        if found:
            free, paths = _best(found, k)
        tight, tight_path = tight * length + bound, tight_path + own[:, bound : bound + 1]
    found = [TopK(free, paths)] if free.shape[1] else []
    found.append(TopK(torch.full_like(tight_path, tight, dtype=torch.int64), tight_path))
    if missing := max(0, k - free.shape[1] - 1):
        filler = tight_path.new_full((batch, missing), float("-inf"))
        found.append(TopK(torch.full_like(filler, -1, dtype=torch.int64), filler))
    return _best(found, k)


def _best(parts: list[TopK], k: int) -> TopK:
    """The k best of classes, or prefixes, in parts `[B, n]`; all of them if there are fewer."""
    scores = torch.cat([part.scores for part in parts], dim=1)
    best, where = scores.topk(min(k, scores.shape[1]), dim=1)
    return TopK(torch.cat([part.classes for part in parts], dim=1).gather(1, where), best)
