"""Samples against the stored rows of their own heads, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhe_dist.kernels.own_products import StoredHeads, own_products, sum_own_rows

UNITS, SAMPLES = 7, 9
SHAPES = [(1, 33), (5, 96), (9, 512), (40, 33), (3, 1)]  # L, D; L is not a multiple of a tile
# Of three heads; the last two have a sample twice, for padding. Sample 4 has no head here.
INDEX = {"one": [[6], [8], [0]], "several": [[6, 1, 2, 3], [8, 7, 8, 8], [0, 5, 0, 0]]}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def heads_of(index: str, length: int, width: int, dtype: torch.dtype) -> StoredHeads:
    """The last unit and two more; NaN in the others."""
    weight, local = noise(UNITS, length, width), torch.tensor([5, 6, 0])
    weight[0, 0] = 0.0  # padding
    weight[[1, 2, 3, 4]] = torch.nan
    return StoredHeads(weight.to(dtype), local, torch.tensor(INDEX[index]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_products_equal_float64(length: int, width: int, index: str, dtype: torch.dtype) -> None:
    heads, features = heads_of(index, length, width, dtype), noise(SAMPLES, width)
    features[4] = torch.nan
    products, inverse = own_products(heads, features)
    rows = heads.weight[heads.local].double()
    expected = features[heads.samples].double() @ rows.transpose(1, 2)
    torch.testing.assert_close(products.double(), expected, rtol=1e-5, atol=1e-5)
    norms = rows.norm(dim=-1).clamp_min(1e-12)
    torch.testing.assert_close(inverse.double(), 1 / norms, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize(("length", "width"), [*SHAPES, (33, 200)])
def test_sums_of_rows_equal_float64(
    length: int, width: int, index: str, dtype: torch.dtype
) -> None:
    heads = heads_of(index, length, width, dtype)
    weights = noise(SAMPLES, length)[heads.samples]
    gradient = torch.full((SAMPLES, width), 7.0)
    sum_own_rows(heads, weights, gradient)
    expected = torch.full((SAMPLES, width), 7.0, dtype=torch.float64)
    expected[heads.samples] = weights.double() @ heads.weight[heads.local].double()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
    others = [s for s in range(SAMPLES) if s not in heads.samples]
    assert torch.equal(gradient[others], torch.full((len(others), width), 7.0))
