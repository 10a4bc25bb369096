"""How long rows are before any step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.multilevel.rows import initial_rows
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec


def spec(**head: Any) -> HeadSpec:
    return HeadSpec(HeadConfig.model_validate({"groups": 8} | head), 300, 512, 3, 1)


@pytest.mark.parametrize(("bank", "length"), [({}, 1.0), ({"init_length": 0.226}, 0.226)])
def test_rows_begin_with_the_length_of_the_config(bank: dict[str, Any], length: float) -> None:
    """0.226: a deviation of 0.01 of 512 numbers, as arcface_torch begins."""
    head = build_head(spec(kind="full", bank=bank), Topology())
    rows = head.initial_rows(torch.tensor([0]))[0]
    assert rows.norm(dim=-1).mean() == pytest.approx(length, rel=0.02)
    levels = spec(kind="mhc", mhc={"lengths": [20, 20]}, margin={"kind": "none"}, bank=bank)
    of_level = initial_rows("level", head.layout, levels, torch.device("cpu"))
    assert of_level(torch.tensor([0]))[0].norm(dim=-1).mean() == pytest.approx(length, rel=0.02)
