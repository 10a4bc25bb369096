"""The shards of an index as a sequence that makes each of them when it is asked for.

An index of 10^8 samples has 10,000 shards. Their table is two lists of texts and three arrays; an
object for each shard would take most of the time to open the index, and of its memory.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, Final, overload

import numpy as np

from pipelines.shards.shard import IndexColumns, Ints, MappedShard, Shard

_KEPT: Final = 1024  # about as many as a process has streams
_ROW: Final = {"url": str, "checksum": str, "samples": int, "bytes": int, "end": int}


class LazyShards(Sequence[Shard]):
    """Shards that are made when they are asked for.

    Attributes:
        kept: how many of them are kept at most.
    """

    kept = _KEPT

    @cached_property
    def _made(self) -> dict[int, Shard]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_made"}

    @property
    @abstractmethod
    def samples(self) -> Ints:
        """int64 `[shards]`: how many samples each one holds."""

    @abstractmethod
    def make(self, number: int) -> Shard:
        """The shard of a number from 0 on."""

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        """One shard, or a list of them."""
        if isinstance(number, slice):
            return [self[position] for position in range(len(self))[number]]
        made = self._made.get(number)
        if made is None:
            made = self.make(range(len(self))[number])  # as in a list: from the end, or IndexError
            if len(self._made) >= self.kept:
                self._made.clear()
            self._made[number] = made
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class ShardTable(LazyShards):
    """The shards of an index whose tables are in columns.

    Attributes:
        columns: of the whole index.
        urls, checksums: see `Shard`.
    """

    def __init__(self, columns: IndexColumns, rows: Sequence[dict[str, Any]]) -> None:
        """Take the rows of `index.json`.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: it is no table of shards, or not that of
                these columns.
        """
        self.columns = columns
        if set(map(len, rows)) - {len(_ROW)}:
            raise ValueError("a row is not that of a shard")
        values = [list(map(itemgetter(key), rows)) for key in _ROW]
        for each, kind in zip(values, _ROW.values(), strict=True):
            if set(map(type, each)) - {kind}:
                raise TypeError(f"a value of a shard's row is no {kind.__name__}")
        self.urls, self.checksums = values[:2]
        self._samples, self._bytes, self._ends = (np.array(each, np.int64) for each in values[2:])
        if len(rows) and min(map(np.min, (self._samples, self._ends, self._bytes))) < 0:
            raise ValueError("a number of a shard is negative")
        if (wrong := np.flatnonzero(self._ends > self._bytes)).size:
            raise ValueError(f"the samples of {self.urls[int(wrong[0])]} end behind its own end")
        self._starts = np.cumsum(np.append(0, self._samples))
        lengths = {column.entry.length for column in columns.known}
        if lengths != {int(self._starts[-1])}:
            raise ValueError(f"columns of {sorted(lengths)} values for {self._starts[-1]} samples")

    @property
    def samples(self) -> Ints:
        """See `LazyShards.samples`."""
        return self._samples

    def make(self, number: int) -> Shard:
        """See `LazyShards.make`."""
        return MappedShard(
            self.urls[number],
            int(self._samples[number]),
            int(self._bytes[number]),
            self.checksums[number],
            columns=self.columns,
            first=int(self._starts[number]),
            end=int(self._ends[number]),
        )


def shard_sizes(shards: Sequence[Shard]) -> Ints:
    """int64 `[shards]`: how many samples each one holds."""
    if isinstance(shards, LazyShards):
        return shards.samples
    return np.array([shard.samples for shard in shards], np.int64)


def shard_urls(shards: Sequence[Shard]) -> Sequence[str]:
    """`Shard.url` of each shard."""
    return shards.urls if isinstance(shards, ShardTable) else [shard.url for shard in shards]


def digest_text(shards: Sequence[Shard]) -> str:
    """URL, samples and checksum of each shard in JSON, as `json.dumps` writes it.

    It is written here, because `json.dumps` takes several times as long.
    """
    rows: Iterable[tuple[str, int, str]]
    if isinstance(shards, ShardTable):
        rows = zip(shards.urls, shards.samples.tolist(), shards.checksums, strict=True)
    else:
        rows = ((shard.url, shard.samples, shard.checksum) for shard in shards)
    quoted = json.encoder.encode_basestring_ascii
    texts = [f"[{quoted(url)}, {samples}, {quoted(checksum)}]" for url, samples, checksum in rows]
    return f"[{', '.join(texts)}]"
