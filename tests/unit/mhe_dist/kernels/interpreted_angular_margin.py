"""ArcFace's margin by its kernel against its definition in float64, at both ends too."""

from __future__ import annotations

import pytest
import torch

from mhe_dist.config.head import MarginConfig
from mhe_dist.heads.margins import Margin


@pytest.mark.parametrize("growth", [0.0, 1.0])
def test_equals_float64(growth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    margin = Margin(MarginConfig.model_validate({"kind": "arcface", "m": 0.5}), growth)
    cosine = torch.cat([torch.linspace(-1.0, 1.0, 601), torch.tensor([-1.0 - 1e-6, 1.0 + 1e-6])])
    plain = margin.target(cosine.double())
    monkeypatch.setattr("mhe_dist.heads.margins.use_kernels", lambda *_: True)
    # Near +-1 the angle loses half of the digits of float32, and the slope with it.
    inside = cosine.abs() < 0.999
    for found, expected, tolerance in zip(margin.target(cosine), plain, (1e-6, 1e-5), strict=True):
        assert found.dtype == torch.float32 and found.isfinite().all()
        torch.testing.assert_close(
            found.double()[inside], expected[inside], rtol=tolerance, atol=tolerance
        )
    ends = margin.target(cosine[~inside])
    torch.testing.assert_close(ends[0].double(), plain[0][~inside], rtol=0, atol=2e-3)
