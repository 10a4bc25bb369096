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
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError
from mhe_dist.train.batch import MicroBatch, StepBatch
from pipelines.data.bad_samples import Faults
from pipelines.data.mixture import View
from pipelines.data.order import Order
from pipelines.loader.shared_buffers import Slots
from pipelines.loader.worker import Part, _Source
from pipelines.loader.worker_status import Notes, last_words
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


def _as_is(part: Any) -> Any:
    """The collate function: a part is complete."""
    return part
