"""A trained head as a module of torch alone, to be exported behind its backbone.

`Head.predict` computes in chunks that fit into memory, on any number of ranks, from rows that may
lie in a file; none of this can be traced. The modules here hold all rows in one process, in fixed
pieces, and answer the same classes:

    classifier = build_classifier(head, k=5)
    classes, scores = classifier(model(images))
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhe_dist.config.head import HeadConfig
from mhe_dist.errors import UserError
from mhe_dist.heads.base import Head
from mhe_dist.heads.margins import Margin
from mhe_dist.heads.multilevel.base import MixedRadix
from mhe_dist.heads.multilevel.cascade import MultiHeadCascade
from mhe_dist.heads.multilevel.losses import BinaryCrossEntropy
from mhe_dist.heads.multilevel.product import MultiHeadProduct, best_products
from mhe_dist.heads.multilevel.rows import Level
from mhe_dist.heads.row_head import RowHead, features_of

_FLOAT32: Final = 4  # bytes
PIECE: Final = 1 << 16  # rows that are scored at once: 16 MB of scores for 64 images


def classifier_bytes(config: HeadConfig, num_classes: int, dim: int) -> int:
    """Bytes of all rows that a head's classifier holds in float32; nothing is built for it.

    Args:
        config: of the head.
        num_classes: C.
        dim: D of the embeddings.
    """
    rows, projections = num_classes, 0
    if config.kind in ("mhp", "mhc"):
        radix = MixedRadix.of(num_classes, config.lengths, f"head.{config.kind}.lengths")
        first, *lower = (
            min(length, radix.prefixes(level)) for level, length in enumerate(radix.lengths)
        )
        if config.kind == "mhc":  # rows of the children of each parent, the last one's padded
            units = [radix.prefixes(level) for level in range(len(lower))]
            lower = [count * n for count, n in zip(units, radix.lengths[1:], strict=True)]
            projections = len(lower)
        rows = first + sum(lower)
    width = dim + (config.margin.kind == "none")
    return (rows * width + projections * dim * (dim + 1)) * _FLOAT32


def build_classifier(head: Head, k: int) -> nn.Module:
    """A module from embeddings `[B, D]` to the k best classes `[B, k]` and their scores `[B, k]`.

    Args:
        head: trained, all of it on this process, which is alone.
        k: classes to name.

    Returns:
        In evaluation mode. After `.half()` the rows are in float16; scores have the type of the
        embeddings all the same.

    Raises:
        UserError: k exceeds the number of classes.
    """
    if isinstance(head, RowHead):
        num_classes = head.spec.num_classes
    else:
        assert isinstance(head, (MultiHeadProduct, MultiHeadCascade))
        num_classes = head.radix.num_classes
    if k > num_classes:
        raise UserError(f"{k} best classes: the run has {num_classes:,} classes")
    if isinstance(head, RowHead):
        return RowClassifier(class_rows_in_order(head), head.margin, k).eval()
    if isinstance(head, MultiHeadProduct):
        rows = [level_rows(level) for level in head.levels.values()]
        return ProductClassifier(rows, head.radix, head.margin, k).eval()
    return _cascade_classifier(head, k).eval()


class RowClassifier(nn.Module):
    """Scores every class by its row: `s` times the cosine, or the inner product and the bias.

    Args:
        pieces: rows `[n, width]` in the order of the classes, normalised where the margin is.
        margin: gives the scale.
        k: classes to name.
    """

    def __init__(self, pieces: list[Tensor], margin: Margin, k: int) -> None:
        super().__init__()
        self.margin, self.k = margin, k
        self.rows = _constants(pieces)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, D]` -> classes int64 `[B, k]`, best first, and their scores."""
        features, first = features_of(embeddings, self.margin), 0
        best: list[Tensor] = []
        ids: list[Tensor] = []
        for rows in self.rows:
            scores, where = _products(features, rows).topk(min(self.k, rows.shape[0]), dim=1)
            best.append(scores)
            ids.append(where + first)
            first += rows.shape[0]
        scores, where = torch.cat(best, dim=1).topk(self.k, dim=1)
        return torch.cat(ids, dim=1).gather(1, where), scores * self.margin.scale


class ProductClassifier(nn.Module):
    """Composes the k best classes of the scores of their digits, exactly.

    Args:
        rows: `[n_h, width]` of each digit, normalised where the margin is.
        radix: the lengths of the digits, and C.
        margin: gives the scale.
        k: classes to name.
    """

    def __init__(self, rows: list[Tensor], radix: MixedRadix, margin: Margin, k: int) -> None:
        super().__init__()
        self.radix, self.margin, self.k = radix, margin, k
        self.rows = _constants(rows)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, D]` -> classes int64 `[B, k]`, best first, and the sums of their log-softmax."""
        features, scale = features_of(embeddings, self.margin), self.margin.scale
        scores = [(_products(features, rows) * scale).log_softmax(-1) for rows in self.rows]
        found = best_products(scores, self.radix, self.k)
        return found.classes, found.scores


class CascadeClassifier(nn.Module):
    """A beam search from level to level, as `MultiHeadCascade.predict`.

    Args:
        first: rows `[n_1, width]` of level 1, normalised where the margin is.
        lower: rows `[units, L, width]` of each level below, by parent; zero where there is no
            class.
        projections: `[D, D + 1]` of each level below, the bias last.
        radix: the lengths of the digits, and C.
        margin: gives the scale.
        offsets: of each level, what a logit is lowered by before the logarithm of its sigmoid is
            the score; None: that of a softmax is.
        k: classes to name.
        width: prefixes that go on to the next level.
    """

    def __init__(
        self,
        first: Tensor,
        lower: list[Tensor],
        projections: list[Tensor],
        radix: MixedRadix,
        margin: Margin,
        offsets: list[float] | None,
        k: int,
        width: int,
    ) -> None:
        super().__init__()
        self.radix, self.margin, self.offsets = radix, margin, offsets
        self.k, self.width = k, width
        self.first = _constants([first])
        self.lower, self.projections = _constants(lower), _constants(projections)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, D]` -> classes int64 `[B, k]`, best first, -1 for none, and the sums of log-scores.

        A beam may end in fewer than k classes.
        """
        scale = self.margin.scale
        logits = _products(features_of(embeddings, self.margin), self.first[0]) * scale
        paths, prefixes = self._log_scores(logits, 0).topk(min(self.width, logits.shape[1]), dim=1)
        for level, (rows, projection) in enumerate(
            zip(self.lower, self.projections, strict=True), 1
        ):
            projected = _products(F.pad(embeddings, (0, 1), value=1.0), projection)
            features = features_of(projected, self.margin)
            paths, prefixes = self._descend(features, rows, paths, prefixes, level)
        scores, where = paths.topk(self.k, dim=1)
        absent = scores == float("-inf")
        return prefixes.gather(1, where).masked_fill(absent, -1), scores

    def _descend(
        self, features: Tensor, rows: Tensor, paths: Tensor, prefixes: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        """The best children of prefixes `[B, m]`, whose rows are read one prefix after another."""
        length = rows.shape[1]
        scored = [
            torch.bmm(rows[unit].to(features.dtype), features.unsqueeze(2)).squeeze(2)
            for unit in prefixes.unbind(1)
        ]
        logits = torch.stack(scored, dim=1) * self.margin.scale
        children = prefixes.unsqueeze(2) * length + torch.arange(length, device=prefixes.device)
        absent = (children >= self.radix.prefixes(level)) | (paths == float("-inf")).unsqueeze(2)
        logits = logits.masked_fill(absent, float("-inf")).flatten(1)
        own = self._log_scores(logits, level) + paths.unsqueeze(2).expand_as(children).flatten(1)
        best, where = own.topk(min(self.width, own.shape[1]), dim=1)
        return best, children.flatten(1).gather(1, where)

    def _log_scores(self, logits: Tensor, level: int) -> Tensor:
        """Of all classes that are scored beside each other `[B, n]`."""
        if self.offsets is None:
            return logits.log_softmax(-1)
        return F.logsigmoid(logits - self.offsets[level])


def class_rows_in_order(head: RowHead) -> list[Tensor]:
    """All rows of a head by class, normalised where its margin is, in pieces of `PIECE`."""
    layout, class_rows, bank = head.layout, head.class_rows, head.bank
    count, slots = head.spec.num_classes, torch.arange(layout.length)
    pieces = [
        torch.empty(min(PIECE, count - start), head.width, dtype=head.spec.dtype)
        for start in range(0, count, PIECE)
    ]
    for start in range(0, layout.heads, bank.units_per_chunk):
        units = range(start, min(start + bank.units_per_chunk, layout.heads))
        rows = bank.read(units)
        rows = (rows * class_rows.inverse_norms(rows).unsqueeze(-1)).flatten(0, 1).cpu()
        ids = layout.classes(torch.tensor(units)[:, None], slots[None, :]).flatten()
        for number, piece in enumerate(pieces):
            here = ids.div(PIECE, rounding_mode="floor") == number
            piece[ids[here] - number * PIECE] = rows[here]
    return pieces


def level_rows(level: Level) -> Tensor:
    """All rows `[n, width]` of a level by class, on the host, normalised where its margin is."""
    bank, layout = level.bank, level.layout
    rows = torch.empty(layout.heads, layout.length, bank.width, dtype=bank.compute_dtype)
    for start in range(0, layout.heads, bank.units_per_chunk):
        units = range(start, min(start + bank.units_per_chunk, layout.heads))
        read = bank.read(units)
        rows[start : units.stop] = F.normalize(read, dim=-1) if level.normalised else read
    return rows.flatten(0, 1)


def _cascade_classifier(head: MultiHeadCascade, k: int) -> CascadeClassifier:
    first, *lower = head.levels.values()
    offsets = [loss.offset for loss in head.objectives if isinstance(loss, BinaryCrossEntropy)]
    return CascadeClassifier(
        level_rows(first),
        [level_rows(level).unflatten(0, (-1, level.layout.length)) for level in lower],
        [part.read().cpu() for part in head.projections.values()],
        head.radix,
        head.margin,
        offsets or None,
        k,
        max(k, head.candidates),
    )


def _constants(tensors: list[Tensor]) -> nn.ParameterList:
    """Tensors that are part of a module, and are not trained."""
    return nn.ParameterList([nn.Parameter(each, requires_grad=False) for each in tensors])


def _products(features: Tensor, rows: Tensor) -> Tensor:
    """`features @ rows.T` `[B, n]` in the type of the rows, given in that of the features."""
    return F.linear(features.to(rows.dtype), rows).to(features.dtype)
