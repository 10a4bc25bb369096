"""A figure beside its bound."""

from __future__ import annotations

from pipelines.bench.scale.bounds import BoundedFigure


def test_a_bound_that_does_not_hold_says_so() -> None:
    assert BoundedFigure("", 1, 1, "MB").holds
    assert not BoundedFigure("", 1.01, 1, "MB").holds
