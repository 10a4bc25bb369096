"""Memory and cores of a container, from the files in which Linux keeps its limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from mhe_dist.limits import available_cores, available_memory, peak_memory
from mhe_dist.sizes import MIB


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "membership"


@pytest.mark.parametrize("path", ["/pod/box", "/out/of/sight"])
def test_memory_of_a_container(tmp_path: Path, membership: Path, path: str) -> None:
    """Version 2; the caches that the system would drop count as free."""
    membership.write_text(f"0::{path}\n")
    write(
        tmp_path / "pod" / "box" if path == "/pod/box" else tmp_path,
        memory__max=str(100 * MIB),
        memory__current=str(80 * MIB),
        memory__stat=f"anon {40 * MIB}\ninactive_file {30 * MIB}",
    )
    assert available_memory(tmp_path, membership) == 50 * MIB


def test_the_tightest_group_decides(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/pod/box\n")
    write(tmp_path / "pod", memory__max=str(10 * MIB), memory__current=str(8 * MIB))
    write(tmp_path / "pod" / "box", memory__max=str(90 * MIB), memory__current="0")
    assert available_memory(tmp_path, membership) == 2 * MIB


def test_memory_in_groups_of_version_1(tmp_path: Path, membership: Path) -> None:
    membership.write_text("4:memory:/box\n1:cpu,cpuacct:/box\n0::/\n")
    write(
        tmp_path / "memory" / "box",
        memory__limit_in_bytes=str(100 * MIB),
        memory__usage_in_bytes=str(90 * MIB),
        memory__stat=f"total_inactive_file {5 * MIB}",
    )
    assert available_memory(tmp_path, membership) == 15 * MIB


@pytest.mark.parametrize("limit", ["max", str(1 << 62), ""])
def test_without_a_limit_it_is_the_machine_s_memory(
    tmp_path: Path, membership: Path, limit: str
) -> None:
    membership.write_text("0::/\n")
    write(tmp_path, memory__max=limit, memory__current="1")
    assert available_memory(tmp_path, membership) == pytest.approx(
        psutil.virtual_memory().available, rel=0.2
    )


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu__max": "150000 100000"}, 2),
        ({"cpu__max": "10000 100000"}, 1),
        ({"cpu__max": "max 100000"}, 64),
        ({"cpu__cfs_quota_us": "300000", "cpu__cfs_period_us": "100000"}, 3),
        ({"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, 64),
        ({}, 64),
    ],
)
def test_cores_of_a_container(
    tmp_path: Path,
    membership: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    cores: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    is_old = "cpu__cfs_quota_us" in files
    membership.write_text("1:cpu:/box\n" if is_old else "0::/box\n")
    write(tmp_path / "cpu" / "box" if is_old else tmp_path / "box", **files)
    assert available_cores(tmp_path, membership) == cores


def test_this_machine_answers() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_the_peak_is_that_of_this_process_alone() -> None:
    """A child's counter in `getrusage` begins with the memory of whoever started it."""
    held = np.ones(60 * MIB, np.uint8)
    show = "from mhe_dist.limits import peak_memory; print(peak_memory())"
    child = int(
        subprocess.check_output(
            [sys.executable, "-S", "-c", f"import sys; sys.path[:0]={sys.path}; {show}"]
        )
    )
    assert child + len(held) // 2 < peak_memory()
