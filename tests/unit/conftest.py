"""Fixtures of several rooms."""

from __future__ import annotations

import time

import pytest

from mhe_dist import storage_retry


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between attempts; nobody waits."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def prompt_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store or a disk that fails is asked again at once."""
    monkeypatch.setattr(storage_retry, "FIRST_WAIT_S", 0.0)
