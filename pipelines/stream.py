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

import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from pipelines.bad_samples import Faults
from pipelines.decode import Pixels
from pipelines.fetch import Damaged, Example, example, read_piece
from pipelines.notes import DECODING, READING, WAITING, Notes, last_words
from pipelines.order import Ints, Order, Piece, Window
from pipelines.shards import Fault, ShardIndex
from pipelines.slots import Slots
from pipelines.view import View
from pipelines.windows import WindowReader


class Part(NamedTuple):
    """What one loader process makes of a micro-batch, or the failure that ends its work.

    Attributes:
        process, turn: where its images are, see `Slots.of`.
        labels: int64; not a tensor, which would cost a piece of shared memory of its own.
    """

    process: int
    turn: int
    labels: Ints
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
            index: the data set, or a view.
            config: of the run; `data`, `train` and `run.seed` matter here.
            micro_batches: which of a step's canonical micro-batches this rank computes.
            start_step: where to begin; nothing before it is read, except the rest of its windows.
            stop_step: where to end.

        Raises:
            UserError: fewer samples than streams.
        """
        self._index = index
        data = config.data
        sizes = [shard.samples for shard in index.shards]
        choice = index if isinstance(index, View) else None
        self.order = Order(sizes, data.streams, data.shuffle_window, config.run.seed, choice)
        self.faults = Faults()
        self._data = data
        self._micro_batches = micro_batches
        self._steps = range(start_step, stop_step)
        per_batch = data.streams // config.train.micro_batches
        streams = range(micro_batches.start * per_batch, micro_batches.stop * per_batch)
        self._epoch = sum(self.order.length(stream) for stream in streams)
        self._processes = max(1, min(data.loader_workers, per_batch))
        self._notes = Notes(self._processes)
        per_part = -(-per_batch // self._processes) * (config.train.global_batch // data.streams)
        self._slots = Slots(self._processes, data.prefetch, per_part, data.image_size)
        self._source = _Source(
            index,
            self.order,
            config,
            [range(i * per_batch, (i + 1) * per_batch) for i in micro_batches],
            self._steps,
            self._notes,
            self._slots,
        )

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps.

        Raises:
            RunError: a shard or too many samples cannot be read, or a loader process died.
        """
        parts = iter(self._dataloader())
        self._notes.watch()
        for step in self._steps:
            begin = time.perf_counter()
            batches = []
            for number in self._micro_batches:
                taken = [self._accept(part) for part in self._take(parts)]
                batches.append(self._join(number, taken))
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
                part = next(parts)
            except RuntimeError as error:
                words = last_words(self._notes, self._index) or "the loader failed"
                raise RunError(f"{words} ({error})") from error
            yield part

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For the code that works while the loader's processes do: a death of theirs has its name.

        torch hears of it by a signal, and raises RuntimeError wherever the main thread is then.

        Raises:
            RunError: a loader process died; says on which sample.
        """
        try:
            yield
        except RuntimeError as error:
            if words := last_words(self._notes, self._index):
                raise RunError(f"{words} ({error})") from error
            raise

    def _accept(self, part: Part) -> Part:
        """Count a part's bad samples and hold the limit."""
        if part.failure:
            raise RunError(part.failure)
        self.faults.add(len(part.keys), part.faults)
        self.faults.check(self._data, self._epoch)
        return part

    def _join(self, number: int, parts: list[Part]) -> MicroBatch:
        count, side = sum(len(part.keys) for part in parts), self._data.image_size
        images = np.empty((count, side, side, 3), np.uint8)
        start = 0
        for part in parts:
            stop = start + len(part.keys)
            images[start:stop] = self._slots.of(part.process, part.turn)[: stop - start]
            start = stop
        return MicroBatch(
            number,
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(np.concatenate([part.labels for part in parts])),
            [key for part in parts for key in part.keys],
        )


class _Source(IterableDataset[Part]):
    """What runs in a loader process."""

    def __init__(
        self,
        index: ShardIndex,
        order: Order,
        config: Config,
        streams: list[range],
        steps: range,
        notes: Notes,
        slots: Slots,
    ) -> None:
        self.index, self.order, self.data = index, order, config.data
        self.streams, self.steps = streams, steps
        self.notes, self.slots = notes, slots
        self.process = self.turn = 0
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
        self.process, processes = (info.id, info.num_workers) if info else (0, 1)
        self.turn = 0
        self.notes.begin(self.process)
        open_windows: dict[int, _OpenWindow] = {}
        for step in self.steps:
            positions = step * self.per_stream, (step + 1) * self.per_stream
            for streams in self.streams:
                mine = share(len(streams), self.process, processes)
                try:
                    yield self._part(streams[mine.start : mine.stop], positions, open_windows)
                except (RunError, UserError) as error:
                    yield Part(0, 0, np.empty(0, np.int64), [], [], str(error))
                    return

    def _part(
        self, streams: range, positions: tuple[int, int], open_windows: dict[int, _OpenWindow]
    ) -> Part:
        images = self.slots.of(self.process, self.turn)
        labels = np.empty(len(streams) * self.per_stream, np.int64)
        keys: list[str] = []
        faults: list[Fault] = []
        self.reader.begin(streams, positions[0])
        for stream in streams:
            for draw in self.order.draws(stream, *positions):
                window = open_windows.get(stream)
                if window is None or window.window != draw.window:
                    open_windows.pop(stream, None)  # first let go of the old bytes
                    self._note(READING, self._first(draw.window))
                    fetched = self.reader.take(draw.window)
                    faults += [Fault(*shard) for shard in fetched.bad_shards.items()]
                    window = _OpenWindow(
                        self.index, self.order, draw.window, self.data, fetched.samples
                    )
                    open_windows[stream] = window
                for place in range(draw.start, draw.stop):
                    number = window.number(place)
                    self._note(DECODING, number)
                    row = images[len(keys)]
                    sample, found = window.read(place, row)
                    faults += found
                    self._finish(sample, draw.window.epoch, number, row)
                    labels[len(keys)] = sample.label
                    keys.append(sample.key)
            self.reader.look_ahead(stream, *positions)
        self._note(WAITING, number)
        self.turn += 1
        return Part(self.process, self.turn - 1, labels, keys, faults)

    def _note(self, doing: int, sample: int) -> None:
        self.notes.write(self.process, doing, sample)

    def _first(self, window: Window) -> int:
        piece = self.order.pieces(window)[0]
        return int(self.index.starts[piece.shard]) + piece.start

    def _finish(self, sample: Example, epoch: int, number: int, row: Pixels) -> None:
        """Put the augmented image into its row `[side, side, 3]`, where it may lie already."""
        image = sample.image
        if self.augmenting:
            image = augment(image, self.data.augment, self.noise.draws(epoch, number))
        elif np.may_share_memory(image, row):
            return
        row[:] = image if image.ndim == 3 else image[:, :, None]


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

    def read(self, place: int, into: Pixels) -> tuple[Example, list[Fault]]:
        """The sample at a place, or its substitute and the fault of the one that belongs there.

        Its image may lie in `into`, see `decode`.

        Raises:
            RunError: no sample of the window can be used.
        """
        faults: list[Fault] = []
        for turn in range(self.window.size):
            at = int(self._permuted[(place + turn) % self.window.size])
            try:
                return self._example(at, into), faults[:1]
            except Damaged as error:
                faults.append(Fault(self._name(at), str(error)))
        raise RunError(
            f"no sample of {self.window.size} in a row can be used; the first: {faults[0].place}: "
            f"{faults[0].reason}"
        )

    def _example(self, at: int, into: Pixels) -> Example:
        shard, inside = self._where[at]
        return _example(self._index, shard, inside, self._raw[at], self._data.image_size, into)

    def _name(self, at: int) -> str:
        shard, inside = self._where[at]
        return self._index.place(shard, inside)


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
                raise RunError(f"{index.place(piece.shard, inside)}: {error}") from error
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


def _example(
    index: ShardIndex,
    shard: int,
    inside: int,
    raw: memoryview,
    side: int,
    into: Pixels | None = None,
) -> Example:
    offsets, labels = index.shards[shard].offsets, index.shards[shard].labels
    length = int(offsets[inside + 1] - offsets[inside])
    told = index.told(shard, inside)
    sample = example(raw, length, side, index.num_classes, told, into)
    # What a tar says of itself has no checksum.
    if told is None and labels is not None and sample.label != labels[inside]:
        raise Damaged(f"{sample.key}.cls: label {sample.label}, the index says {labels[inside]}")
    return sample


def _channels_first(image: Pixels) -> Pixels:
    """`[3, H, W]`; a grey image stays `[H, W]` and is broadcast where it is assigned."""
    return image.transpose(2, 0, 1) if image.ndim == 3 else image


def _as_is(part: Any) -> Any:
    """The collate function: a part is complete."""
    return part
