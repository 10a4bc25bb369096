"""The bytes of windows; remote ones are fetched in the background before they are needed.

When a stream has used up most of a window, its next one is fetched by a thread, so that the change
does not wait for the store. This changes when bytes are read, never which. Memory: the open
windows of a process's streams, and beside them at most one window more for each stream, all of
these together at most `data.remote.read_ahead_mib`. What does not fit is read when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple

from mhe_dist.config.data import RemoteConfig
from pipelines.data.order import SampleOrder, ShardSpan, Window
from pipelines.data.sample import byte_range
from pipelines.loader.shard_reader import ShardReader, group_nearby_spans
from pipelines.shards.index import ShardIndex
from pipelines.storage.ranges import FileLocation

_THREADS: Final = 4
_PREFETCH_AT: Final = 4  # the next window is fetched when 1/4 of the present one is left


class WindowBytes(NamedTuple):
    """The raw bytes of a window's samples in reading order, and what is wrong with shards.

    Attributes:
        samples: see `read_span`.
        bad_shards: URL -> what is wrong.
    """

    samples: list[memoryview]
    bad_shards: dict[str, str]


class _PendingWindow(NamedTuple):
    size: int
    future: Future[WindowBytes]


class WindowReader:
    """Reads the windows of some streams in one process; as a context, it ends its threads."""

    def __init__(
        self, index: ShardIndex, order: SampleOrder, remote: RemoteConfig, positions: range
    ) -> None:
        """Prepare.

        Args:
            index: the data set.
            order: of its samples.
            remote: how to read.
            positions: which ones of each stream will be read; nothing is fetched for others.
        """
        self._index, self._order, self._positions = index, order, positions
        self._reader = ShardReader(index, remote)
        self._max_bytes = remote.read_ahead_mib << 20
        self._is_ahead = self._max_bytes > 0 and not index.is_local
        self._pending: dict[Window, _PendingWindow] = {}
        self._last_read: dict[int, Window] = {}  # the last one of each stream
        self._pool = ThreadPoolExecutor(_THREADS, "read-ahead")  # without a thread until it is used

    def __enter__(self) -> WindowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pending.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def prefetch(self, streams: Iterable[int], position: int) -> None:
        """Fetch the windows at a position of some streams, unless they were read before."""
        if self._is_ahead:
            for stream in streams:
                self._submit(stream, position)

    def prefetch_next(self, stream: int, start: int, stop: int) -> None:
        """Fetch a stream's next window if the present one is nearly used up.

        Args:
            stream: whose positions `[start, stop)` have just been read; as many may be read next.
            start, stop: see there.
        """
        if self._is_ahead:
            window, slot = self._order.window_at(stream, stop - 1)
            left = window.size - slot - 1
            if left < max(window.size // _PREFETCH_AT, stop - start):
                self._submit(stream, stop + left)

    def read(self, window: Window) -> WindowBytes:
        """The bytes of a window.

        Raises:
            RunError: a shard cannot be read.
            UserError: the index is damaged there.
        """
        self._last_read[window.stream] = window
        pending = self._pending.pop(window, None)
        return self._fetch(self._locate(window)) if pending is None else pending.future.result()

    def _submit(self, stream: int, position: int) -> None:
        """Begin to fetch the window of a position, unless it is known, local or too large."""
        window, _ = self._order.window_at(stream, position)
        is_known = window in self._pending or window == self._last_read.get(stream)
        if is_known or position not in self._positions:
            return
        located = self._locate(window)
        if all(file.is_local for _, file in located):
            return
        bounds = [byte_range(self._index, span) for spans, _ in located for span in spans]
        size = sum(stop - start for start, stop in bounds)
        if size + sum(pending.size for pending in self._pending.values()) <= self._max_bytes:
            self._pending[window] = _PendingWindow(size, self._pool.submit(self._fetch, located))

    def _locate(self, window: Window) -> list[tuple[list[ShardSpan], FileLocation]]:
        """The spans of a window, grouped into those that are read together, and their files."""
        runs = group_nearby_spans(self._index, self._order.spans(window))
        return [(spans, self._reader.locate(spans[0])) for spans in runs]

    def _fetch(self, located: list[tuple[list[ShardSpan], FileLocation]]) -> WindowBytes:
        samples: list[memoryview] = []
        bad: dict[str, str] = {}
        for spans, file in located:
            found = self._reader.read(spans, file)
            samples += found.samples
            if found.fault:
                bad[file.url] = found.fault
        return WindowBytes(samples, bad)
