"""The labels of whole steps, looked up in columns: every rank knows them without the others."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from pipelines.data.order import Ints, SampleOrder, ShardSpan
from pipelines.shards.index import ShardIndex

_NOTHING: Final = np.empty(0, np.int64)


class _OpenLabels(NamedTuple):
    """The labels `[size, ...]` of a stream's window, as shown, and the first one's position."""

    start: int
    labels: Ints


class StepLabels:
    """Labels of the samples that the order shows, step by step.

    It keeps the labels of one window of every stream, 8 bytes for each. Where samples have up to K
    labels, `index.label_shape` is `(K,)`, and arrays of labels have that as their last dimension.
    """

    def __init__(self, index: ShardIndex, order: SampleOrder, global_batch: int) -> None:
        """Prepare.

        Args:
            index: the data set; its labels are in columns (`has_label_columns`).
            order: of its samples.
            global_batch: samples per step, a multiple of the streams.
        """
        self._index, self._order = index, order
        self._per_stream = global_batch // order.streams
        self._open = [_OpenLabels(0, _NOTHING)] * order.streams

    def steps(self, steps: range) -> Iterator[Ints]:
        """The labels of each of these steps, those of the next one made in a thread.

        Yields:
            int64 `[global_batch, ...]`, in the order of `SampleOrder.batch`. A sample that cannot
            be used still has its label here.
        """
        with ThreadPoolExecutor(1, "step-labels") as pool:
            following = [pool.submit(self.of, step) for step in steps[:1]]
            for step in steps:
                labels = following.pop().result()
                if step + 1 < steps.stop:
                    following.append(pool.submit(self.of, step + 1))
                yield labels

    def of(self, step: int) -> Ints:
        """The labels of a step, int64 `[global_batch, ...]`; cheap if steps follow one another."""
        each = self._per_stream
        shape = self._index.label_shape
        labels = np.empty((self._order.streams, each, *shape), np.int64)
        first = step * each
        for stream, kept in enumerate(self._open):
            begin = first - kept.start
            if 0 <= begin <= len(kept.labels) - each:
                labels[stream] = kept.labels[begin : begin + each]
            else:
                labels[stream] = self._read(stream, first)
        return labels.reshape(-1, *shape)

    def _read(self, stream: int, first: int) -> Ints:
        """The labels of a stream's next positions, which begin or end in another window."""
        parts: list[Ints] = []
        for window_slice in self._order.window_slices(stream, first, first + self._per_stream):
            window, start, stop = window_slice
            position = first + sum(map(len, parts)) - start  # of the window's first sample
            kept = self._open[stream]
            if kept.start != position or len(kept.labels) != window.size:
                numbers = self._numbers(self._order.spans(window))
                shown = numbers[self._order.permutation(window)]
                found = self._index.labels_in_epoch(shown, window.epoch)
                assert found is not None, "the caller has asked `has_label_columns`"
                self._open[stream] = kept = _OpenLabels(position, found)
            parts.append(kept.labels[start:stop])
        return np.concatenate(parts)

    def _numbers(self, spans: list[ShardSpan]) -> Ints:
        """The numbers, through the whole index, of the samples of spans."""
        table = np.array(spans, np.int64).reshape(-1, 3)
        sizes = table[:, 2] - table[:, 1]
        firsts = self._index.starts[table[:, 0]] + table[:, 1]
        ends = np.cumsum(sizes)
        return np.repeat(firsts - (ends - sizes), sizes) + np.arange(ends[-1])
