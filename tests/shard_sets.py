"""Small data sets of shards for tests: eight samples in two tars."""

from __future__ import annotations

from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter


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
