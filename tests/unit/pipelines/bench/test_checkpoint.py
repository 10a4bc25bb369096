"""The benchmark of saves measures what it says."""

from __future__ import annotations

from pathlib import Path

from mhe_dist.sizes import MIB
from pipelines.bench.checkpoint import measure_saves


def test_every_figure_is_there_and_a_save_blocks_less_than_it_takes(tmp_path: Path) -> None:
    times = measure_saves(tmp_path, 4 * MIB, rounds=1)
    assert times.bytes == 4 * MIB
    assert 0 < times.blocked_s < times.written_s
    assert times.plain_s > 0
    assert times.disk_s > 0
    assert (tmp_path / "disk").stat().st_size == times.bytes
