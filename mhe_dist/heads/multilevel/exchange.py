"""Pairs of a sample and a unit of rows: they travel to the unit's rank and are scored there.

The pairs depend on the samples' scores one level above. So the split sizes are not known from the
labels, unlike those of Multi-Head Sampling: they are exchanged on the host, which waits for the
device once per level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.distributed.collectives import all_to_all
from mhe_dist.distributed.topology import Topology, owner_of
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.class_rows import hide, padding_slots
from mhe_dist.heads.grouping import GradientFactors, chunks_by_head
from mhe_dist.heads.margins import keep_negatives
from mhe_dist.heads.multilevel.losses import Objective
from mhe_dist.heads.multilevel.rows import Level
from mhe_dist.sizes import LOGITS_BYTES


@dataclass(frozen=True)
class UnitPairs:
    """Pairs that a rank scores, all on the host.

    Attributes:
        units: global numbers `[n]`.
        samples: `[n]`, positions in the features that arrived.
        targets: slots `[n, K]` of the sample's targets in the unit; -1 where a target is elsewhere.
    """

    units: Tensor
    samples: Tensor
    targets: Tensor


class Exchange:
    """Brings a rank's pairs to the ranks that own the units, and the answers back.

    A sample's features travel once to each rank that needs them: traffic `min(k, W) * B * D`.

    Args:
        units: int64 `[B, k]` on the host, distinct units of each sample; -1 for none.
        targets: int64 `[B, K]` on the host, global classes; -1 for none.
        layout: which unit and group a class is in.
        topology: the ranks.

    Attributes:
        samples, columns: position in `units` of this rank's pairs `[p]`, by owner, on the host.
        pairs: those that arrived here, `n` pairs.
    """

    def __init__(
        self, units: Tensor, targets: Tensor, layout: LabelLayout, topology: Topology
    ) -> None:
        self.topology, self.batch = topology, len(units)
        samples, columns = (units >= 0).nonzero(as_tuple=True)
        owner = owner_of(
            layout.group_of(units[samples, columns]), layout.groups, topology.world_size
        )
        order = torch.argsort(owner, stable=True)
        owner, self.samples, self.columns = owner[order], samples[order], columns[order]
        unit = units[self.samples, self.columns]
        slots = targets[self.samples] - (unit * layout.length)[:, None]
        slots = torch.where((slots < 0) | (slots >= layout.length), -1, slots)
        first = torch.ones_like(owner)
        first[1:] = (owner.diff() != 0) | (self.samples.diff() != 0)
        self._send_counts = self._counts(owner)
        self._receive_counts = self._exchange_counts(self._send_counts)
        message = torch.cat([unit[:, None], first[:, None], slots], dim=1)
        arrived = self.send(message)
        starts = arrived[:, 1]
        self.pairs = UnitPairs(arrived[:, 0], starts.cumsum(0) - 1, arrived[:, 2:])
        self._feature_samples = self.samples[first.bool()]
        self._feature_counts = self._counts(owner[first.bool()])
        self._feature_counts_here = [int(part.sum()) for part in starts.split(self._receive_counts)]

    def features(self, rows: Tensor) -> Tensor:
        """Features `[s, D]` that the arrived pairs refer to, of this rank's `[B, D]`."""
        carried = rows[to_device(self._feature_samples, rows.device)]
        return all_to_all(carried, self._feature_counts, self._feature_counts_here, self.topology)

    def gradient(self, rows: Tensor) -> Tensor:
        """Gradients `[s, D]` of what `features` gave -> of this rank's features `[B, D]`."""
        returned = all_to_all(rows, self._feature_counts_here, self._feature_counts, self.topology)
        return sum_by(self._feature_samples, returned, self.batch)

    def send(self, values: Tensor) -> Tensor:
        """Send a row for each pair of this rank: `[p, ...]` -> `[n, ...]`, ordered as `pairs`."""
        return all_to_all(values, self._send_counts, self._receive_counts, self.topology)

    def send_back(self, values: Tensor) -> Tensor:
        """The other way: `[n, ...]` ordered as `pairs` -> `[p, ...]`."""
        return all_to_all(values, self._receive_counts, self._send_counts, self.topology)

    def _counts(self, owner: Tensor) -> list[int]:
        return torch.bincount(owner, minlength=self.topology.world_size).tolist()

    def _exchange_counts(self, send: list[int]) -> list[int]:
        ones = [1] * self.topology.world_size
        return all_to_all(torch.tensor(send), ones, ones, self.topology).tolist()


class UnitScores(NamedTuple):
    """What the owner of the units finds for each pair.

    Attributes:
        negatives: sum over the unit's negatives `[n]`, as the objective defines it.
        targets: cosines of the targets `[n, K]`; 0 where a target is elsewhere.
        best: highest cosines of the unit's other classes `[n, m]`, -inf where there are fewer.
        slots: their slots `[n, m]`.
    """

    negatives: Tensor
    targets: Tensor
    best: Tensor
    slots: Tensor


class _PairChunk(NamedTuple):
    """Units `[T]` scored together against pairs `[T, c]`, and where the targets are among them.

    Attributes:
        targets: index of the targets in the cosines `[T, c, L]`.
        target_pairs: index of the same targets in the targets of all pairs `[n, K]`.
    """

    units: Tensor
    pairs: Tensor
    targets: tuple[Tensor, Tensor, Tensor]
    target_pairs: tuple[Tensor, Tensor]


class Scorer:
    """Scores pairs against the rows of a level, in two passes.

    Between them the samples' ranks find the normalisers.

    Args:
        level: the rows.
        features: `[s, D]`.
        pairs: which of them are scored against which units.
        objective: the loss.
        scale: s of the logits.
        filter: negatives with a higher cosine do not count; 0 keeps all.
    """

    def __init__(
        self,
        level: Level,
        features: Tensor,
        pairs: UnitPairs,
        objective: Objective,
        scale: float,
        filter: float,
    ) -> None:
        self.level, self.pairs, self.objective = level, pairs, objective
        self.scale, self.filter = scale, filter
        self.samples = to_device(pairs.samples, features.device)
        self.features = features
        self._chunks = _chunk_pairs(level, pairs)
        kept_bytes = len(pairs.units) * level.layout.length * features.element_size()
        self._kept: list[Tensor] | None = [] if kept_bytes <= LOGITS_BYTES else None

    def score(self, limit: int) -> UnitScores:
        """First pass: sum up the negatives, and find the `limit` best of them for each pair."""
        count, device = len(self.pairs.units), self.features.device
        limit = min(limit, self.level.layout.length)
        scores = UnitScores(
            self.features.new_empty(count),
            self.features.new_zeros(count, self.pairs.targets.shape[1]),
            self.features.new_empty(count, limit),
            torch.empty(count, limit, dtype=torch.int64, device=device),
        )
        for chunk in self._chunks:
            cosine = self._cosine(chunk, *self._rows(chunk))
            if self._kept is not None:
                self._kept.append(cosine)
            scores.targets[chunk.target_pairs] = cosine[chunk.targets]
            others, index = self._others(chunk, cosine), chunk.pairs
            scores.best[index], scores.slots[index] = others.topk(limit, dim=-1)
            scores.negatives[index] = self.objective.negatives(self._logits(others))
        return scores

    def finish(self, normaliser: Tensor, target_grad: Tensor, share: float) -> Tensor:
        """Second pass: hand the rows' gradient to the level.

        Args:
            normaliser: of each pair's sample `[n]`, see `LossAndGrad`.
            target_grad: derivative of the loss with respect to the targets' cosines `[n, K]`.
            share: scale of the rows' gradient, `1 / N`.

        Returns:
            Gradient of the sum of the losses with respect to the features `[s, D]`.
        """
        count, length = len(self.pairs.units), self.level.layout.length
        weights = self.features.new_empty(count, length)
        radial, gradient = torch.empty_like(weights), self.features.new_empty(count, self.width)
        for number, chunk in enumerate(self._chunks):
            rows, inverse = self._rows(chunk)
            kept = self._kept
            cosine = self._cosine(chunk, rows, inverse) if kept is None else kept[number]
            logits, index = self._logits(self._others(chunk, cosine)), chunk.pairs
            weight = self.objective.derivative(logits, normaliser[index].unsqueeze(-1))
            weight = weight * self.scale
            weight[chunk.targets] = target_grad[chunk.target_pairs]
            weight.mul_(inverse)
            gradient[index] = torch.bmm(weight, rows)
            radial[index] = (cosine * weight).mul_(inverse).mul_(-share)
            weights[index] = weight.mul_(share)
        factors = GradientFactors(self.features[self.samples], weights, radial)
        self.level.add_gradient(self.pairs.units, factors)
        return sum_by(self.pairs.samples, gradient, len(self.features))

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.features.shape[1]

    def _rows(self, chunk: _PairChunk) -> tuple[Tensor, Tensor]:
        """Rows `[T, L, D]`, and `1 / |w|` `[T, 1, L]`, ones where rows are not normalised."""
        rows, inverse = self.level.bank.read_for_products(chunk.units, self.level.normalised)
        return rows, inverse.unsqueeze(1)

    def _cosine(self, chunk: _PairChunk, rows: Tensor, inverse: Tensor) -> Tensor:
        """Cosines `[T, c, L]`; inner products where rows are not normalised."""
        features = self.features[self.samples[chunk.pairs]]
        return torch.bmm(features, rows.transpose(1, 2)).mul_(inverse)

    def _others(self, chunk: _PairChunk, cosine: Tensor) -> Tensor:
        """Cosines with -inf at targets and padding."""
        others = cosine.clone()
        hide(others, chunk.targets)
        if (padding := self._padding(chunk.units)) is not None:
            others.masked_fill_(padding.unsqueeze(1), float("-inf"))
        return others

    def _padding(self, units: Tensor) -> Tensor | None:
        """Which slots `[T, L]` of `units` hold no class; None if all do."""
        return padding_slots(self.level.layout, units, self.features.device)

    def _logits(self, others: Tensor) -> Tensor:
        """Logits of the negatives, -inf where they do not count."""
        logits = self.objective.logits(others, self.scale)
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
    rank = torch.empty_like(index)  # of a row among those with the same index
    rank[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
    spread = rows.new_zeros(count, int(counts.max()), rows.shape[1])
    spread[to_device(index, rows.device), to_device(rank, rows.device)] = rows
    return spread.sum(1)


def _chunk_pairs(level: Level, pairs: UnitPairs) -> list[_PairChunk]:
    """Group pairs by unit into chunks whose rows and whose logits are bounded in size."""
    chunks, device = [], level.bank.device
    row_bytes = level.layout.length * level.bank.compute_dtype.itemsize
    for chunk in chunks_by_head(pairs.units, level.bank.units_per_chunk):
        limit = max(1, LOGITS_BYTES // (len(chunk.heads) * row_bytes))
        for index in chunk.index.split(limit, dim=1):
            targets = pairs.targets[index]
            unit, pair, target = (targets >= 0).nonzero(as_tuple=True)
            slots = targets[unit, pair, target]
            chunks.append(
                _PairChunk(
                    chunk.heads,
                    to_device(index, device),
                    (to_device(unit, device), to_device(pair, device), to_device(slots, device)),
                    (to_device(index[unit, pair], device), to_device(target, device)),
                )
            )
    return chunks
