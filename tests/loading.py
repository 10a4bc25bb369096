"""Loaders for tests, from a whole config."""

from __future__ import annotations

from mhe_dist.config.schema import Config
from pipelines.loader.loader import Loader
from pipelines.shards.index import ShardIndex


def loader_of(
    index: ShardIndex, config: Config, local_micro_batches: range, start_step: int, stop_step: int
) -> Loader:
    """The loader that a run with this config would have on a rank with these micro-batches."""
    return Loader(
        index,
        config.data,
        global_batch=config.train.global_batch,
        micro_batches=config.train.micro_batches,
        local_micro_batches=local_micro_batches,
        start_step=start_step,
        stop_step=stop_step,
        seed=config.run.seed,
    )
