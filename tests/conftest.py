"""Shared helpers: one way to run a function on several gloo ranks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from mhe_dist.distributed import spawn as local_ranks
from tests.support.waiting import WATCHDOG_S

# What a node keeps between processes is no part of the user's own cache. Ranks import this file,
# too, and end without tidying up: they have the folder of the process that started them.
if "MHE_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="mhe-tests-cache-")
    os.environ["MHE_CACHE_DIR"] = _CACHE.name

# The files whose ranks run heads alone.
HEADS_ALONE = ("test_heads_exact.py", "test_level_heads.py")
run_ranks = partial(local_ranks.run_ranks, start_method="forkserver")

# How long an example takes says how busy the machine is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while the tests are imported."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Choose what ranks have imported, and keep what is imported here out of garbage collection.

    Ranks are forked from one process that has imported what they need: seconds less for each. A
    garbage collection that walks through all modules takes half a second.
    """
    heads_alone = all("unit" in i.path.parts or i.path.name in HEADS_ALONE for i in session.items)
    preload = "tests.support.preload_heads" if heads_alone else "tests.support.preload"
    multiprocessing.set_forkserver_preload([preload])
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write bytes that are not UTF-8 in what a test printed as pytest-xdist can send them."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture
def patient_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker of this process waits for its MLflow however long that takes."""
    for limit in ("_FIRST_ATTEMPT_S", "_CLOSE_S", "_GRACE_S"):
        monkeypatch.setattr(f"mhe_dist.tracking.mlflow.{limit}", WATCHDOG_S)


@pytest.fixture
def run_distributed() -> Callable[..., list[Any]]:
    """`run_distributed(fn, world_size, *args)`: see `mhe_dist.distributed.spawn.run_ranks`."""
    return run_ranks
