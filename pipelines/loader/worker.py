"""The work of one loader process: it reads windows of its streams, decodes and augments samples.

It knows the order of the samples and which streams are its own, but not the rank's micro-batches
as a whole: `loader.py` joins what the processes make.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mhe_dist.config.data import AugmentConfig, DataConfig
from mhe_dist.distributed.topology import share
from mhe_dist.errors import RunError, UserError
from pipelines.data.augment import AugmentationNoise, augment
from pipelines.data.decode import Pixels
from pipelines.data.order import Ints, SampleOrder, Window
from pipelines.data.sample import BadSampleError, DecodedSample, load_sample
from pipelines.loader.prefetch import WindowReader
from pipelines.loader.shared_buffers import SharedBuffers
from pipelines.loader.worker_status import DECODING, READING, WAITING, WorkerStatusTable
from pipelines.shards.index import Fault, ShardIndex


class PartialBatch(NamedTuple):
    """One loader process's share of a micro-batch, or the failure that ends its work.

    Attributes:
        process, batch_number: where its images are, see `SharedBuffers.images`.
        labels: int64 `[n, *label_shape]` (see `ShardIndex.label_shape`); not a tensor, which would
            cost shared memory of its own.
        keys: of the samples.
        faults: bad samples that had to be replaced, and bad shards.
        failure: the error that ends the process's work, if there is one.
    """

    process: int
    batch_number: int
    labels: Ints
    keys: list[str]
    faults: list[Fault]
    failure: RunError | UserError | None = None


class WorkerDataset(IterableDataset[PartialBatch]):
    """What torch's `DataLoader` iterates over in each loader process."""

    def __init__(
        self,
        index: ShardIndex,
        order: SampleOrder,
        data: DataConfig,
        seed: int,
        samples_per_stream: int,
        streams: list[range],
        steps: range,
        statuses: WorkerStatusTable,
        buffers: SharedBuffers,
    ) -> None:
        """Prepare; the object is then copied into each loader process.

        Args:
            index: the data set.
            order: of its samples.
            data: how to read, decode and augment.
            seed: of the run; keys the augmentation.
            samples_per_stream: how many samples of each stream a step takes.
            streams: those of each micro-batch of this rank, for all loader processes together.
            steps: the steps to make.
            statuses: where the process records what it does.
            buffers: where the images go.
        """
        self.index, self.order, self.data = index, order, data
        self.streams, self.steps = streams, steps
        self.statuses, self.buffers = statuses, buffers
        self.process = self.batch_number = 0
        self.samples_per_stream = samples_per_stream
        self.noise = AugmentationNoise(seed)
        self.augmenting = data.augment != AugmentConfig()

    def __iter__(self) -> Iterator[PartialBatch]:
        """Yield this process's share of each micro-batch of each step."""
        per_step = self.samples_per_stream
        positions = range(self.steps.start * per_step, self.steps.stop * per_step)
        with WindowReader(self.index, self.order, self.data.remote, positions) as self.reader:
            yield from self._partial_batches()

    def _partial_batches(self) -> Iterator[PartialBatch]:
        info = get_worker_info()
        self.process, processes = (info.id, info.num_workers) if info else (0, 1)
        self.batch_number = 0
        self.statuses.register(self.process)
        open_windows: dict[int, OpenWindow] = {}
        for step in self.steps:
            positions = step * self.samples_per_stream, (step + 1) * self.samples_per_stream
            for streams in self.streams:
                own = share(len(streams), self.process, processes)
                try:
                    yield self._make(streams[own.start : own.stop], positions, open_windows)
                except (RunError, UserError) as error:
                    yield PartialBatch(0, 0, np.empty(0, np.int64), [], [], error)
                    return

    def _make(
        self, streams: range, positions: tuple[int, int], open_windows: dict[int, OpenWindow]
    ) -> PartialBatch:
        images = self.buffers.images(self.process, self.batch_number)
        count = len(streams) * self.samples_per_stream
        labels = np.empty((count, *self.index.label_shape), np.int64)
        keys: list[str] = []
        faults: list[Fault] = []
        self.reader.prefetch(streams, positions[0])
        for stream in streams:
            for window_slice in self.order.window_slices(stream, *positions):
                window = open_windows.get(stream)
                if window is None or window.window != window_slice.window:
                    open_windows.pop(stream, None)  # first let go of the old bytes
                    window = self._open(window_slice.window, faults)
                    open_windows[stream] = window
                for slot in range(window_slice.start, window_slice.stop):
                    number = window.number(slot)
                    self._record(DECODING, number)
                    row = images[len(keys)]
                    sample, shown, found = window.read(slot, row)
                    faults += found
                    self._finish(sample, window_slice.window.epoch, number, row)
                    labels[len(keys)] = shown
                    keys.append(sample.key)
            self.reader.prefetch_next(stream, *positions)
        self._record(WAITING, number)
        self.batch_number += 1
        return PartialBatch(self.process, self.batch_number - 1, labels, keys, faults)

    def _open(self, window: Window, faults: list[Fault]) -> OpenWindow:
        """Read a window; bad shards are added to the faults."""
        self._record(READING, self._first(window))
        fetched = self.reader.read(window)
        faults += [Fault(*shard) for shard in fetched.bad_shards.items()]
        return OpenWindow(self.index, self.order, window, self.data, fetched.samples)

    def _record(self, activity: int, sample: int) -> None:
        self.statuses.update(self.process, activity, sample)

    def _first(self, window: Window) -> int:
        span = self.order.spans(window)[0]
        return int(self.index.starts[span.shard]) + span.start

    def _finish(self, sample: DecodedSample, epoch: int, number: int, row: Pixels) -> None:
        """Put the augmented image into its row `[side, side, 3]`, where it may lie already."""
        image = sample.image
        if self.augmenting:
            image = augment(image, self.data.augment, self.noise.draws(epoch, number))
        elif np.may_share_memory(image, row):
            return
        row[:] = image if image.ndim == 3 else image[:, :, None]


class OpenWindow:
    """A window whose bytes are in memory."""

    def __init__(
        self,
        index: ShardIndex,
        order: SampleOrder,
        window: Window,
        data: DataConfig,
        raw: list[memoryview],
    ) -> None:
        """Take the bytes of the window's samples, in reading order."""
        self.window = window
        self._index, self._data = index, data
        self._permuted = order.permutation(window)
        self._raw = raw
        self._locations: list[tuple[int, int]] = []  # shard, and number of the sample in it
        for span in order.spans(window):
            self._locations += [(span.shard, i) for i in range(span.start, span.stop)]
        self._drawn_labels = self._draw_labels() if index.draws_labels else None

    def _draw_labels(self) -> Ints:
        """The labels of all samples in reading order, `[size, *label_shape]`."""
        shards, positions = np.array(self._locations, np.int64).T
        labels = self._index.labels_in_epoch(
            self._index.starts[shards] + positions, self.window.epoch
        )
        assert labels is not None, "a mixture has required them"
        return labels

    def number(self, slot: int) -> int:
        """The number, through the whole index, of the sample that belongs at a slot."""
        shard, position = self._locations[self._permuted[slot]]
        return int(self._index.starts[shard]) + position

    def read(self, slot: int, into: Pixels) -> tuple[DecodedSample, int | Ints, list[Fault]]:
        """The sample at a slot with its labels, or a substitute and the fault of the one there.

        Its image may lie in `into`, see `decode`.

        Raises:
            RunError: no sample of the window can be used.
        """
        faults: list[Fault] = []
        for attempt in range(self.window.size):
            at = int(self._permuted[(slot + attempt) % self.window.size])
            shard, position = self._locations[at]
            try:
                sample = load_sample(
                    self._index,
                    shard,
                    position,
                    self._raw[at],
                    self._data.image_size,
                    into,
                    self._data.max_pixels,
                )
                drawn = self._drawn_labels
                return sample, sample.label if drawn is None else drawn[at], faults[:1]
            except BadSampleError as error:
                faults.append(Fault(self._index.sample_name(shard, position), str(error)))
        raise RunError(
            f"no sample of {self.window.size} in a row can be used; the first: "
            f"{faults[0].location}: {faults[0].reason}"
        )
