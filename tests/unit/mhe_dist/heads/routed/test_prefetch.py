"""What a head asks its bank to fetch ahead is what the step then meets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhe_dist.bank.bank import Bank
from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec, RowHead

LABELS = torch.tensor([[3, 17, 17, -1, 40, 5]])


def head(memory: str, exchange: str, folder: Path) -> RowHead:
    values: dict[str, Any] = {
        "kind": "mhs",
        "groups": 3,
        "bank": {"memory": memory},
        "on_bad_label": "ignore",
        "mhs": {"length": 4, "extra_heads": 2, "exchange": exchange},
    }
    return build_head(
        HeadSpec(HeadConfig.model_validate(values), 46, 3, 11, 3, folder=folder), Topology()
    )


def watch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Tensor]:
    """Units that are given to a method of every bank, which then does nothing."""
    given: list[Tensor] = []
    monkeypatch.setattr(Bank, name, lambda _, units: given.append(units))
    return given


@pytest.mark.parametrize("exchange", ["route", "gather"])
def test_the_units_expected_are_those_that_the_step_meets(
    exchange: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = head("file", exchange, tmp_path)
    expected, touched = watch(monkeypatch, "prefetch"), watch(monkeypatch, "touch")
    for step in range(5):
        built.prefetch(step, LABELS)
        built.plan(step, LABELS)
    assert len(touched) == 5
    assert all(torch.equal(*pair) for pair in zip(expected, touched, strict=True))
    assert all(2 < len(units) < 12 for units in touched)


def test_rows_that_lie_where_they_are_used_are_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, expected = head("device", "route", tmp_path), watch(monkeypatch, "prefetch")
    built.prefetch(0, LABELS)
    assert not expected
