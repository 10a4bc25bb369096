"""Shared helpers: one way to run a function on several gloo ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from benchmarks.ranks import run_ranks


@pytest.fixture
def run_distributed() -> Callable[..., list[Any]]:
    """`run_distributed(fn, world_size, *args)`: see `run_ranks`."""
    return run_ranks
