"""Reading a data set in the order of its index, as evaluation does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mhe_dist.errors import RunError
from pipelines.data.sequential import read_in_order
from pipelines.shards.index import ShardIndex
from tests.support.data.patterns import CLASSES, PNG_DATA, SIDE, damage, image, write_patterns


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_patterns(str(tmp_path / "set"))


def test_reading_in_order(index: ShardIndex) -> None:
    images, labels, keys = read_in_order(index, 20, 90, SIDE)
    assert keys == [f"s{number:03d}" for number in range(20, 90)]
    assert labels.tolist() == [number % CLASSES for number in range(20, 90)]
    expected = np.stack([image(number) for number in range(20, 90)]).transpose(0, 3, 1, 2)
    assert torch.equal(images, torch.from_numpy(expected))
    assert len(read_in_order(index, 7, 7, SIDE)[2]) == 0
    assert read_in_order(index, 199, 200, SIDE)[2] == ["s199"]


def test_reading_in_order_leaves_nothing_out(index: ShardIndex) -> None:
    damage(index, 1, 7, b"\xff" * 40, PNG_DATA)
    with pytest.raises(RunError, match=r"sample 7 of .*part-000001.tar: s030.png"):
        read_in_order(index, 0, 200, SIDE)
