"""Noise of classes follows the normal law and depends on (seed, class, width) only."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from mhe_dist.noise import normal_rows


def test_rows_follow_the_normal_law() -> None:
    noise = normal_rows(3, torch.arange(8000), 256).double().flatten()
    count = len(noise)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        error = (noise**power).mean() - moment
        assert abs(error) < 4.5 * math.sqrt(variance / count), power
    assert stats.kstest(noise[::10].numpy(), "norm").pvalue > 1e-4
    beyond_four = (noise.abs() > 4).sum().item()
    assert stats.binomtest(beyond_four, count, 2 * stats.norm.sf(4)).pvalue > 1e-4


@pytest.mark.parametrize("first", [0, 10**9 - 4000, -(2**63)])
def test_classes_and_columns_are_independent(first: int) -> None:
    classes, width = 4000, 64
    noise = normal_rows(3, torch.arange(classes) + first, width).double()
    limit = 5.0
    columns = (noise.T @ noise)[~torch.eye(width, dtype=torch.bool)] / math.sqrt(classes)
    assert columns.abs().max() < limit
    squares = noise**2 - 1
    columns = (squares.T @ squares)[~torch.eye(width, dtype=torch.bool)] / 2 / math.sqrt(classes)
    assert columns.abs().max() < limit
    for lag in (1, 2, 64):
        rows = (noise[lag:] * noise[:-lag]).sum() / math.sqrt((classes - lag) * width)
        assert abs(rows) < limit, lag


def test_seeds_are_independent() -> None:
    classes = torch.arange(4000)
    one, two = (normal_rows(seed, classes, 64) for seed in (0, 1))
    assert abs((one * two).sum()) / math.sqrt(one.numel()) < 5


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_a_row_does_not_depend_on_its_company(width: int) -> None:
    classes = torch.tensor([0, 10**9, 5, 2**40, 5, 17] * 3000)
    noise = normal_rows(11, classes, width)
    assert noise.shape == (len(classes), width)
    assert torch.equal(noise[2], noise[4])
    for chosen in ([3], [5, 1], [0, 1, 2], list(range(1, 17001))):
        assert torch.equal(normal_rows(11, classes[chosen], width), noise[chosen])


def test_rows_are_the_same_for_ever() -> None:
    noise = normal_rows(1, torch.tensor([0, 10**9]), 3)
    expected = [
        [0.9804427027702332, -0.4734806716442108, 0.2951640784740448],
        [0.43236109614372253, 0.885744035243988, 0.367664098739624],
    ]
    assert torch.equal(noise, torch.tensor(expected))


def test_rows_come_in_the_type_that_is_asked_for() -> None:
    classes = torch.arange(5)
    exact = normal_rows(1, classes, 4)
    assert exact.dtype == torch.float32
    assert torch.equal(normal_rows(1, classes, 4, torch.bfloat16), exact.bfloat16())
    assert normal_rows(1, classes[:0], 4, torch.float64).shape == (0, 4)
