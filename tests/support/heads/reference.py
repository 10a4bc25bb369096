"""What a head must compute, written plainly: one process, float64, autograd, dense tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.config.head import HeadConfig, MarginConfig


def angular_target(cosine: Tensor, margin: MarginConfig) -> Tensor:
    """Target cosine with a margin that is the same for every sample."""
    m1, m2, m3 = {
        "none": (1.0, 0.0, 0.0),
        "softmax": (1.0, 0.0, 0.0),
        "arcface": (1.0, margin.m, 0.0),
        "cosface": (1.0, 0.0, margin.m),
        "combined": (margin.m1, margin.m2, margin.m3),
    }[margin.kind]
    if m1 == 1.0 and m2 == 0.0:
        return cosine - m3
    theta = torch.acos(cosine)
    rest = math.pi - (math.pi - m2) / m1
    beyond = cosine - max(rest * math.sin(rest), 1 - math.cos(rest))
    return torch.where(m1 * theta + m2 <= math.pi, torch.cos(m1 * theta + m2), beyond) - m3


@dataclass
class DenseHead:
    """All rows `[rows, width]` in one tensor, their optimizer state, and AdaFace's statistics."""

    config: HeadConfig
    rows: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    norms: Tensor = field(default_factory=lambda: torch.tensor([20.0, 100.0]).double())

    def loss(self, embeddings: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
        """Mean cross-entropy over samples.

        Args:
            embeddings: `[n, D]`.
            targets: row of each sample's class `[n]`.
            bias: `[n, rows]`, added to the logits of negatives; -inf where a sample does not see
                a row.
        """
        is_target = F.one_hot(targets, len(self.rows)).bool()
        margin, cosine = self.config.margin, self.cosines(embeddings)
        if margin.kind == "none":
            return F.cross_entropy(torch.where(is_target, cosine, cosine + bias), targets)
        phi = self._target(cosine[is_target], embeddings.detach().norm(dim=1))
        negatives = cosine * margin.scale + bias
        if margin.filter:
            negatives = negatives.masked_fill(cosine > margin.filter, float("-inf"))
        logits = torch.where(is_target, phi.unsqueeze(1) * margin.scale, negatives)
        return F.cross_entropy(logits, targets)

    def labels_loss(self, embeddings: Tensor, is_label: Tensor, bias: Tensor) -> Tensor:
        """Mean over samples of the loss of `head.objective`, for any number of labels.

        Args:
            embeddings: `[n, D]`.
            is_label: `[n, rows]`, the rows of each sample's labels.
            bias: as for `loss`; that of labels does not count.
        """
        margin, cosine = self.config.margin, self.cosines(embeddings)
        sample, column = is_label.nonzero(as_tuple=True)
        own, scale = cosine[sample, column], 1.0 if margin.kind == "none" else margin.scale
        if margin.kind != "none":
            own = self._target(own, embeddings.detach().norm(dim=1)[sample]) * scale
        hidden = is_label | ((cosine > margin.filter) & (margin.filter > 0))
        others = (cosine * scale + bias).masked_fill(hidden, float("-inf"))
        if self.config.objective == "multi_label":
            missing = torch.zeros(len(cosine), dtype=own.dtype).index_add(0, sample, (-own).exp())
            return (others.exp().sum(1).log1p() + missing.log1p()).mean()
        # A row for each label: its logit, then those of the sample's negatives.
        rows = torch.cat([own.unsqueeze(1), others[sample]], dim=1)
        each = F.cross_entropy(rows, torch.zeros_like(sample), reduction="none")
        each = each / is_label.sum(1)[sample]
        return each.sum() / len(cosine)

    def labels_accuracy(self, embeddings: Tensor, is_label: Tensor, bias: Tensor) -> Tensor:
        """Share of the samples whose highest cosine of the rows they see is that of a label."""
        hidden = (bias == float("-inf")) & ~is_label
        seen = self.cosines(embeddings).masked_fill(hidden, float("-inf"))
        return is_label.gather(1, seen.argmax(1, keepdim=True)).double().mean()

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Cosines `[n, rows]`; without normalisation inner products plus bias."""
        if self.config.margin.kind == "none":
            return embeddings @ self.rows[:, :-1].T + self.rows[:, -1]
        return F.normalize(embeddings, dim=1) @ F.normalize(self.rows, dim=1).T

    def accuracy(self, embeddings: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
        """Share of the samples whose target has the highest cosine of the rows they see."""
        seen = self.cosines(embeddings).masked_fill(bias == float("-inf"), float("-inf"))
        return (seen.argmax(1) == targets).double().mean()

    def _target(self, cosine: Tensor, norms: Tensor) -> Tensor:
        margin = self.config.margin
        if margin.kind != "adaface":
            return angular_target(cosine, margin)
        quality = (norms.clamp(0.001, 100) - self.norms[0]) / (self.norms[1] + 1e-3) * margin.h
        quality = quality.clamp(-1, 1)
        theta = (torch.acos(cosine) - margin.m * quality).clamp(1e-3, math.pi - 1e-3)
        return torch.cos(theta) - (margin.m + margin.m * quality)

    def count_norms(self, embeddings: Tensor) -> None:
        """Let the norms of a step's embeddings `[n, D]` enter AdaFace's statistics."""
        norms = embeddings.detach().norm(dim=1).clamp(0.001, 100)
        weight = self.config.margin.ema
        self.norms = self.norms * (1 - weight) + weight * torch.stack([norms.mean(), norms.std()])

    def update(self, gradient: Tensor, touched: list[int], lr: float) -> None:
        """One step of the row optimizer on the touched rows, by its textbook definition."""
        optim = self.config.optim
        w, g = self.rows.detach()[touched].clone(), gradient[touched]
        if optim.kind == "sgd":
            v = self._state("momentum")[touched] * optim.momentum + g + optim.weight_decay * w
            self.state["momentum"][touched] = v
            w = w - lr * v
        else:
            beta1, beta2 = optim.betas
            t = self._state("age")[touched] + 1
            m = self._state("exp_avg")[touched] * beta1 + (1 - beta1) * g
            u = self._state("exp_avg_sq")[touched] * beta2 + (1 - beta2) * g * g
            for name, value in {"age": t, "exp_avg": m, "exp_avg_sq": u}.items():
                self.state[name][touched] = value
            root = (u / (1 - beta2**t)).sqrt() + optim.eps
            w = w * (1 - lr * optim.weight_decay) - lr * (m / (1 - beta1**t)) / root
        rows = self.rows.detach().clone()
        rows[touched] = w
        self.rows = rows.requires_grad_()

    def _state(self, name: str) -> Tensor:
        return self.state.setdefault(name, torch.zeros_like(self.rows))
