"""Rows in host memory, or in a file, that are used on a GPU: neither side waits for the other.

What is read travels through pinned memory. What is written is copied to pinned memory by the
device, and a thread stores it once it is there. Until then the device's own rows answer: a reader
takes what the host has and lays the rows over it that were written meanwhile. So rows can be
fetched ahead whatever the step before is still going to write, and only the outdated ones are
replaced.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist.distributed.transfer import to_device

# Positions of units in a partition, as NumPy and torch index.
Local = slice | npt.NDArray[np.int64]
WRITTEN_BYTES: Final = 1 << 29  # of written rows that stay on the device, of one field


@dataclass
class _Write:
    """Rows `[U, L, columns]` on the device that the host is going to have.

    Attributes:
        number: of the write.
        units: ascending.
        order: where each of them is in `rows`.
        stored: done when the host has them.
    """

    number: int
    units: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    rows: Tensor
    stored: Future[None]


@dataclass
class _Copies:
    """Rows of ascending units that were fetched ahead, when all writes before `first` were stored.

    They are waited for by the device alone, on the stream that copied them.
    """

    units: npt.NDArray[np.int64]
    first: int
    rows: Future[Tensor]


@dataclass
class RemoteTraffic:
    """What was read since the last `Bank.take_traffic`.

    Attributes:
        units: that were read.
        ahead: of these, that had been fetched ahead.
        wait_s: seconds that the host waited until written rows were stored.
    """

    units: int = 0
    ahead: int = 0
    wait_s: float = 0.0


@dataclass
class RemoteRows:
    """See the module.

    Attributes:
        rows: `[units, L, columns]` on the host; use them directly after `wait_until_stored` only.
        device: where rows are used.
        is_pinned: whether the device may read `rows` where they lie.
        traffic: what was read.
    """

    rows: Tensor
    device: torch.device
    is_pinned: bool = False
    traffic: RemoteTraffic = field(default_factory=RemoteTraffic)
    _writes: list[_Write] = field(default_factory=list)
    _count: int = 0
    _current: _Copies | None = None
    _next: _Copies | None = None

    def __post_init__(self) -> None:
        self._on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._on_gpu else None
        self._reader, self._writer = self._thread("row reader"), self._thread("row writer")

    def _thread(self, name: str) -> ThreadPoolExecutor:
        """A thread that works on this rank's GPU.

        It would begin on the first one, and go back there after each copy: so every rank of a node
        would take memory for a context there.
        """
        if not self._on_gpu:
            return ThreadPoolExecutor(1, name)
        return ThreadPoolExecutor(1, name, torch.cuda.set_device, (self.device,))

    def get(self, local: Local) -> Tensor:
        """Rows `[U, L, columns]` on the device, a new tensor."""
        units = _numbers(local)
        self.traffic.units += len(units)
        writes = self._pending()
        rows = None if isinstance(local, slice) else self._take_fetched(units)
        if rows is None:
            rows = self._read(local)
            for write in writes:
                self._lay_over(rows, units, write)
        return rows

    def put(self, local: Local, rows: Tensor) -> None:
        """Store rows of the device, which must not be changed afterwards; returns at once."""
        self._forget_stored()
        while self._writes and self._written_bytes + rows.nbytes > WRITTEN_BYTES:
            self._drop_oldest()
        rows = rows.to(self.rows.dtype)
        copy, event = self._copy_to_host(rows)
        stored = self._writer.submit(self._store, local, copy, event)
        units = _numbers(local)
        order = np.argsort(units)
        self._writes.append(_Write(self._count, units[order], order, rows, stored))
        self._count += 1

    def prefetch(self, units: npt.NDArray[np.int64]) -> None:
        """Begin to fetch distinct units that the next step will read; returns at once."""
        self._forget_stored()
        units, first = np.sort(units), self._first_pending()
        self._next = _Copies(units, first, self._reader.submit(self._fetch, units))

    def end_step(self) -> None:
        """Forget what was fetched for the step that ends."""
        self._current, self._next = self._next, None
        self._forget_stored()

    def wait_until_stored(self) -> None:
        """Wait until all that was written is stored; nothing that was fetched ahead is kept."""
        self._current = self._next = None
        while self._writes:
            self._drop_oldest()

    # -- reading -------------------------------------------------------------------------------

    def _take_fetched(self, units: npt.NDArray[np.int64]) -> Tensor | None:
        """Rows that were fetched for this step or the next one; None if hardly any was."""
        for copies in (self._current, self._next):
            if copies is not None and (rows := self._take(copies, units)) is not None:
                return rows
        return None

    def _take(self, copies: _Copies, units: npt.NDArray[np.int64]) -> Tensor | None:
        """Rows that were fetched ahead, those that are missing or outdated replaced.

        None if hardly any of the units was fetched.
        """
        if not len(copies.units):
            return None
        index = np.searchsorted(copies.units, units).clip(max=len(copies.units) - 1)
        missing = np.flatnonzero(copies.units[index] != units)
        if 2 * len(missing) > len(units):
            return None
        fetched = copies.rows.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            fetched.record_stream(current)
        self.traffic.ahead += len(units) - len(missing)
        rows = fetched.index_select(0, to_device(torch.from_numpy(index), self.device))
        if len(missing):
            where = to_device(torch.from_numpy(missing), self.device)
            rows.index_copy_(0, where, self._read(units[missing]))
        for write in self._writes:
            if write.number >= copies.first:
                self._lay_over(rows, units, write)
        return rows

    def _read(self, local: Local) -> Tensor:
        """What the host has, on the device."""
        if isinstance(local, slice) and self.is_pinned:
            return self.rows[local].to(self.device, non_blocking=True)
        copy = self._gather(local)
        return copy.to(self.device, non_blocking=True) if self._on_gpu else copy

    def _gather(self, local: Local) -> Tensor:
        """What the host has, in memory that the device reads without a wait."""
        if isinstance(local, slice):
            rows = self.rows[local]
            return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=self._on_gpu).copy_(rows)
        shape = (len(local), *self.rows.shape[1:])
        copy = torch.empty(shape, dtype=self.rows.dtype, pin_memory=self._on_gpu)
        return torch.index_select(self.rows, 0, torch.from_numpy(local), out=copy)

    def _fetch(self, units: npt.NDArray[np.int64]) -> Tensor:
        """On the reader's thread."""
        copy = self._gather(units)
        if self._stream is None:
            return copy
        with torch.cuda.stream(self._stream):
            return copy.to(self.device, non_blocking=True)

    def _lay_over(self, rows: Tensor, units: npt.NDArray[np.int64], write: _Write) -> None:
        """Replace those of the rows of `units` that were written."""
        if not len(write.units):
            return
        index = np.searchsorted(write.units, units).clip(max=len(write.units) - 1)
        here = np.flatnonzero(write.units[index] == units)
        if len(here):
            there = torch.from_numpy(write.order[index[here]])
            written = write.rows.index_select(0, to_device(there, self.device))
            rows.index_copy_(0, to_device(torch.from_numpy(here), self.device), written)

    # -- writing -------------------------------------------------------------------------------

    def _copy_to_host(self, rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy that is complete after the event, in pinned memory."""
        copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=self._on_gpu)
        if self._stream is None:
            return copy.copy_(rows), None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            copy.copy_(rows, non_blocking=True)
            rows.record_stream(self._stream)
            event = torch.cuda.Event()
            event.record(self._stream)
        return copy, event

    def _store(self, local: Local, copy: Tensor, event: torch.cuda.Event | None) -> None:
        """On the writer's thread."""
        if event is not None:
            event.synchronize()
        if isinstance(local, slice):
            self.rows[local].copy_(copy)
        else:
            self.rows.index_copy_(0, torch.from_numpy(local), copy)

    @property
    def _written_bytes(self) -> int:
        return sum(write.rows.nbytes for write in self._writes)

    def _pending(self) -> list[_Write]:
        """Writes that the host may not have; a snapshot, taken before the host's rows are read."""
        return [write for write in self._writes if not write.stored.done()]

    def _first_pending(self) -> int:
        """Number of the first write that the host may not have."""
        return next((write.number for write in self._pending()), self._count)

    def _forget_stored(self) -> None:
        """Let go of the rows that nobody needs on the device any more."""
        fetched = [copies.first for copies in (self._current, self._next) if copies is not None]
        needed, kept = min(fetched, default=self._count), []
        for write in self._writes:
            if write.stored.done():
                write.stored.result()  # raises what went wrong on the thread
            if write.number >= needed or not write.stored.done():
                kept.append(write)
        self._writes = kept

    def _drop_oldest(self) -> None:
        """Wait until the oldest write is stored; copies that need its rows are given up."""
        write = self._writes.pop(0)
        begin = time.perf_counter()
        write.stored.result()
        self.traffic.wait_s += time.perf_counter() - begin
        if self._current is not None and self._current.first <= write.number:
            self._current = None
        if self._next is not None and self._next.first <= write.number:
            self._next = None


def _numbers(local: Local) -> npt.NDArray[np.int64]:
    return np.arange(local.start, local.stop) if isinstance(local, slice) else local
