"""Pairs of a sample and a unit of rows: how they reach the unit's rank, and are scored there.

Which pairs there are depends on what the samples' scores were one level above, so that, unlike
Multi-Head Sampling's, the split sizes are not known from the labels: they are exchanged on the
host, and a device is waited for once per level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.distributed.collectives import all_to_all
from mhe_dist.distributed.topology import Topology, owner_of
from mhe_dist.heads.grouping import LOGITS_BYTES, OwnScores, chunks_by_head
from mhe_dist.heads.margins import keep_negatives
from mhe_dist.heads.multilevel.losses import Objective
from mhe_dist.heads.multilevel.rows import Level


@dataclass(frozen=True)
class Pairs:
    """Pairs that a rank scores, all on the host.

    Attributes:
        units: global numbers `[n]`.
        samples: `[n]`, places in the features that arrived.
        golds: slots `[n, K]` of the sample's golds in the unit; -1 where a gold is elsewhere.
    """

    units: Tensor
    samples: Tensor
    golds: Tensor


class Exchange:
    """Brings a rank's pairs to the ranks that own the units, and the answers back.

    A sample's features travel once to each rank that needs them: traffic `min(k, W) * B * D`.

    Args:
        units: int64 `[B, k]` on the host, distinct units of each sample; -1 for none.
        golds: int64 `[B, K]` on the host, global classes; -1 for none.
        layout: which unit and group a class is in.
        topology: the ranks.

    Attributes:
        samples, columns: place in `units` of this rank's pairs `[p]`, by owner, on the host.
        pairs: what arrived here, `n` pairs.
    """

    def __init__(
        self, units: Tensor, golds: Tensor, layout: LabelLayout, topology: Topology
    ) -> None:
        self.topology, self.batch = topology, len(units)
        samples, columns = (units >= 0).nonzero(as_tuple=True)
        owner = owner_of(
            layout.group_of(units[samples, columns]), layout.groups, topology.world_size
        )
        order = torch.argsort(owner, stable=True)
        owner, self.samples, self.columns = owner[order], samples[order], columns[order]
        unit = units[self.samples, self.columns]
        slots = golds[self.samples] - (unit * layout.length)[:, None]
        slots = torch.where((slots < 0) | (slots >= layout.length), -1, slots)
        first = torch.ones_like(owner)
        first[1:] = (owner.diff() != 0) | (self.samples.diff() != 0)
        self._send = self._counts(owner)
        self._receive = self._meet(self._send)
        message = torch.cat([unit[:, None], first[:, None], slots], dim=1)
        arrived = self.ask(message)
        starts = arrived[:, 1]
        self.pairs = Pairs(arrived[:, 0], starts.cumsum(0) - 1, arrived[:, 2:])
        self._carried = self.samples[first.bool()]
        self._carry = self._counts(owner[first.bool()])
        self._carried_here = [int(part.sum()) for part in starts.split(self._receive)]

    def features(self, rows: Tensor) -> Tensor:
        """Features `[s, D]` that the arrived pairs refer to, of this rank's `[B, D]`."""
        carried = rows[self._carried.to(rows.device)]
        return all_to_all(carried, self._carry, self._carried_here, self.topology)

    def gradient(self, rows: Tensor) -> Tensor:
        """Gradients `[s, D]` of what `features` gave -> of this rank's features `[B, D]`."""
        returned = all_to_all(rows, self._carried_here, self._carry, self.topology)
        return sum_by(self._carried, returned, self.batch)

    def ask(self, values: Tensor) -> Tensor:
        """Send a row for each of this rank's pairs: `[p, ...]` -> `[n, ...]` as `pairs` lie."""
        return all_to_all(values, self._send, self._receive, self.topology)

    def answer(self, values: Tensor) -> Tensor:
        """The other way: `[n, ...]` as `pairs` lie -> `[p, ...]`."""
        return all_to_all(values, self._receive, self._send, self.topology)

    def _counts(self, owner: Tensor) -> list[int]:
        return torch.bincount(owner, minlength=self.topology.world_size).tolist()

    def _meet(self, send: list[int]) -> list[int]:
        ones = [1] * self.topology.world_size
        return all_to_all(torch.tensor(send), ones, ones, self.topology).tolist()


class PairScores(NamedTuple):
    """What the owner of the units says of each pair.

    Attributes:
        negatives: sum over the unit's negatives `[n]`, as the objective defines it.
        golds: cosines of the golds `[n, K]`; 0 where a gold is elsewhere.
        best: highest cosines of the unit's other classes `[n, m]`, -inf where there are fewer.
        slots: their slots `[n, m]`.
    """

    negatives: Tensor
    golds: Tensor
    best: Tensor
    slots: Tensor


class _Piece(NamedTuple):
    """Units `[T]` scored at once against pairs `[T, c]`, and where the golds are among them."""

    units: Tensor
    pairs: Tensor
    golds: tuple[Tensor, Tensor, Tensor]
    gold_pairs: tuple[Tensor, Tensor]


class Scorer:
    """Scores pairs against the rows of a level, in two passes around what the samples' ranks find.

    Args:
        level: whose rows.
        features: `[s, D]`.
        pairs: which of them meet which units.
        objective: the loss.
        scale: s of the logits.
        filter: negatives with a higher cosine do not count; 0 keeps all.
    """

    def __init__(
        self,
        level: Level,
        features: Tensor,
        pairs: Pairs,
        objective: Objective,
        scale: float,
        filter: float,
    ) -> None:
        self.level, self.pairs, self.objective = level, pairs, objective
        self.scale, self.filter = scale, filter
        self.samples = pairs.samples.to(features.device)
        self.features = features
        self._pieces = _cut(level, pairs)
        kept_bytes = len(pairs.units) * level.layout.length * features.element_size()
        self._kept: list[Tensor] | None = [] if kept_bytes <= LOGITS_BYTES else None

    def look(self, most: int) -> PairScores:
        """First pass: sum up the negatives, and find the `most` best of them for each pair."""
        count, device = len(self.pairs.units), self.features.device
        most = min(most, self.level.layout.length)
        scores = PairScores(
            self.features.new_empty(count),
            self.features.new_zeros(count, self.pairs.golds.shape[1]),
            self.features.new_empty(count, most),
            torch.empty(count, most, dtype=torch.int64, device=device),
        )
        for piece in self._pieces:
            cosine = self._cosine(piece, self.level.bank.read(piece.units))
            if self._kept is not None:
                self._kept.append(cosine)
            scores.golds[piece.gold_pairs] = cosine[piece.golds]
            others = self._others(piece, cosine)
            place = piece.pairs
            scores.best[place], scores.slots[place] = others.topk(most, dim=-1)
            scores.negatives[place] = self.objective.negatives(self._logits(others))
        return scores

    def finish(self, total: Tensor, golds: Tensor, share: float) -> Tensor:
        """Second pass: hand the rows' gradient to the level.

        Args:
            total: of each pair's sample `[n]`, see `Settled`.
            golds: derivative of the loss with respect to the golds' cosines `[n, K]`.
            share: scale of the rows' gradient, `1 / N`.

        Returns:
            Gradient of the sum of the losses with respect to the features `[s, D]`.
        """
        count, length = len(self.pairs.units), self.level.layout.length
        weights = self.features.new_empty(count, length)
        along, gradient = torch.empty_like(weights), self.features.new_empty(count, self.width)
        for number, piece in enumerate(self._pieces):
            rows = self.level.bank.read(piece.units)
            cosine = self._cosine(piece, rows) if self._kept is None else self._kept[number]
            logits, place = self._logits(self._others(piece, cosine)), piece.pairs
            weight = self.objective.derivative(logits, total[place].unsqueeze(-1)) * self.scale
            weight[piece.golds] = golds[piece.gold_pairs]
            inverse = self._inverse_norms(rows)
            weight.mul_(inverse)
            gradient[place] = torch.bmm(weight, rows)
            along[place] = (cosine * weight).mul_(inverse).mul_(-share)
            weights[place] = weight.mul_(share)
        scores = OwnScores(self.features[self.samples], weights, along)
        self.level.keep(self.pairs.units, scores)
        return sum_by(self.pairs.samples, gradient, len(self.features))

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.features.shape[1]

    def _cosine(self, piece: _Piece, rows: Tensor) -> Tensor:
        """Cosines `[T, c, L]`; inner products where rows are not normalised."""
        features = self.features[self.samples[piece.pairs]]
        return torch.bmm(features, rows.transpose(1, 2)).mul_(self._inverse_norms(rows))

    def _inverse_norms(self, rows: Tensor) -> Tensor:
        """`1 / |w|` `[T, 1, L]` of rows `[T, L, D]`, or ones where rows are not normalised."""
        if not self.level.normalised:
            return rows.new_ones(1, 1, 1)
        return torch.linalg.vector_norm(rows, dim=-1).clamp_min_(1e-12).reciprocal_().unsqueeze(1)

    def _others(self, piece: _Piece, cosine: Tensor) -> Tensor:
        """Cosines with -inf at golds and padding."""
        others = cosine.clone()
        others[piece.golds] = float("-inf")
        if (padding := self._padding(piece.units)) is not None:
            others.masked_fill_(padding.unsqueeze(1), float("-inf"))
        return others

    def _padding(self, units: Tensor) -> Tensor | None:
        """Which slots `[T, L]` of `units` hold no class; None if all do."""
        layout = self.level.layout
        if int(units.max() + 1) * layout.length <= layout.num_classes:
            return None
        classes = units[:, None] * layout.length + torch.arange(layout.length)
        return (classes >= layout.num_classes).to(self.features.device)

    def _logits(self, others: Tensor) -> Tensor:
        """Logits of the negatives, -inf where they do not count."""
        logits = others * self.scale
        if self.filter and self.level.normalised:
            logits.masked_fill_(~keep_negatives(others, self.filter), float("-inf"))
        return logits


def sum_by(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sum rows `[n, D]` with the same index: `[count, D]`, in the same order on every device.

    (`index_add_` adds in any order on a GPU, so that no two runs would be the same.) Memory: count
    times the most rows of one index.

    Args:
        index: `[n]` in `[0, count)`, on the host.
        rows: on the device.
        count: number of sums.
    """
    if not len(index):
        return rows.new_zeros(count, rows.shape[1])
    order, counts = torch.argsort(index, stable=True), torch.bincount(index, minlength=count)
    turn = torch.empty_like(index)
    turn[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
    spread = rows.new_zeros(count, int(counts.max()), rows.shape[1])
    spread[index.to(rows.device), turn.to(rows.device)] = rows
    return spread.sum(1)


def _cut(level: Level, pairs: Pairs) -> list[_Piece]:
    """Group pairs by unit into pieces whose rows and whose logits are bounded."""
    pieces, device = [], level.bank.device
    row_bytes = level.layout.length * level.bank.compute_dtype.itemsize
    for chunk in chunks_by_head(pairs.units, level.bank.units_at_once):
        most = max(1, LOGITS_BYTES // (len(chunk.heads) * row_bytes))
        for index in chunk.index.split(most, dim=1):
            golds = pairs.golds[index]
            unit, pair, gold = (golds >= 0).nonzero(as_tuple=True)
            where = (unit, pair, golds[unit, pair, gold])
            pieces.append(
                _Piece(
                    chunk.heads,
                    index.to(device),
                    (where[0].to(device), where[1].to(device), where[2].to(device)),
                    (index[unit, pair].to(device), gold.to(device)),
                )
            )
    return pieces
