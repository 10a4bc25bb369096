"""The benchmark of an index: every line has a figure, a bound and a verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhe_dist.errors import UserError
from pipelines.bench.scale.index import measure_index, write_synthetic_index
from pipelines.shards.index import ShardIndex


def test_a_synthetic_index_is_an_index(tmp_path: Path) -> None:
    write_synthetic_index(str(tmp_path), 25_000)
    index = ShardIndex.load(str(tmp_path))
    assert [shard.samples for shard in index.shards] == [10_000, 10_000, 5_000]
    assert index.shards[2].offsets[[0, 1, -1]].tolist() == [0, 24 * 512, 5_000 * 24 * 512]
    labels = [label for shard in index.shards for label in shard.labels]
    assert 0 <= min(labels) <= max(labels) < index.num_classes == 2_500
    assert len(set(labels)) > 2_000


@pytest.mark.slow
def test_a_small_index_keeps_within_the_bounds_of_memory_and_disk(tmp_path: Path) -> None:
    lines = measure_index(tmp_path, 100_000)
    assert len({line.name for line in lines}) == 8
    assert [line.bound for line in lines] == [4, 1, 50, 32, 32, 20, 15, 1000]
    assert all(line.figure > 0 for line in lines)
    assert [line.name for line in lines if line.unit not in ("ms", "s") and not line.holds] == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--folder .* are free, .* samples need"):
        measure_index(tmp_path, 10**15)
    assert list(tmp_path.iterdir()) == []
