"""Rows read for products against the bank's own definition in float64."""

from __future__ import annotations

import pytest
import torch

from mhe_dist.bank.bank import Bank
from mhe_dist.kernels.row_read import read_rows

UNITS = 7
SHAPES = [(1, 33), (5, 96), (9, 512), (40, 33), (3, 1)]  # L, D; L is not a multiple of a tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_equals_float64(length: int, width: int, scaled: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(UNITS, length, width, generator=torch.Generator().manual_seed(width))
    weight[3, 0] = 0.0  # padding
    weight, local = weight.to(dtype), torch.tensor([5, 3, 0])
    exact = weight[local].double()
    norms = exact.norm(dim=-1).clamp_min(1e-12)
    rows, inverse = read_rows(weight, local, scaled)
    expected = exact / norms.unsqueeze(-1) if scaled else exact
    assert rows.dtype == inverse.dtype == torch.float32
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inverse.double(), 1 / norms, rtol=1e-6, atol=1e-6)


def test_no_units() -> None:
    rows, inverse = read_rows(torch.ones(UNITS, 5, 33), torch.empty(0, dtype=torch.int64), True)
    assert rows.shape == (0, 5, 33)
    assert inverse.shape == (0, 5)


@pytest.mark.parametrize("units", [torch.tensor([44, 41]), range(41, 44)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_bank_reads_the_same(
    units: torch.Tensor | range, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randn(UNITS, 5, 33, generator=torch.Generator().manual_seed(1))
    bank = Bank(range(40, 40 + UNITS), 5, 33, lambda units: noise[units - 40])
    bank.touch(bank.units)
    found = []
    for kernels in (False, True):
        monkeypatch.setattr("mhe_dist.bank.bank.use_kernels", lambda *_, on=kernels: on)
        found.append(bank.read_for_products(units, True, scaled))
    for eager, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, eager, rtol=1e-6, atol=1e-6)
