"""Where one field of a bank lies: in the device's memory, in the host's, or in a sparse file.

Where the system allows it, memory is allocated page by page, as units are touched. `prefetch` names
the units that the next step will need: while the backbone computes, the pages of a file are read
from the disk, and rows in host memory are copied to the device.
"""

from __future__ import annotations

import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist.distributed.transfer import to_device

Memory = Literal["device", "host", "file"]
# Positions of units in a partition, as NumPy and torch index.
Local = slice | npt.NDArray[np.int64]
Shape = tuple[int, int, int]

# When more bytes of a file are in use, its pages are handed back to the system's cache. They stay
# there while there is room. Otherwise all pages ever touched would count as the process's memory.
RESIDENT_BYTES: Final = 1 << 30


class RowStore:
    """Rows `[units, L, columns]`, zero at first.

    Attributes:
        rows: all of them, in the memory that stores them.

    Args:
        shape, dtype: of the rows.
        memory: `device` where they are used, `host` in RAM (pinned for a GPU), `file` in `path`.
        device: where they are used.
        path: of the file, which is overwritten; for `file` alone.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        memory: Memory,
        device: torch.device,
        path: Path | None,
    ) -> None:
        self._map: mmap.mmap | None = None
        self._prefetcher: RowPrefetcher | None = None
        self._used = 0
        if 0 in shape:
            self.rows = torch.zeros(shape, dtype=dtype, device=device)
        elif memory == "file":
            if path is None:
                raise ValueError("a bank in file memory needs a folder")
            self._map = _sparse_file(path, int(np.prod(shape)) * dtype.itemsize)
            self.rows = torch.frombuffer(self._map, dtype=dtype).view(shape)
        elif memory == "host" and device.type == "cuda":
            self.rows = torch.zeros(shape, dtype=dtype, pin_memory=True)
            self._prefetcher = RowPrefetcher(self.rows, device)
        elif memory == "host" or device.type == "cpu":
            pages = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
            self.rows = torch.from_numpy(pages).view(dtype).view(shape)
        else:
            self.rows = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return self.rows[0].numel() * self.rows.element_size()

    def get(self, local: Local) -> Tensor:
        """Rows `[U, L, columns]` in the stored type; a slice is not copied."""
        if isinstance(local, slice):
            self._count(self.rows[local])
            return self.rows[local]
        if self._prefetcher is not None and (ready := self._prefetcher.take(local)) is not None:
            return ready
        where = to_device(torch.from_numpy(local), self.rows.device)
        return self._count(self.rows.index_select(0, where))

    def put(self, local: Local, rows: Tensor) -> None:
        """Store rows; those that `get` gave of a slice are there already."""
        self._count(rows)
        if self._prefetcher is not None:
            self._prefetcher.mark_outdated(local)
        if not isinstance(local, slice):
            where = to_device(torch.from_numpy(local), self.rows.device)
            self.rows.index_copy_(0, where, rows.to(self.rows.device, self.rows.dtype))
        elif rows.data_ptr() != self.rows[local].data_ptr():
            self.rows[local].copy_(rows)

    def copy_units(self, local: npt.NDArray[np.int64], out: Tensor) -> None:
        """Copy the rows of some units to `out` `[U, L, columns]` on the host, in the stored type.

        Pages of a file do not stay in memory for it.
        """
        where = torch.from_numpy(local).to(self.rows.device)
        if self.rows.device.type == "cpu":
            torch.index_select(self.rows, 0, where, out=out)
        else:
            out.copy_(self.rows.index_select(0, where))
        self._drop_pages()

    @property
    def prefetches(self) -> bool:
        """Whether `prefetch` does anything."""
        return self._map is not None or self._prefetcher is not None

    def prefetch(self, local: npt.NDArray[np.int64]) -> None:
        """Begin to fetch distinct units that will be read soon; returns at once."""
        if self._prefetcher is not None:
            self._prefetcher.start(local)
        if self._map is None:
            return
        local = np.sort(local)
        cuts = np.flatnonzero(np.diff(local) > 1) + 1
        for first, last in pairwise([0, *cuts.tolist(), len(local)]):
            if last > first:
                start = int(local[first]) * self.unit_bytes // mmap.PAGESIZE * mmap.PAGESIZE
                stop = (int(local[last - 1]) + 1) * self.unit_bytes
                self._map.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def release(self) -> None:
        """Hand the pages of a file back to the system's cache if many are in use."""
        if self._used > RESIDENT_BYTES:
            self._drop_pages()

    def _drop_pages(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._used = 0

    def _count(self, rows: Tensor) -> Tensor:
        self._used += rows.numel() * self.rows.element_size()
        return rows


class RowPrefetcher:
    """Fetches rows before they are used.

    A thread gathers them, and on a GPU a stream of its own copies them, so that neither the host
    nor the device waits. Rows that are stored in the meantime are fetched once more.
    """

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "row prefetcher")
        self._units: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._outdated = np.empty(0, bool)
        self._copies: Future[Tensor] | None = None

    def start(self, local: npt.NDArray[np.int64]) -> None:
        """Fetch distinct units; replaces what was fetched before."""
        self._units = np.sort(local)
        self._outdated = np.zeros(len(local), bool)
        self._copies = self._thread.submit(self._fetch, torch.from_numpy(self._units))

    def mark_outdated(self, local: Local) -> None:
        """Do not give out the copies of these units: their rows changed."""
        if isinstance(local, slice):
            self._outdated |= (self._units >= local.start) & (self._units < local.stop)
        else:
            self._outdated |= np.isin(self._units, local)

    def take(self, local: npt.NDArray[np.int64]) -> Tensor | None:
        """Rows `[U, L, columns]` on the device, or None if one of them is not ready."""
        if self._copies is None or not len(self._units):
            return None
        index = np.searchsorted(self._units, local).clip(max=len(self._units) - 1)
        if (self._units[index] != local).any() or self._outdated[index].any():
            return None
        copies = self._copies.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            copies.record_stream(current)
        where = to_device(torch.from_numpy(index), self._device)
        return copies.index_select(0, where)

    def _fetch(self, units: Tensor) -> Tensor:
        rows = self._rows.index_select(0, units)
        if self._stream is None:
            return rows
        with torch.cuda.stream(self._stream):
            return rows.pin_memory().to(self._device, non_blocking=True)


def _sparse_file(path: Path, size: int) -> mmap.mmap:
    """A file of zeros whose blocks are allocated when they are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("w+b") as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)
