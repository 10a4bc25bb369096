"""Small data sets of shards for tests: eight samples in two tars."""

from __future__ import annotations

from pathlib import Path

from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter

PACKED = Path(__file__).parent / "packed_index"  # data sets of format 1, without their tars


def some_samples(count: int, first: int = 0) -> list[Sample]:
    """So many samples, each of another class."""
    return [
        Sample(f"k{i:03d}", {"bin": bytes([i % 256]) * (i * 37), "cls": str(i).encode()})
        for i in range(first, first + count)
    ]


def write_set(folder: str) -> ShardIndex:
    """Five samples in one tar and three in another."""
    with ShardWriter(folder, "part") as writer:
        writer.write(some_samples(5))
        writer.write(some_samples(3, first=5))
        return writer.finish(8, {"colour": "grün"})


def tables(index: ShardIndex) -> list[object]:
    """All that an index says of its shards."""
    return [
        (
            *(shard.url, shard.samples, shard.bytes, shard.checksum, shard.offsets.tolist()),
            None if shard.labels is None else shard.labels.tolist(),
        )
        for shard in index.shards
    ]
