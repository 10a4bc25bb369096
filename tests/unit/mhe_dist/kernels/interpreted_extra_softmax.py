"""The softmax over extra heads in tiles against a float64 definition under autograd."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mhe_dist.config.head import MarginConfig
from mhe_dist.heads.margins import Margin
from mhe_dist.kernels.extra_softmax import (
    RowSet,
    Targets,
    extra_log_sum,
    feature_gradient,
    row_gradient,
)

MARGINS = {
    "none": MarginConfig(kind="none"),
    "softmax": MarginConfig(kind="softmax", scale=16.0),
    "arcface": MarginConfig(kind="arcface", m=0.5, scale=16.0),
    "cosface": MarginConfig(kind="cosface", m=0.35, scale=16.0),
    "combined": MarginConfig(kind="combined", m1=1.1, m2=0.3, m3=0.1, scale=16.0),
    "adaface": MarginConfig(kind="adaface", m=0.4, scale=16.0),
    "filter": MarginConfig(kind="arcface", m=0.5, scale=16.0, filter=0.1),
}
HEAD = 7  # rows of a head
SHAPES = [(5, 5, 33), (19, 9, 96), (3, 6, 512)]  # samples, heads, D


class Problem(NamedTuple):
    """Samples, some with their own head among the rows, and the definition's answer."""

    features: Tensor
    rows: RowSet
    targets: Targets
    outside: Tensor  # log-sum-exp of the classes beyond the rows
    expected: tuple[Tensor, ...]  # log-sum, highest negative cosine, both gradients


def unit(*shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.nn.functional.normalize(torch.randn(*shape, generator=rng), dim=-1)


def problem(config: MarginConfig, samples: int, heads: int, width: int, padding: int) -> Problem:
    margin, count = Margin(config), heads * HEAD
    features, rows = unit(samples, width), unit(count, width)
    hidden = torch.arange(count) >= count - padding
    index = torch.arange(samples)
    column = torch.where(index % 3 == 1, -1, index * 5 % (count - padding))
    features = 0.6 * features + 0.5 * rows[column.clamp_min(0)]  # some cosines are high
    offset = torch.where(column >= 0, 0.7, 0.3)
    norms, outside = 10 + 5.0 * index.double(), torch.linspace(-2, 3, samples).double()

    f, w = (part.double().requires_grad_() for part in (features, rows))
    cosine = f @ w.T
    inside = index[column >= 0]
    logits = cosine * margin.scale + offset[:, None]
    own = torch.arange(count)[None] // HEAD == torch.where(column >= 0, column // HEAD, -1)[:, None]
    logits = torch.where(own, cosine * margin.scale, logits)
    if margin.filter:
        logits = logits.masked_fill(cosine > margin.filter, float("-inf"))
    logits = logits.masked_fill(hidden, float("-inf"))
    phi, slope = margin.target(cosine[inside, column[inside]], norms[inside])
    logits = logits.index_put((inside, column[inside]), phi * margin.scale)
    highest = cosine.masked_fill(hidden, float("-inf"))
    highest = highest.index_put((inside, column[inside]), torch.tensor(float("-inf")).double())
    log_sum = logits.logsumexp(1)
    (torch.logaddexp(log_sum, outside).sum() - (phi * margin.scale).sum()).backward()
    full = torch.zeros(2, samples)
    full[:, inside] = torch.stack([phi * margin.scale, slope]).detach().float()
    targets = Targets(column, full[0], full[1], offset, HEAD)
    expected = (log_sum.detach(), highest.amax(1).detach(), f.grad, w.grad)
    row_set = RowSet(rows, hidden if padding else None, margin.scale, margin.filter)
    return Problem(features, row_set, targets, outside, expected)


def solved(given: Problem) -> tuple[Tensor, ...]:
    parts = given.features, given.rows, given.targets
    log_sum, highest = extra_log_sum(*parts)
    total = torch.logaddexp(log_sum, given.outside.float())
    return log_sum, highest, feature_gradient(*parts, total), row_gradient(*parts, total)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize(("samples", "heads", "width"), SHAPES)
def test_equals_float64(samples: int, heads: int, width: int, padding: int) -> None:
    given = problem(MARGINS["arcface"], samples, heads, width, padding)
    for found, expected in zip(solved(given), given.expected, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", MARGINS.values(), ids=MARGINS)
def test_every_margin(config: MarginConfig) -> None:
    given = problem(config, 18, 5, 33, 4)
    for found, expected in zip(solved(given), given.expected, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_samples_no_rows_and_only_padding() -> None:
    given = problem(MARGINS["arcface"], 5, 5, 33, 0)
    none = Targets(*(part[:0] for part in given.targets[:4]), HEAD)
    empty = given.features[:0]
    log_sum, highest = extra_log_sum(empty, given.rows, none)
    assert len(log_sum) == len(highest) == 0
    assert feature_gradient(empty, given.rows, none, log_sum).shape == (0, 33)
    assert not row_gradient(empty, given.rows, none, log_sum).any()
    absent = given.targets._replace(column=torch.full((5,), -1))
    hidden = torch.ones(35, dtype=torch.bool)
    for rows in (RowSet(given.rows.rows[:0], None, 16.0), given.rows._replace(hidden=hidden)):
        log_sum, highest = extra_log_sum(given.features, rows, absent)
        assert log_sum.isneginf().all() and highest.isneginf().all()
        total = given.outside.float()
        assert not feature_gradient(given.features, rows, absent, total).any()
        assert not row_gradient(given.features, rows, absent, total).any()
