"""Fixtures of the tests of MLflow."""

from __future__ import annotations

import pytest


@pytest.fixture
def hurry(patient_mlflow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are sent soon, and nobody gives a server up that answers."""
    monkeypatch.setattr("mhe_dist.tracking.mlflow._GATHER_S", 0.05)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._PAUSE_S", 0.02)
