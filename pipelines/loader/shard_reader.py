"""Reads spans of shards for one process: from where the shards are, or through the cache.

A local shard is always read where it is. Of a remote shard only the range that is needed is read.
With a cache, the whole shard is read once, and its checksum is compared with the one of the index.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Final, NamedTuple

from mhe_dist.config.data import RemoteConfig
from mhe_dist.sizes import GIB
from pipelines.data.order import ShardSpan
from pipelines.data.sample import byte_range, split_samples
from pipelines.shards.index import ShardIndex
from pipelines.shards.shard import Shard
from pipelines.storage.cache import FileCache
from pipelines.storage.ranges import (
    CHECKSUM,
    FileLocation,
    WrongContentError,
    download,
    locate_file,
    read_range,
)

log = logging.getLogger(__name__)

_GAP: Final = 128 << 10  # most bytes between two spans that are read together


class FetchedSamples(NamedTuple):
    """The raw bytes of each sample of a span, and what is wrong with its whole shard, if known.

    Behind the end of a shard samples are shorter than they should be.
    """

    samples: list[memoryview]
    fault: str = ""


class ShardReader:
    """Reads spans; its methods may run in several threads."""

    def __init__(self, index: ShardIndex, remote: RemoteConfig) -> None:
        """Reading begins later, but the cache's folder is made."""
        self._index, self._retries = index, remote.retries
        self._bad: dict[int, str] = {}
        self._cache_is_full = False
        self._cache: FileCache | None = None
        if remote.cache_dir:
            try:
                self._cache = FileCache(remote.cache_dir, int(remote.cache_gib * GIB))
            except OSError as error:
                self._disable_cache(error)

    def locate(self, span: ShardSpan) -> FileLocation:
        """The file that a span is in; see `locate_file`."""
        return locate_file(self._index.url(span.shard))

    def read(self, spans: list[ShardSpan], file: FileLocation) -> FetchedSamples:
        """The samples of nearby spans of one shard, which is in `file`, by one request.

        Raises:
            RunError: the shard cannot be read.
        """
        number, bounds = spans[0].shard, [byte_range(self._index, span) for span in spans]
        first, last = bounds[0][0], bounds[-1][1]
        data = None if file.is_local else self._cached(number, file, first, last)
        if data is None:
            data = read_range(file, first, last, self._retries)
        samples: list[memoryview] = []
        for span, (start, stop) in zip(spans, bounds, strict=True):
            # The bytes between spans are dropped.
            part = data if len(spans) == 1 else data[start - first : stop - first]
            samples += split_samples(self._index, span, part)
        return FetchedSamples(samples, self._bad.get(number, ""))

    def _cached(self, number: int, file: FileLocation, start: int, stop: int) -> bytes | None:
        """A range of a shard from the cache, or None if the cache cannot hold the shard."""
        if self._cache is None or number in self._bad:
            return None
        shard = self._index.shards[number]
        fill = partial(download, file, shard.bytes, shard.checksum, self._retries)
        try:
            stream = self._cache.open(_cache_entry_name(shard, file.url), shard.bytes, fill)
            if stream is not None:
                with stream:
                    stream.seek(start)
                    return stream.read(stop - start)
        except WrongContentError as error:
            self._bad[number] = str(error)
            return None
        except OSError as error:
            self._disable_cache(error)
            return None
        if not self._cache_is_full:
            self._cache_is_full = True
            log.warning(
                "%s: no room in the cache (data.remote.cache_gib), read without it", file.url
            )
        return None

    def _disable_cache(self, error: OSError) -> None:
        log.warning("data.remote.cache_dir cannot be used (%s); going on without it", error)
        self._cache = None


def group_nearby_spans(index: ShardIndex, spans: Iterable[ShardSpan]) -> Iterator[list[ShardSpan]]:
    """Group spans that lie near one another in a shard: a request costs more than the gap."""
    run: list[ShardSpan] = []
    end = 0
    for span in spans:
        start, stop = byte_range(index, span)
        if run and not (span.shard == run[0].shard and 0 <= start - end <= _GAP):
            yield run
            run = []
        run.append(span)
        end = stop
    if run:
        yield run


def _cache_entry_name(shard: Shard, url: str) -> str:
    """The name of a shard's cache entry: its checksum, or else a hash of its size and URL.

    So a data set that was made again under the same URL never gets old bytes.
    """
    known = CHECKSUM.fullmatch(shard.checksum)
    return (
        known[1]
        if known
        else hashlib.sha256(f"{shard.bytes} {url}".encode(errors="surrogateescape")).hexdigest()
    )
