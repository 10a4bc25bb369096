"""The training images, batch by batch, in the order of `order.py`.

A rank's loader computes some micro-batches of every step. Its loader processes share the streams
of each micro-batch: process k of K reads the k-th part of them, and the rank joins the parts in
the order of the streams. So neither W nor K can be seen in what comes out. A process holds one
window of each of its streams as undecoded bytes and decodes a sample when its turn comes.

A sample that cannot be used is counted and named. Its place is filled by the sample that follows
it in the permuted window (the first one follows the last), or the next one that can be used; the
augmentation's draws stay those of the place, so the substitute does not come twice as the same
pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mhe_dist.batch import MicroBatch, StepBatch
from mhe_dist.config import AugmentConfig, Config, DataConfig
from mhe_dist.errors import RunError, UserError
from mhe_dist.topology import share
from pipelines.augment import Noise, augment
from pipelines.decode import Pixels
from pipelines.fetch import Damaged, Example, example, read_piece
from pipelines.order import Order, Piece, Window
from pipelines.shards import ShardIndex
from pipelines.windows import WindowReader

log = logging.getLogger(__name__)


class Fault(NamedTuple):
    """A bad sample: where it is, and what is wrong with it."""

    place: str
    reason: str


@dataclass
class Faults:
    """The bad samples that a loader met.

    Attributes:
        seen: samples drawn so far, good or bad.
        count: bad ones among them; a sample counts each time it is drawn.
        samples: where each bad sample is -> what is wrong with it.
    """

    seen: int = 0
    count: int = 0
    samples: dict[str, str] = field(default_factory=dict)


class Part(NamedTuple):
    """What one loader process makes of a micro-batch, or the failure that ends its work."""

    images: Tensor
    labels: Tensor
    keys: list[str]
    faults: list[Fault]
    failure: str = ""


class Loader:
    """Iterates over the steps `[start_step, stop_step)` of one rank.

    Attributes:
        order: the order of the samples.
        faults: the bad samples met so far.
    """

    def __init__(
        self,
        index: ShardIndex,
        config: Config,
        micro_batches: range,
        start_step: int,
        stop_step: int,
    ) -> None:
        """Prepare; reading begins with the iteration.

        Args:
            index: the data set.
            config: of the run; `data`, `train` and `run.seed` matter here.
            micro_batches: which of a step's canonical micro-batches this rank computes.
            start_step: where to begin; nothing before it is read, except the rest of its windows.
            stop_step: where to end.

        Raises:
            UserError: fewer samples than streams.
        """
        data = config.data
        sizes = [shard.samples for shard in index.shards]
        self.order = Order(sizes, data.streams, data.shuffle_window, config.run.seed)
        self.faults = Faults()
        self._data = data
        self._micro_batches = micro_batches
        self._steps = range(start_step, stop_step)
        per_batch = data.streams // config.train.micro_batches
        streams = range(micro_batches.start * per_batch, micro_batches.stop * per_batch)
        self._epoch = sum(self.order.length(stream) for stream in streams)
        self._processes = max(1, min(data.loader_workers, per_batch))
        self._source = _Source(
            index,
            self.order,
            config,
            [range(i * per_batch, (i + 1) * per_batch) for i in micro_batches],
            self._steps,
        )

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps.

        Raises:
            RunError: a shard or too many samples cannot be read, or a loader process died.
        """
        parts = iter(self._dataloader())
        for step in self._steps:
            begin = time.perf_counter()
            batches = []
            for number in self._micro_batches:
                taken = [self._accept(part) for part in self._take(parts)]
                batches.append(_join(number, taken))
            yield StepBatch(step, batches, time.perf_counter() - begin)

    def _dataloader(self) -> DataLoader[Part]:
        workers = self._processes if self._data.loader_workers else 0
        return DataLoader(
            self._source,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            prefetch_factor=self._data.prefetch if workers else None,
            # A generator of its own: the default one would take a draw from torch's global state.
            generator=torch.Generator(),
        )

    def _take(self, parts: Iterator[Part]) -> Iterator[Part]:
        """One part from each loader process, which torch asks in turn."""
        for _ in range(self._processes):
            try:
                yield next(parts)
            except RuntimeError as error:
                raise RunError(f"a loader process failed: {error}") from error

    def _accept(self, part: Part) -> Part:
        """Count a part's bad samples and hold the limit."""
        if part.failure:
            raise RunError(part.failure)
        self.faults.seen += len(part.keys)
        self.faults.count += len(part.faults)
        for fault in part.faults:
            if fault.place not in self.faults.samples:
                log.warning("bad sample: %s: %s", fault.place, fault.reason)
            self.faults.samples[fault.place] = fault.reason
            if self._data.on_bad_sample == "fail":
                raise RunError(
                    f"{fault.place}: {fault.reason}; data.on_bad_sample=skip would go on without it"
                )
        allowed = self._data.max_bad_fraction * max(self.faults.seen, self._epoch)
        if self.faults.count > allowed:
            raise RunError(
                f"{self.faults.count} bad samples, more than data.max_bad_fraction="
                f"{self._data.max_bad_fraction} of {max(self.faults.seen, self._epoch)}; the last: "
                f"{part.faults[-1].place}: {part.faults[-1].reason}"
            )
        return part


class _Source(IterableDataset[Part]):
    """What runs in a loader process."""

    def __init__(
        self,
        index: ShardIndex,
        order: Order,
        config: Config,
        streams: list[range],
        steps: range,
    ) -> None:
        self.index, self.order, self.data = index, order, config.data
        self.streams, self.steps = streams, steps
        self.per_stream = config.train.global_batch // config.data.streams
        self.noise = Noise(config.run.seed)
        self.augmenting = config.data.augment != AugmentConfig()

    def __iter__(self) -> Iterator[Part]:
        """Yield a part for each micro-batch of each step."""
        positions = range(self.steps.start * self.per_stream, self.steps.stop * self.per_stream)
        with WindowReader(self.index, self.order, self.data.remote, positions) as self.reader:
            yield from self._parts()

    def _parts(self) -> Iterator[Part]:
        info = get_worker_info()
        process, processes = (info.id, info.num_workers) if info else (0, 1)
        open_windows: dict[int, _OpenWindow] = {}
        for step in self.steps:
            positions = step * self.per_stream, (step + 1) * self.per_stream
            for streams in self.streams:
                mine = share(len(streams), process, processes)
                try:
                    yield self._part(streams[mine.start : mine.stop], positions, open_windows)
                except (RunError, UserError) as error:
                    yield Part(torch.empty(0), torch.empty(0), [], [], str(error))
                    return

    def _part(
        self, streams: range, positions: tuple[int, int], open_windows: dict[int, _OpenWindow]
    ) -> Part:
        count, side = len(streams) * self.per_stream, self.data.image_size
        images = np.empty((count, 3, side, side), np.uint8)
        labels = np.empty(count, np.int64)
        keys: list[str] = []
        faults: list[Fault] = []
        self.reader.begin(streams, positions[0])
        for stream in streams:
            for draw in self.order.draws(stream, *positions):
                window = open_windows.get(stream)
                if window is None or window.window != draw.window:
                    open_windows.pop(stream, None)  # first let go of the old bytes
                    fetched = self.reader.take(draw.window)
                    faults += [Fault(*shard) for shard in fetched.bad_shards.items()]
                    window = _OpenWindow(
                        self.index, self.order, draw.window, self.data, fetched.samples
                    )
                    open_windows[stream] = window
                for place in range(draw.start, draw.stop):
                    sample, found = window.read(place)
                    faults += found
                    images[len(keys)] = self._augmented(sample, window, place)
                    labels[len(keys)] = sample.label
                    keys.append(sample.key)
            self.reader.look_ahead(stream, *positions)
        return Part(torch.from_numpy(images), torch.from_numpy(labels), keys, faults)

    def _augmented(self, sample: Example, window: _OpenWindow, place: int) -> Pixels:
        """uint8 `[3, side, side]`, or `[side, side]` for each of the three."""
        image = sample.image
        if self.augmenting:
            draws = self.noise.draws(window.window.epoch, window.number(place))
            image = augment(image, self.data.augment, draws)
        return _channels_first(image)


class _OpenWindow:
    """A window whose bytes are in memory."""

    def __init__(
        self,
        index: ShardIndex,
        order: Order,
        window: Window,
        data: DataConfig,
        raw: list[memoryview],
    ) -> None:
        self.window = window
        self._index, self._data = index, data
        self._permuted = order.shuffled(window)
        self._raw = raw
        self._where: list[tuple[int, int]] = []  # shard, and number of the sample in it
        for piece in order.pieces(window):
            self._where += [(piece.shard, i) for i in range(piece.start, piece.stop)]

    def number(self, place: int) -> int:
        """The number, through the whole index, of the sample that belongs at a place."""
        shard, inside = self._where[self._permuted[place]]
        return int(self._index.starts[shard]) + inside

    def read(self, place: int) -> tuple[Example, list[Fault]]:
        """The sample at a place, or its substitute and the fault of the one that belongs there.

        Raises:
            RunError: no sample of the window can be used.
        """
        faults: list[Fault] = []
        for turn in range(self.window.size):
            at = int(self._permuted[(place + turn) % self.window.size])
            try:
                return self._example(at), faults[:1]
            except Damaged as error:
                faults.append(Fault(self._name(at), str(error)))
        raise RunError(
            f"no sample of {self.window.size} in a row can be used; the first: {faults[0].place}: "
            f"{faults[0].reason}"
        )

    def _example(self, at: int) -> Example:
        shard, inside = self._where[at]
        return _example(self._index, shard, inside, self._raw[at], self._data.image_size)

    def _name(self, at: int) -> str:
        shard, inside = self._where[at]
        return f"sample {inside} of {self._index.url(shard)}"


def read_in_order(
    index: ShardIndex, start: int, stop: int, image_size: int
) -> tuple[Tensor, Tensor, list[str]]:
    """The samples `[start, stop)` of a data set in the order of its index, not augmented.

    Returns:
        images uint8 `[n, 3, image_size, image_size]`, labels int64 `[n]`, keys.

    Raises:
        RunError: one of them cannot be used; an evaluation leaves nothing out.
    """
    images = np.empty((stop - start, 3, image_size, image_size), np.uint8)
    labels = np.empty(stop - start, np.int64)
    keys: list[str] = []
    for piece in pieces_in_order(index, start, stop):
        for inside, raw in enumerate(read_piece(index, piece), piece.start):
            try:
                sample = _example(index, piece.shard, inside, raw, image_size)
            except Damaged as error:
                raise RunError(f"sample {inside} of {index.url(piece.shard)}: {error}") from error
            images[len(keys)] = _channels_first(sample.image)
            labels[len(keys)] = sample.label
            keys.append(sample.key)
    return torch.from_numpy(images), torch.from_numpy(labels), keys


def pieces_in_order(index: ShardIndex, start: int, stop: int) -> Iterator[Piece]:
    """Where the samples `[start, stop)` of a data set lie."""
    shard = int(np.searchsorted(index.starts, start, side="right")) - 1
    while start < stop:
        begin, end = (int(bound) for bound in index.starts[shard : shard + 2])
        if start < end:  # a shard may be empty
            yield Piece(shard, start - begin, min(stop, end) - begin)
        start, shard = max(start, end), shard + 1


def _example(index: ShardIndex, shard: int, inside: int, raw: memoryview, side: int) -> Example:
    offsets, labels = index.shards[shard].offsets, index.shards[shard].labels
    length = int(offsets[inside + 1] - offsets[inside])
    told = index.told(shard, inside)
    sample = example(raw, length, side, index.num_classes, told)
    # What a tar says of itself has no checksum.
    if told is None and labels is not None and sample.label != labels[inside]:
        raise Damaged(f"{sample.key}.cls: label {sample.label}, the index says {labels[inside]}")
    return sample


def _channels_first(image: Pixels) -> Pixels:
    """`[3, H, W]`; a grey image stays `[H, W]` and is broadcast where it is assigned."""
    return image.transpose(2, 0, 1) if image.ndim == 3 else image


def _join(number: int, parts: Iterable[Part]) -> MicroBatch:
    parts = list(parts)
    if len(parts) == 1:
        return MicroBatch(number, parts[0].images, parts[0].labels, parts[0].keys)
    return MicroBatch(
        number,
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        [key for part in parts for key in part.keys],
    )


def _as_is(part: Any) -> Any:
    """The collate function: a part is complete."""
    return part
