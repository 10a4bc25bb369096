"""Classes with the same score: none of them is the highest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhe_dist.heads.standalone import create_head

CLASSES, WIDTH, BATCH = 24, 8, 10
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "routed": ("mhs", {"length": 4, "extra_heads": 2, "groups": 2}),
    "routed, whole group": ("mhs", {"length": 4, "extra_heads": 6}),
    "gathered": ("mhs", {"length": 4, "extra_heads": 2, "exchange": "gather"}),
    "full": ("full", {}),
    "partial_fc": ("partial_fc", {"rate": 0.5}),
    "mhp": ("mhp", {"lengths": [5, 5]}),
    "mhc": ("mhc", {"lengths": [5, 5], "margin": "none"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_that_is_zero_is_right_about_no_class(kind: str) -> None:
    """As a network that learns nothing makes them: it must not look perfect."""
    name, options = KINDS[kind]
    head = create_head(name, num_classes=CLASSES, dim=WIDTH, **options)
    embeddings = torch.zeros(BATCH, WIDTH, requires_grad=True)
    output = head(embeddings, torch.arange(BATCH))
    assert output.metrics["accuracy"] == 0
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("kind", ["routed", "gathered", "full"])
def test_a_single_class_has_no_rival(kind: str) -> None:
    name, options = KINDS[kind]
    options = {key: value for key, value in options.items() if key not in ("extra_heads", "groups")}
    head = create_head(name, num_classes=1, dim=WIDTH, **options)
    output = head(torch.randn(BATCH, WIDTH), torch.zeros(BATCH, dtype=torch.int64))
    assert output.metrics["accuracy"] == 1
    assert output.loss == 0
