"""Multi-Head Product and Cascade by their definition: one process, float64, autograd, loops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log, prod, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import NO_SAMPLE
from mhe_dist.heads.multilevel.base import LevelHead
from mhe_dist.heads.registry import build_head
from tests.support.heads.head_jobs import LR, STEPS, Job
from tests.support.heads.head_outcomes import comparison
from tests.support.heads.reference import DenseHead


@dataclass
class PlainLevels:
    """Every level's rows `[prefixes, width]` and every projection `[D, D + 1]`, in full.

    `layers` names them as the state of the head does.
    """

    config: HeadConfig
    num_classes: int
    lengths: list[int]
    layers: dict[str, DenseHead]

    @staticmethod
    def first(job: Job) -> PlainLevels:
        """As they are before any step."""
        head = build_head(job.spec(), Topology())
        assert isinstance(head, LevelHead)
        layers = {}
        for name, level in head.levels.items():
            rows = level.bank.read(torch.arange(level.layout.heads)).flatten(0, 1)
            layers[name] = DenseHead(job.config, rows[: level.layout.num_classes])
        for name, projection in head.projections.items():
            layers[name] = DenseHead(job.config, projection.read())
        for layer in layers.values():
            layer.rows.requires_grad_()
        lengths = list(head.radix.lengths)
        return PlainLevels(job.config, job.num_classes, lengths, layers)

    @property
    def levels(self) -> list[DenseHead]:
        """The levels, first to last."""
        return [layer for name, layer in self.layers.items() if not name.startswith("proj")]

    def cosines(self, level: int, x: Tensor, rows: list[int]) -> Tensor:
        """Scores before scale and margin of an embedding `[D]` against rows of a level."""
        if self.config.kind == "mhc" and level > 0:
            projection = self.layers[f"projection_{level + 1}"].rows
            x = projection[:, :-1] @ x + projection[:, -1]
        weight = self.levels[level].rows[rows]
        if self.config.margin.kind == "none":
            return weight[:, :-1] @ x + weight[:, -1]
        return F.normalize(weight, dim=1) @ F.normalize(x, dim=0)

    @property
    def scale(self) -> float:
        """Of the logits."""
        return 1.0 if self.config.margin.kind == "none" else self.config.margin.scale

    def offset(self, level: int) -> float:
        """What logits are lowered by before a sigmoid: Chernoff's bound is 1 / scored there."""
        parents = min(self.config.mhc.candidates, self.prefixes(level - 1)) if level else 1
        scored = min(parents * self.lengths[level], self.prefixes(level))
        variance = 0.0
        if self.config.margin.kind != "none":
            variance = self.scale**2 / self.levels[0].rows.shape[1]
        steepest = sqrt(2 * log(scored) / variance) if variance else 1.0
        t = min(1.0, steepest)
        return log(scored) / t + t * variance / 2 if t else 0.0

    def level_loss(self, level: int, cosines: Tensor, is_target: Tensor, norm: Tensor) -> Tensor:
        """Cross-entropy of one target, or the sum of the binary ones, with margin and filter."""
        margin, targets = self.config.margin, cosines[is_target]
        negatives = cosines[~is_target]
        if margin.filter:
            negatives = negatives[negatives <= margin.filter]
        if margin.kind != "none" and len(targets):
            targets = self.levels[0]._target(targets, norm.expand(len(targets)))
        targets, negatives = targets * self.scale, negatives * self.scale
        if self.config.kind == "mhc" and self.config.cascade_is_multi_label:
            offset = self.offset(level)
            return F.softplus(offset - targets).sum() + F.softplus(negatives - offset).sum()
        return F.cross_entropy(torch.cat([targets, negatives]), torch.tensor(0))

    def log_scores(self, level: int, cosines: Tensor) -> Tensor:
        """What classes add to their path, if all that are scored are given."""
        logits = cosines.detach() * self.scale
        if self.config.kind == "mhc" and self.config.cascade_is_multi_label:
            return F.logsigmoid(logits - self.offset(level))
        return logits.log_softmax(0)

    def prefixes(self, level: int) -> int:
        """Prefixes of a level that begin a class."""
        return len({y // self.stride(level) for y in range(self.num_classes)})

    def stride(self, level: int) -> int:
        """Classes that share a prefix."""
        return prod(self.lengths[level + 1 :])

    def digit(self, label: int, level: int) -> int:
        """Digit of a class."""
        return label // self.stride(level) % self.lengths[level]

    def used_digits(self, level: int) -> list[int]:
        """Digits that some class has."""
        return sorted({self.digit(y, level) for y in range(self.num_classes)})


@dataclass
class Sample:
    """What a sample comes to: loss, rows seen, whether it is right, children scored by level."""

    loss: Tensor
    seen: int
    right: bool
    parents: list[list[int]]


def product_sample(plain: PlainLevels, x: Tensor, label: int) -> Sample:
    """A sample of Multi-Head Product."""
    losses, seen, right = [], 0, True
    for level in range(len(plain.lengths)):
        rows = plain.used_digits(level)
        cosines = plain.cosines(level, x, rows)
        is_target = torch.tensor(rows) == plain.digit(label, level)
        losses.append(plain.level_loss(level, cosines, is_target, x.detach().norm()))
        seen += len(rows)
        right &= bool(is_target[cosines.argmax()])
    return Sample(torch.stack(losses).sum(), seen, right, [[0]] * len(plain.lengths))


def cascade_sample(plain: PlainLevels, x: Tensor, labels: set[int]) -> Sample:
    """A sample of Multi-Head Cascade with any number of labels."""
    beam, losses, seen, parents = {0: torch.zeros(()).double()}, [], 0, []
    for level, length in enumerate(plain.lengths):
        parents.append(sorted(beam))
        children = [p * length + j for p in beam for j in range(length)]
        children = [c for c in children if c < plain.prefixes(level)]
        targets = {y // plain.stride(level) for y in labels}
        cosines = plain.cosines(level, x, children)
        is_target = torch.tensor([c in targets for c in children])
        losses.append(plain.level_loss(level, cosines, is_target, x.detach().norm()))
        seen += len(children)
        paths = {
            c: beam[c // length] + s
            for c, s in zip(children, plain.log_scores(level, cosines), strict=True)
        }
        best = max(paths, key=lambda c: float(paths[c]))
        chosen = sorted(paths, key=lambda c: (c not in targets, -float(paths[c])))
        chosen = chosen[: max(plain.config.mhc.candidates, len(targets))]
        beam = {c: paths[c] for c in chosen}
    return Sample(torch.stack(losses).sum(), seen, best in targets, parents)


@dataclass(frozen=True)
class LevelOutcome:
    """What a run must lead to; by step, `grads` `[steps, n, B, D]`; parents touched by level."""

    numbers: dict[str, Tensor]
    grads: Tensor
    plain: PlainLevels
    touched: list[list[int]]


@lru_cache(maxsize=256)
def _define(config: str, labels: str, num_classes: int) -> LevelOutcome:
    job = Job(HeadConfig.model_validate_json(config), labels, num_classes=num_classes)
    plain = PlainLevels.first(job)
    embeddings, drawn = job.inputs()
    many = drawn.dim() == 4
    ever = [set() for _ in plain.lengths]
    numbers, grads = {"losses": [], "classes_seen": [], "accuracy": []}, []
    for step in range(STEPS):
        x = embeddings[step].clone().requires_grad_()
        samples = []
        for embedding, one in zip(x.flatten(0, 1), drawn[step].flatten(0, 1).tolist(), strict=True):
            given = set(one if many else [one])
            good = {y for y in given if 0 <= y < num_classes}
            if good and not many and job.config.kind == "mhp":
                samples.append(product_sample(plain, embedding, *good))
            elif good or (given == {-1} and job.config.cascade_is_multi_label):
                samples.append(cascade_sample(plain, embedding, good))
        loss = torch.stack([s.loss for s in samples]).mean()
        loss.backward()
        grads.append(x.grad)
        numbers["losses"].append(loss.detach())
        numbers["classes_seen"].append(
            torch.tensor([float(s.seen) for s in samples]).double().mean()
        )
        numbers["accuracy"].append(torch.tensor([float(s.right) for s in samples]).double().mean())
        touched = [set().union(*(s.parents[level] for s in samples)) for level in range(len(ever))]
        update(plain, touched)
        there = (drawn[step] != NO_SAMPLE).view(*drawn.shape[1:3], -1).any(-1)
        for layer in plain.levels:
            layer.count_norms(embeddings[step][there])
        ever = [old | new for old, new in zip(ever, touched, strict=True)]
    by_step = {name: torch.stack(values) for name, values in numbers.items()}
    return LevelOutcome(by_step, torch.stack(grads), plain, [sorted(t) for t in ever])


def update(plain: PlainLevels, touched: list[set[int]]) -> None:
    """Update all rows of the children of touched parents, and all projections."""
    for name, layer in plain.layers.items():
        rows = list(range(len(layer.rows)))
        if name.startswith("level_") and name != "level_1":
            level = int(name.removeprefix("level_")) - 1
            rows = [r for r in rows if r // plain.lengths[level] in touched[level]]
        layer.update(layer.rows.grad, rows, LR)


def define(job: Job) -> LevelOutcome:
    """The outcome of a job by the plain definition; of all its steps from the start."""
    return _define(job.config.model_dump_json(), job.labels, job.num_classes)


def check_levels(job: Job, ranks: list[dict[str, Tensor]], tolerance: float) -> None:
    """Compare what the ranks found, with all that a run leaves behind, to the definition."""
    wanted = define(job)
    steps = slice(*job.steps)

    near = comparison(job, tolerance)
    for name, values in wanted.numbers.items():
        near(name, sum(rank[name] for rank in ranks), values[steps])
    grads = torch.cat([rank["grads"] for rank in ranks]).transpose(0, 1)
    near("embeddings", grads.flatten(1, 2), wanted.grads[steps].flatten(1, 2))
    if not job.config.optim.momentum:
        assert not any(name.endswith("momentum") for name in ranks[0])
    for level, (name, layer) in enumerate(wanted.plain.layers.items()):
        for field, values in {"weight": layer.rows.detach(), **layer.state}.items():
            if field == "momentum" and not job.config.optim.momentum:
                continue
            if f"{name}/{field}" in ranks[0]:
                for rank in ranks:
                    found = rank[f"{name}/{field}"][0]
                    near(f"{name}/{field}", found, values[:, : found.shape[-1]])
                continue
            units, found = sharded(ranks, f"{name}/units"), sharded(ranks, f"{name}/{field}")
            assert units.tolist() == wanted.touched[level], name
            length = found.shape[1]
            rows = (units[:, None] * length + torch.arange(length)).flatten()
            real = rows < len(values)
            near(
                f"{name}/{field}", found.flatten(0, 1)[real], values[rows[real], : found.shape[-1]]
            )
            padding = found.flatten(0, 1)[~real]
            assert field == "age" or not padding.any(), "padding was trained"
    if job.config.margin.kind == "adaface":
        near("norms", ranks[0]["norms"], wanted.plain.levels[0].norms)


def sharded(ranks: list[dict[str, Tensor]], ending: str) -> Tensor:
    """A sharded tensor of the state, of all ranks and groups in order."""
    found = [
        (rank, name)
        for rank in ranks
        for name in sorted(rank)
        if name.startswith("rows/") and name.endswith("/" + ending)
    ]
    return torch.cat([rank[name] for rank, name in found])
