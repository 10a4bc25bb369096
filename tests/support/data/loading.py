"""Loaders for tests, from a whole config, and what they load."""

from __future__ import annotations

import torch

from mhe_dist.config.schema import Config
from pipelines.loader.loader import Loader
from pipelines.shards.index import ShardIndex

# (step, number of the micro-batch) -> images, labels, keys.
Loaded = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, list[str]]]


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


def load(loader: Loader) -> Loaded:
    return {
        (batch.step, micro.index): (micro.images, micro.labels, micro.keys)
        for batch in loader
        for micro in batch.micro_batches
    }


def assert_same(one: Loaded, other: Loaded) -> None:
    """The same micro-batches in the same order, bit for bit."""
    assert list(one) == list(other)
    for position, (images, labels, keys) in one.items():
        assert keys == other[position][2]
        assert torch.equal(labels, other[position][1])
        assert torch.equal(images, other[position][0])
