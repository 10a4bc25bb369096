"""What is said of heads whose rows cannot be taken over."""

from __future__ import annotations

from typing import Any

import pytest

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.base import Head
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.runs.warm_start import refuse_incompatible_heads


def head(width: int = 8, **blocks: Any) -> Head:
    config = HeadConfig.model_validate({"kind": "full", "groups": 1} | blocks)
    return build_head(HeadSpec(config, 20, width, 0, 1), Topology())


NO_MARGIN = {"margin": {"kind": "none"}}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, NO_MARGIN, "run has head.margin.kind cosface, this run none"),
        (NO_MARGIN, {}, "run has head.margin.kind none, this run cosface"),
        ({}, {"width": 9}, "run has model.embedding_dim 8, this run 9"),
        ({}, {"optim": {"kind": "adamw"}}, "run has head.optim.kind sgd, this run adamw"),
    ],
)
def test_the_key_that_differs_is_named(
    before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        refuse_incompatible_heads(head(**before), head(**after), "run")
