"""How many workers a run gets: the largest number that is there and divides the micro-batches."""

from __future__ import annotations

from mhe_dist.config.schema import Config

RESIZE_CHECK_S = 30.0  # how often a running group looks for room to grow into


def group_size(available: int, config: Config) -> int:
    """How many workers to use of `available`; 0 if those are fewer than the run needs."""
    fitting = [size for size in config.group_sizes() if size <= available]
    return max(fitting, default=0)
