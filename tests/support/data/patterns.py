"""A data set of 200 small images of noise in seven tars, and damage to one of its samples."""

from __future__ import annotations

import numpy as np

from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from tests.support.data.images import encoded

SIZES = [23, 40, 1, 17, 60, 31, 28]  # 200 samples
CLASSES = 10
SIDE = 12
PNG_DATA = 512 + 60  # in the middle of the compressed pixels


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def sample(number: int) -> Sample:
    members = {"png": encoded(image(number), "png"), "cls": str(number % CLASSES).encode()}
    return Sample(f"s{number:03d}", members)


def write_patterns(folder: str) -> ShardIndex:
    with ShardWriter(folder, "part") as writer:
        numbers = iter(range(sum(SIZES)))
        for size in SIZES:
            writer.write(sample(next(numbers)) for _ in range(size))
        return writer.finish(CLASSES)


def damage(index: ShardIndex, shard: int, number: int, data: bytes, offset: int = 0) -> None:
    """Overwrite bytes of one sample."""
    with open(index.url(shard), "r+b") as tar:
        tar.seek(int(index.shards[shard].offsets[number]) + offset)
        tar.write(data)
