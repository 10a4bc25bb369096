"""Fixtures of the tests of MLflow."""

from __future__ import annotations

import pytest

from tests.support.waiting import WATCHDOG_S


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are sent soon, and nobody gives a server up that answers."""
    monkeypatch.setattr("mhe_dist.tracking.mlflow._GATHER_S", 0.05)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._PAUSE_S", 0.02)
    for limit in ("_FIRST_ATTEMPT_S", "_CLOSE_S", "_GRACE_S"):
        monkeypatch.setattr(f"mhe_dist.tracking.mlflow.{limit}", WATCHDOG_S)
