"""Which sample comes when: a pure function of (seed, shard sizes, step).

Nothing here knows of ranks, loader processes or files, so none of them can change the order.

An *epoch* is the concatenation of all shards in a shuffled order. *Stream* s of S owns the samples
`[s * N // S, (s + 1) * N // S)` of every epoch, so all streams are equal to one sample; a stream
may begin inside a shard. The epochs of a stream follow one another in one endless sequence:
position p is offset `p % L` of its epoch `p // L`, with L its constant length. Within an epoch the
samples of a stream are permuted inside *windows* of consecutive ones. A step takes the next
`global_batch / S` positions of every stream, in the order of the streams.

So no batch is short, a sample comes exactly once in an epoch of its stream, and the step alone
determines what is next. Streams whose lengths differ by one drift apart by one sample per epoch.

Where a `Subset` says which samples of each shard are in an epoch, the others are left out before
all this, as if the shards did not hold them. All epochs have the same number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from mhe_dist.seeds import generator

Ints = npt.NDArray[np.int64]

_COMPARED: Final = 1 << 14  # words that are compared at once


class EpochSamples(Protocol):
    """Which samples of each shard are in an epoch."""

    @property
    def sizes(self) -> Ints:
        """int64 `[shards]`: how many of each shard."""

    def of(self, shard: int, start: int, stop: int) -> Ints | None:
        """Numbers in a shard, sorted, of its samples `[start, stop)` in the epoch; None: all."""


class Subset(Protocol):
    """Which samples are in an epoch; a `Mixture` is one."""

    @property
    def epoch_samples(self) -> int:
        """N: how many samples each epoch has."""

    def draw(self, epoch: int) -> EpochSamples:
        """The samples of an epoch."""


class ShardSpan(NamedTuple):
    """Consecutive samples `[start, stop)` of one shard, by its number in the index."""

    shard: int
    start: int
    stop: int


class Window(NamedTuple):
    """Samples of a stream that are permuted together.

    Attributes:
        stream, epoch, number: they key the permutation.
        start: offset of the first one in this epoch of the stream.
        size: how many.
    """

    stream: int
    epoch: int
    number: int
    start: int
    size: int


class _EpochLayout(NamedTuple):
    """An epoch.

    Attributes:
        shards: numbers of the shards in their order.
        starts: where each of them begins in the concatenation, and where the last one ends.
        chosen: by number of the shard; None: all samples of all shards.
    """

    shards: Ints
    starts: Ints
    chosen: EpochSamples | None


class WindowSlice(NamedTuple):
    """Consecutive slots `[start, stop)` of a permuted window."""

    window: Window
    start: int
    stop: int


def stable_permutation(count: int, rng: np.random.Generator) -> Ints:
    """A random permutation of `[0, count)` that no version of NumPy draws differently.

    `Generator.permutation` may change between versions; the raw bits of a bit generator may not.
    """
    return stable_order(rng.bit_generator.random_raw(count))


def stable_order(words: npt.NDArray[np.uint64]) -> Ints:
    """The numbers that sort words, int64; equal ones stay in their order.

    For words that seldom are equal: a stable sort of 64 bits takes two to four times as long.
    """
    order = np.argsort(words)
    for start in range(0, len(words), _COMPARED):
        ascending = words[order[start : start + _COMPARED + 1]]
        if (ascending[1:] == ascending[:-1]).any():
            order = np.argsort(words, kind="stable")
            break
    return order.astype(np.int64, copy=False)


class SampleOrder:
    """The order of the samples of a data set."""

    def __init__(
        self,
        shard_samples: Sequence[int] | Ints,
        streams: int,
        shuffle_window: int,
        seed: int,
        subset: Subset | None = None,
    ) -> None:
        """Describe the data set.

        Args:
            shard_samples: number of samples of each shard, by the index.
            streams: S, the number of streams.
            shuffle_window: most samples that are permuted together.
            seed: of the run.
            subset: which samples are in an epoch; None: all.

        Raises:
            UserError: there are fewer samples than streams.
        """
        self.shard_samples = np.asarray(shard_samples, np.int64)
        self.subset = subset
        self.samples = subset.epoch_samples if subset else int(self.shard_samples.sum())
        self.streams, self.shuffle_window, self.seed = streams, shuffle_window, seed
        if self.samples < streams:
            raise UserError(
                f"data.streams={streams}: an epoch has {self.samples} samples only; give at most "
                f"that many streams"
            )
        self._layouts: dict[int, _EpochLayout] = {}

    def stream_bounds(self, stream: int) -> tuple[int, int]:
        """First and last + 1 sample of a stream in the concatenation of an epoch."""
        return (
            stream * self.samples // self.streams,
            (stream + 1) * self.samples // self.streams,
        )

    def stream_length(self, stream: int) -> int:
        """L: samples of a stream per epoch."""
        start, stop = self.stream_bounds(stream)
        return stop - start

    def window_slices(self, stream: int, start: int, stop: int) -> Iterator[WindowSlice]:
        """The windows, and the slots in them, of the positions `[start, stop)` of a stream."""
        while start < stop:
            window, slot = self.window_at(stream, start)
            taken = min(window.size - slot, stop - start)
            yield WindowSlice(window, slot, slot + taken)
            start += taken

    def batch(self, step: int, global_batch: int) -> list[tuple[int, int]]:
        """Shard, and number in it, of each sample of a step `[global_batch]`, in their order.

        Args:
            step: from 0.
            global_batch: samples per step, a multiple of the streams.
        """
        each = global_batch // self.streams
        found: list[tuple[int, int]] = []
        for stream in range(self.streams):
            for part in self.window_slices(stream, step * each, (step + 1) * each):
                spans = self.spans(part.window)
                samples = [(s.shard, i) for s in spans for i in range(s.start, s.stop)]
                shown = self.permutation(part.window)[part.start : part.stop]
                found += [samples[number] for number in shown.tolist()]
        return found

    def window_at(self, stream: int, position: int) -> tuple[Window, int]:
        """The window that holds a position of a stream, and the slot there.

        The first window of an epoch is shorter in later streams. Without that all streams would
        come to the end of a window, and have to read the next, in the same step.
        """
        length = self.stream_length(stream)
        epoch, offset = divmod(position, length)
        lead = stream * self.shuffle_window // self.streams
        number = (offset + lead) // self.shuffle_window
        start = max(0, number * self.shuffle_window - lead)
        stop = min(length, (number + 1) * self.shuffle_window - lead)
        return Window(stream, epoch, number, start, stop - start), offset - start

    def permutation(self, window: Window) -> Ints:
        """int64 `[size]`: for each slot, the number of its sample in reading order."""
        keys = (window.epoch, window.stream, window.number)
        return stable_permutation(window.size, generator(self.seed, "order/window", *keys))

    def spans(self, window: Window) -> list[ShardSpan]:
        """Where the samples of a window lie, in reading order."""
        layout = self._layout(window.epoch)
        first = self.stream_bounds(window.stream)[0] + window.start
        last = first + window.size
        spans: list[ShardSpan] = []
        at = int(np.searchsorted(layout.starts, first, side="right")) - 1
        while first < last:
            stop = min(last, int(layout.starts[at + 1]))
            if stop > first:  # a shard may be empty
                begin = int(layout.starts[at])
                span = ShardSpan(int(layout.shards[at]), first - begin, stop - begin)
                spans += _consecutive_spans(span, layout.chosen)
            first, at = stop, at + 1
        return spans

    def _layout(self, epoch: int) -> _EpochLayout:
        if epoch not in self._layouts:
            # Streams are at most a sample per epoch apart, so few epochs are in use at a time.
            for old in list(self._layouts)[:-3]:
                del self._layouts[old]
            rng = generator(self.seed, "order/shards", epoch)
            shards = stable_permutation(len(self.shard_samples), rng)
            chosen = self.subset.draw(epoch) if self.subset else None
            sizes = self.shard_samples if chosen is None else chosen.sizes
            starts = np.cumsum(np.append(0, sizes[shards]), dtype=np.int64)
            self._layouts[epoch] = _EpochLayout(shards, starts, chosen)
        return self._layouts[epoch]


def _consecutive_spans(span: ShardSpan, chosen: EpochSamples | None) -> list[ShardSpan]:
    """The runs of consecutive samples in a span of a shard's chosen samples."""
    numbers = None if chosen is None else chosen.of(*span)
    if numbers is None:
        return [span]
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    firsts = numbers[np.append(0, breaks)]
    lasts = numbers[np.append(breaks, len(numbers)) - 1]
    pairs = zip(firsts.tolist(), lasts.tolist(), strict=True)
    return [ShardSpan(span.shard, first, last + 1) for first, last in pairs]
