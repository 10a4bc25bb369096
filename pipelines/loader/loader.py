"""The training images, step by step, in the order of `data/order.py`.

A rank's loader computes some micro-batches of every step. Its loader processes share the streams
of each micro-batch: process k of K reads the k-th part of them, and the rank joins the partial
batches in the order of the streams. So neither the number of ranks nor that of loader processes
changes the result. A process holds one window of each of its streams as undecoded bytes and
decodes each sample when it is needed.

A sample that cannot be used is counted and named. It is replaced by the sample that follows it in
the permuted window (the first one follows the last), or by the next one that can be used. The
augmentation draws stay those of the replaced sample, so the substitute does not come twice as the
same pixels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mhe_dist.config.data import DataConfig
from mhe_dist.errors import RunError
from mhe_dist.train.batch import MicroBatch, StepBatch
from pipelines.data.bad_samples import BadSampleTally
from pipelines.data.mixture.index import Mixture
from pipelines.data.order import SampleOrder
from pipelines.data.step_labels import StepLabels
from pipelines.loader.shared_buffers import SharedBuffers
from pipelines.loader.shield import interrupt_held_back, shield, sigterm_held_back
from pipelines.loader.worker import PartialBatch, WorkerDataset
from pipelines.loader.worker_status import WorkerStatusTable, describe_dead_worker
from pipelines.shards.index import ShardIndex


class Loader:
    """Iterates over the steps `[start_step, stop_step)` of one rank.

    Attributes:
        order: the order of the samples.
        faults: the bad samples met so far.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: DataConfig,
        *,
        global_batch: int,
        micro_batches: int,
        stop_step: int,
        start_step: int = 0,
        local_micro_batches: range | None = None,
        seed: int = 0,
    ) -> None:
        """Prepare; reading begins with the iteration.

        Args:
            index: the data set, or a mixture.
            data: how to order, read, decode and augment; its `shards` is not used.
            global_batch: samples per step of all ranks together, a multiple of `data.streams`.
            micro_batches: how many a step has, on all ranks together; divides `data.streams`.
            stop_step: the first step that is not made.
            start_step: where to begin; nothing before it is read, except the rest of its windows.
            local_micro_batches: which of a step's micro-batches this rank computes; None: all.
            seed: of the order and the augmentation.

        Raises:
            UserError: fewer samples than streams.
        """
        self._index, self._data = index, data
        self._local = range(micro_batches) if local_micro_batches is None else local_micro_batches
        self._steps = range(start_step, stop_step)
        subset = index if isinstance(index, Mixture) else None
        order = partial(SampleOrder, index.sizes, data.streams, data.shuffle_window, seed, subset)
        self.order = order()
        self.faults = BadSampleTally()
        # Alone, a rank has all labels of a step in its hands. Others look them up in a thread,
        # which shares no order with what reads the samples.
        apart = len(self._local) < micro_batches and index.has_label_columns
        self._step_labels = StepLabels(index, order(), global_batch) if apart else None
        self._micro_batches = micro_batches
        streams_each = data.streams // micro_batches
        streams = [range(i * streams_each, (i + 1) * streams_each) for i in self._local]
        self._epoch_samples = sum(
            self.order.stream_length(stream) for part in streams for stream in part
        )
        self._processes = max(1, min(data.loader_workers, streams_each))
        self._statuses = WorkerStatusTable(self._processes)
        samples_per_stream = global_batch // data.streams
        most_images = -(-streams_each // self._processes) * samples_per_stream
        self._buffers = SharedBuffers(self._processes, data.prefetch, most_images, data.image_size)
        self._dataset = WorkerDataset(
            index,
            self.order,
            data,
            seed,
            samples_per_stream,
            streams,
            self._steps,
            self._statuses,
            self._buffers,
        )

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps.

        Raises:
            RunError: a shard or too many samples cannot be read, or a loader process died.
        """
        with interrupt_held_back(), sigterm_held_back():
            partial_batches = iter(self._dataloader())
        self._statuses.remember_children()
        for step, labels in zip(self._steps, self._labels(), strict=True):
            begin = time.perf_counter()
            batches = []
            for number in self._local:
                parts = [self._accept(part) for part in self._receive(partial_batches)]
                batches.append(self._join(number, parts))
            yield StepBatch(step, batches, time.perf_counter() - begin, labels)

    def _labels(self) -> Iterator[torch.Tensor | None]:
        """For each step the labels of all its micro-batches `[n, B, ...]`, if they are known."""
        if self._step_labels is None:
            yield from (None for _ in self._steps)
            return
        for labels in self._step_labels.steps(self._steps):
            yield torch.from_numpy(labels).unflatten(0, (self._micro_batches, -1))

    def _dataloader(self) -> DataLoader[PartialBatch]:
        workers = self._processes if self._data.loader_workers else 0
        return DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=partial(shield, os.getpid()),
            prefetch_factor=self._data.prefetch if workers else None,
            # A generator of its own: the default one would take a draw from torch's global state.
            generator=torch.Generator(),
        )

    def _receive(self, partial_batches: Iterator[PartialBatch]) -> Iterator[PartialBatch]:
        """One partial batch from each loader process; torch asks them one after the other."""
        for _ in range(self._processes):
            try:
                part = next(partial_batches)
            except RuntimeError as error:
                cause = describe_dead_worker(self._statuses, self._index) or "the loader failed"
                raise RunError(f"{cause} ({error})") from error
            yield part

    @contextmanager
    def reporting_dead_workers(self) -> Iterator[None]:
        """For code that runs while the loader's processes work: names the one that died.

        torch learns of a death by a signal, and raises RuntimeError wherever the main thread is.

        Raises:
            RunError: a loader process died; says on which sample.
        """
        try:
            yield
        except RuntimeError as error:
            if cause := describe_dead_worker(self._statuses, self._index):
                raise RunError(f"{cause} ({error})") from error
            raise

    def _accept(self, part: PartialBatch) -> PartialBatch:
        """Count the bad samples of a partial batch and enforce their limit."""
        if part.failure:
            raise part.failure
        self.faults.add(len(part.keys), part.faults)
        self.faults.check(self._data, self._epoch_samples)
        return part

    def _join(self, number: int, parts: list[PartialBatch]) -> MicroBatch:
        count, side = sum(len(part.keys) for part in parts), self._data.image_size
        images = np.empty((count, side, side, 3), np.uint8)
        start = 0
        for part in parts:
            stop = start + len(part.keys)
            buffer = self._buffers.images(part.process, part.batch_number)
            images[start:stop] = buffer[: stop - start]
            start = stop
        return MicroBatch(
            number,
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(np.concatenate([part.labels for part in parts])),
            [key for part in parts for key in part.keys],
        )


def _unchanged(part: Any) -> Any:
    """The collate function: a partial batch is complete."""
    return part
