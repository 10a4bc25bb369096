"""Processes that do tasks end with the interest in them."""

from __future__ import annotations

import os
import time

import pytest

from mhe_dist.errors import RunError
from pipelines.storage.worker_pool import Processes, map_unordered, run_tasks


@pytest.mark.slow
def test_an_interruption_does_not_wait_for_what_is_at_work() -> None:
    tasks = enumerate([0.0, 10_000.0, 10_000.0, 10_000.0])
    made = map_unordered(time.sleep, tasks, 2)
    assert next(made) == (0, None)
    made.close()


@pytest.mark.slow
def test_processes_have_an_environment_and_one_thread_each() -> None:
    before = dict(os.environ)
    workers = Processes(2, [{"CUDA_VISIBLE_DEVICES": "7"}])
    names = ["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    assert run_tasks(os.getenv, names, workers) == ["7", "1", "1"]
    assert dict(os.environ) == before
    with pytest.raises(RunError, match="a process was killed while it worked"):
        run_tasks(os._exit, [1, 1], workers)
