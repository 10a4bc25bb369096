"""What runs in a loader process: windows of samples are read, decoded and augmented here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mhe_dist.config.data import AugmentConfig, DataConfig
from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import share
from mhe_dist.errors import RunError, UserError
from pipelines.data.augment import Noise, augment
from pipelines.data.decode import Pixels
from pipelines.data.order import Ints, Order, Window
from pipelines.data.sample import Damaged, Example, _example
from pipelines.loader.prefetch import WindowReader
from pipelines.loader.shared_buffers import Slots
from pipelines.loader.worker_status import DECODING, READING, WAITING, Notes
from pipelines.shards.index import Fault, ShardIndex


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
