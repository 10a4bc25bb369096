"""A label outside [0, C) ends the run by the name of its sample, or is ignored by config."""

from __future__ import annotations

import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import LabelError
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from tests.support.heads.head_jobs import HEADS, head_config


@pytest.mark.parametrize("head", HEADS)
def test_bad_label_is_named_or_ignored(head: str) -> None:
    labels = torch.tensor([[1, 46, 2]])
    build_head(HeadSpec(head_config(head), 46, 5, 0, 1), Topology()).plan(0, labels)
    strict = build_head(HeadSpec(head_config(head, on_bad_label="fail"), 46, 5, 0, 1), Topology())
    with pytest.raises(LabelError) as caught:
        strict.plan(0, labels)
    assert (caught.value.micro_batch, caught.value.position) == (0, 1)
    named = str(caught.value.with_key("cat7"))
    assert "label 46 of sample 'cat7' is outside [0, 46)" in named
