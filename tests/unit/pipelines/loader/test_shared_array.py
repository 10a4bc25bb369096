"""Arrays that processes share: whoever writes, all see it, however small /dev/shm is."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.loader.shared_array import SharedArray

FULL = """
mount -t tmpfs -o size=64k tmpfs /dev/shm
mount -t tmpfs -o size=64k tmpfs "$TMPDIR"
exec "$@"
"""
RING = """
from pipelines.loader.shared_buffers import SharedBuffers
SharedBuffers(processes=2, prefetch=2, images=8, side=224).images(1, 2)[:] = 1
"""


def write(array: SharedArray) -> None:
    array.values[1] = 7


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_what_a_started_process_writes_is_seen(method: str) -> None:
    array = SharedArray((3, 5), np.int64)
    process = multiprocessing.get_context(method).Process(target=write, args=(array,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert array.values.tolist() == [[0] * 5, [7] * 5, [0] * 5]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is a file that Python opens")
def test_an_array_that_is_gone_leaves_no_file_open() -> None:
    def open_arrays() -> int:
        gc.collect()
        return sum("memfd:mhe" in str(file.readlink()) for file in links())

    def links() -> list[Path]:
        return [file for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]

    before, kept = open_arrays(), SharedArray((1,), np.uint8)
    assert open_arrays() > before
    del kept
    assert open_arrays() == before


def can_mount() -> bool:
    """Whether this user may mount in a namespace of their own."""
    words = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") is not None and not subprocess.call(
        words, stderr=subprocess.DEVNULL
    )


@pytest.mark.skipif(not can_mount(), reason="needs the right to make namespaces")
def test_the_ring_of_a_loader_needs_no_room_in_dev_shm_or_the_temporary_folder(
    tmp_path: Path,
) -> None:
    """The first write ended the process with SIGBUS, without a word."""
    words = ["unshare", "--mount", "sh", "-euc", FULL, "sh", sys.executable, "-c", RING]
    assert subprocess.call(words, env={**os.environ, "TMPDIR": str(tmp_path)}) == 0
