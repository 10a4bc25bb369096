"""The benchmark of saves measures what it says."""

from __future__ import annotations

from pathlib import Path

from pipelines.bench import checkpoint


def test_every_figure_is_there_and_a_save_blocks_less_than_it_takes(tmp_path: Path) -> None:
    figures = checkpoint.measure(tmp_path, 4 * checkpoint.MIB, rounds=1)
    assert figures.bytes == 4 * checkpoint.MIB
    assert 0 < figures.blocked_s < figures.written_s
    assert figures.plain_s > 0
    assert figures.disk_s > 0
    assert (tmp_path / "disk").stat().st_size == figures.bytes
