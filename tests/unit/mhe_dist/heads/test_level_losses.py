"""The offset of a binary cross-entropy: no class is probable before it was learnt."""

from __future__ import annotations

import math

import pytest
import torch

from mhe_dist.heads.multilevel.losses import BinaryCrossEntropy


@pytest.mark.parametrize("classes", [1, 2, 30, 240, 10**6])
@pytest.mark.parametrize("variance", [0.0, 2.0, 8.0, 32.0, 256.0])
def test_the_offset_is_the_least_that_chernoff_s_bound_allows(
    classes: int, variance: float
) -> None:
    steps = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:]
    bounds = math.log(classes) / steps + steps * variance / 2
    offset = BinaryCrossEntropy.offset_of(classes, variance)
    assert offset == pytest.approx(float(bounds.min()), rel=1e-4, abs=1e-2)


@pytest.mark.parametrize(("scale", "width"), [(16.0, 128), (64.0, 128), (64.0, 512), (1.0, 32)])
def test_at_first_a_sample_has_at_most_one_label(scale: float, width: int) -> None:
    rng, classes = torch.Generator().manual_seed(0), 240
    rows = torch.nn.functional.normalize(torch.randn(classes, width, generator=rng))
    embeddings = torch.nn.functional.normalize(torch.randn(2000, width, generator=rng))
    cosines, unused = embeddings @ rows.T, torch.zeros(2000, 1)
    offset = BinaryCrossEntropy.offset_of(classes, scale**2 / width)
    labels = [
        float(loss.derivative(loss.logits(cosines, scale), unused).sum(1).mean())
        for loss in (BinaryCrossEntropy(offset), BinaryCrossEntropy())
    ]
    assert 0 < labels[0] <= 1
    assert labels[1] > 50
