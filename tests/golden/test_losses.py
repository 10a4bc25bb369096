"""A refactoring proves itself: the same 20 steps lead to the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.record import LOSSES, STEPS, losses


def test_losses_are_the_recorded_ones(tmp_path: Path) -> None:
    recorded = json.loads(LOSSES.read_text())
    assert len(recorded) == STEPS
    assert losses(tmp_path) == pytest.approx(recorded, rel=1e-4)
