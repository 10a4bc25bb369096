"""Every file that is written through a mapping has its room from the start."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhe_dist.errors import RunError
from pipelines.bench.scale.audit import write_synthetic_set
from pipelines.clustering.state import ClusterState
from pipelines.evaluate.metrics.all_pairs import compare_all_pairs
from pipelines.evaluate.metrics.identification import identify
from pipelines.storage.mapped_file import create_mapped_array
from pipelines.storage.staging import Journal

LABELS = np.arange(64) % 8


def rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 512))


def cluster_array(folder: Path) -> None:
    state = ClusterState(f"{folder}/state", Journal(f"{folder}/journal", {}), lambda *_: None)
    state.array("rows", (64, 512), "float64")


def test_a_new_array_is_zeros_with_room_for_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    array = create_mapped_array(path, np.float64, (1 << 10, 512))
    assert path.stat().st_blocks * 512 >= array.nbytes
    assert not array.any()
    array[5] = 7
    array.flush()
    found = np.load(path)
    assert (found == array).all() and found[5].all()


def test_the_files_of_a_clustering_and_an_audit_have_their_room(tmp_path: Path) -> None:
    cluster_array(tmp_path)
    assert (tmp_path / "state" / "rows").stat().st_blocks * 512 >= 64 * 512 * 8


@pytest.mark.parametrize(
    ("work", "file"),
    [
        (cluster_array, "state/rows: 262,144"),
        (
            lambda folder: compare_all_pairs(rows(), LABELS, (0.1,), folder=str(folder)),
            "rows.npy: 262,144",
        ),
        (
            lambda folder: identify(rows(), LABELS, rows(), LABELS, folder=str(folder)),
            "gallery.npy: 262,144",
        ),
        (lambda folder: write_synthetic_set(folder, 100, 64), "rows.npy: 25,600"),
    ],
    ids=["clustering and audit", "all pairs", "identification", "bench audit"],
)
def test_a_full_disk_is_an_error_that_names_the_file(
    work: Callable[[Path], None], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write of a page ended the process with SIGBUS."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=f"{file} bytes cannot be reserved: No space left"):
        work(tmp_path)
