"""First rows by the kernel have the bits of their definition where square roots are exact.

They are on a GPU. On a CPU torch asks MKL, whose roots are not always the nearest float32.
"""

from __future__ import annotations

import pytest
import torch

from mhe_dist.bank.initial_rows import noise_rows
from mhe_dist.kernels.first_rows import first_rows

CLASSES = torch.tensor([[0, 1], [7, -1], [-1, 2**40]])


@pytest.mark.parametrize("key", [3, 2**63 - 1])
@pytest.mark.parametrize(("width", "columns"), [(1, 1), (33, 34), (1100, 1101)])
def test_bit_for_bit(width: int, columns: int, key: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "sqrt_", lambda x: x.copy_(x.double().sqrt()))
    expected = noise_rows(key, CLASSES, width, width**-0.5, columns)
    found = first_rows(key, CLASSES, width, width**-0.5, columns)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert not found[1, 1].any() and found[0, 0].any()


def test_no_classes() -> None:
    assert first_rows(0, torch.empty(0, 4, dtype=torch.int64), 8, 1.0, 9).shape == (0, 4, 9)
