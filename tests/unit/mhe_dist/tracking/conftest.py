"""Fixtures of the tests of MLflow."""

from __future__ import annotations

import pytest


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are sent soon, and nobody waits long for a server."""
    monkeypatch.setattr("mhe_dist.tracking.mlflow._GATHER_S", 0.05)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._PAUSE_S", 0.02)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._CLOSE_S", 10.0)
