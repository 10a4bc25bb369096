"""What a head must compute, written plainly: one process, float64, autograd, dense tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.config import HeadConfig, MarginConfig


def target_logit(cosine: Tensor, margin: MarginConfig) -> Tensor:
    """Margin'd cosine of the target (no running statistics)."""
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
    """All rows `[rows, width]` in one tensor; `seen[i]` lists the rows in sample i's softmax."""

    config: HeadConfig
    rows: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, embeddings: Tensor, targets: list[int], seen: list[list[int]]) -> Tensor:
        """Mean cross-entropy; `targets` and `seen` are row numbers."""
        margin = self.config.margin
        losses = []
        for embedding, target, rows in zip(embeddings, targets, seen, strict=True):
            if margin.kind == "none":
                weight = self.rows[rows]
                logits = weight[:, :-1] @ embedding + weight[:, -1]
            else:
                cosine = F.normalize(self.rows[rows], dim=1) @ F.normalize(embedding, dim=0)
                if margin.filter:
                    close = (cosine > margin.filter) & (torch.tensor(rows) != target)
                    cosine = cosine.masked_fill(close, float("-inf"))
                place = rows.index(target)
                cosine = torch.cat(
                    [
                        cosine[:place],
                        target_logit(cosine[place], margin).view(1),
                        cosine[place + 1 :],
                    ]
                )
                logits = cosine * margin.scale
            losses.append(F.cross_entropy(logits, torch.tensor(rows.index(target))))
        return torch.stack(losses).mean()

    def update(self, gradient: Tensor, touched: list[int], lr: float) -> None:
        """One step of the row optimizer on the touched rows, by its textbook definition."""
        optim = self.config.optim
        w, g = self.rows.detach()[touched].clone(), gradient[touched]
        if optim.kind == "sgd":
            v = self._state("v")[touched] * optim.momentum + g + optim.weight_decay * w
            self.state["v"][touched] = v
            w = w - lr * v
        else:
            beta1, beta2 = optim.betas
            t = self._state("t")[touched] + 1
            m = self._state("m")[touched] * beta1 + (1 - beta1) * g
            u = self._state("u")[touched] * beta2 + (1 - beta2) * g * g
            self.state["t"][touched], self.state["m"][touched], self.state["u"][touched] = t, m, u
            root = (u / (1 - beta2**t)).sqrt() + optim.eps
            w = w * (1 - lr * optim.weight_decay) - lr * (m / (1 - beta1**t)) / root
        rows = self.rows.detach().clone()
        rows[touched] = w
        self.rows = rows.requires_grad_()

    def _state(self, name: str) -> Tensor:
        return self.state.setdefault(name, torch.zeros_like(self.rows))
