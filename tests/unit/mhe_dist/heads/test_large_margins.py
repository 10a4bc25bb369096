"""Margins that take more off a logit than float32's exponential has room for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.heads.standalone import StandaloneHead, create_head

CLASSES, WIDTH = 4, 64
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    # Every head is an extra one, so that all classes are seen, the target among the extra ones.
    "routed": ("mhs", {"length": 2, "extra_heads": 2, "groups": 1}),
    "routed, corrected": ("mhs", {"length": 2, "extra_heads": 2, "groups": 1, "correction": True}),
    "gathered": ("mhs", {"length": 2, "extra_heads": 2, "groups": 1, "exchange": "gather"}),
    "full": ("full", {}),
}
MARGINS: dict[str, dict[str, Any]] = {
    "cosface": {"kind": "cosface", "m": 0.6, "scale": 256.0},
    "cosface, below the negatives": {"kind": "cosface", "m": 1.0, "scale": 256.0},
    "arcface": {"kind": "arcface", "m": 1.2, "scale": 128.0},
    "filter": {"kind": "cosface", "m": 1.0, "scale": 256.0, "filter": 0.05},
}


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradient_are_those_of_float64(kind: str, margin: str) -> None:
    name, options = HEADS[kind]
    block = MARGINS[margin]
    head = create_head(name, num_classes=CLASSES, dim=WIDTH, margin=block, **options)
    rows = unit_rows(head, block["scale"])
    labels = torch.arange(CLASSES)
    noise = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    embeddings = (rows + 0.3 * F.normalize(noise, dim=1)).requires_grad_()
    wanted = embeddings.detach().double().requires_grad_()
    loss = expected(wanted, rows.double(), labels, block)
    output = head(embeddings, labels)
    torch.testing.assert_close(output.loss, loss.float(), rtol=1e-4, atol=1e-4)
    output.loss.backward()
    loss.backward()
    assert embeddings.grad is not None and wanted.grad is not None
    torch.testing.assert_close(embeddings.grad, wanted.grad.float(), rtol=1e-3, atol=1e-3)


def unit_rows(head: StandaloneHead, scale: float) -> Tensor:
    """The direction of each class's row `[C, D]`, from the scores of unit vectors."""
    found = head.predict(torch.eye(WIDTH), CLASSES)
    return torch.zeros(WIDTH, CLASSES).scatter_(1, found.classes, found.scores / scale).T


def expected(embeddings: Tensor, rows: Tensor, labels: Tensor, margin: dict[str, Any]) -> Tensor:
    """The mean loss by its definition."""
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(rows, dim=1).T
    target = cosine[labels, labels]
    phi = target - margin["m"]
    if margin["kind"] == "arcface":
        phi = (target.acos() + margin["m"]).cos()
        assert (target.acos() + margin["m"]).max() < math.pi
    is_target = F.one_hot(labels, CLASSES).bool()
    dropped = (cosine > margin.get("filter", 1.0)) & ~is_target
    logits = torch.where(is_target, phi.unsqueeze(1), cosine).masked_fill(dropped, -math.inf)
    return F.cross_entropy(logits * margin["scale"], labels)
