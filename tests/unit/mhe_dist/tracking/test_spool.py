"""What waits for MLflow on disk, when the disk is full or a process was killed while it wrote."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhe_dist.tracking.spool import MetricRecord, Spool


def record(step: int) -> MetricRecord:
    return MetricRecord(step, 1000 + step, {"loss": 0.5})


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_no_half_of_a_record_behind(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "mlflow")
    file = tmp_path / "mlflow" / "waiting.jsonl"
    spool.add(record(0))
    with room(file.stat().st_size + 10):
        spool.add(record(1))
    spool.add(record(2))
    assert Spool(tmp_path / "mlflow").pending(10) == [record(0), record(2)]


def test_a_torn_record_is_passed_over_wherever_it_is(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "mlflow")
    file = tmp_path / "mlflow" / "waiting.jsonl"
    spool.add(record(0))
    with file.open("a") as stream:
        stream.write('[1, 1001, {"lo')
    spool.add(record(2))
    spool.add(record(3))
    assert len(spool) == 2
    assert spool.pending(10) == [record(0), record(3)]
    assert spool.pending(3) == [record(0)], "later ones are recorded anew"


def test_a_disk_that_refuses_ends_neither_a_start_nor_the_thread_that_sends(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "mlflow")
    spool.add(record(0))
    with room(0):
        spool.run_id = "1"
        assert spool.pending(10) == [record(0)]
        spool.clear()
    assert spool.run_id is None
