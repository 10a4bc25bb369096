"""Where one field of a bank lies: in the device's memory, in the host's, or in a sparse file.

Where the system allows it, memory is allocated page by page, as units are touched. `prefetch` names
the units that the next step will need: while the backbone computes, the pages of a file are read
from the disk, and rows that a GPU will use are copied to it (`remote_rows.py`).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist.bank.remote_rows import Local, RemoteRows, RemoteTraffic
from mhe_dist.disk_room import reserve_room
from mhe_dist.distributed import transfer
from mhe_dist.distributed.transfer import to_device
from mhe_dist.errors import RunError, UserError

Memory = Literal["device", "host", "file"]
Shape = tuple[int, int, int]

# When more bytes of a file are in use, its pages are handed back to the system's cache. They stay
# there while there is room. Otherwise all pages ever touched would count as the process's memory.
RESIDENT_BYTES: Final = 1 << 30
# Units of a file from this size on are written by the system, not through the mapping. There, the
# first write of a page costs a fault, and what is not on the disk yet many times what its bytes do.
LEAST_WRITTEN_BYTES: Final = 1 << 14
MADV_POPULATE_WRITE: Final = 23  # Linux 5.14: the faults of many pages in one call
_CURE: Final = (
    "head.bank.memory=file needs room for all rows that steps touch, and their state: make room, "
    "or let head.bank.path name a larger disk"
)


class RowStore:
    """Rows `[units, L, columns]`, zero at first.

    Args:
        shape, dtype: of the rows.
        memory: `device` where they are used, `host` in RAM (pinned for a GPU), `file` in `path`.
        device: where they are used.
        path: where the file is made, which has no name once it is open; for `file` alone.
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
        self._file: FileIO | None = None
        self._path = path
        self._used = 0
        self.shape, self.dtype = shape, dtype
        if 0 in shape or (memory == "device" and device.type != "cpu"):
            self._rows = torch.zeros(shape, dtype=dtype, device=device)
        elif memory == "file":
            if path is None:
                raise ValueError("a bank in file memory needs a folder")
            self._file = _sparse_file(path, self.nbytes)
            self._map = mmap.mmap(self._file.fileno(), self.nbytes)
            self._rows = torch.frombuffer(self._map, dtype=dtype).view(shape)
        else:
            pages = np.zeros(self.nbytes, dtype=np.uint8)
            self._rows = torch.from_numpy(pages).view(dtype).view(shape)
        self._remote: RemoteRows | None = None
        if self._rows.device.type != device.type:
            pinned = memory == "host" and transfer.pin_in_place(self._rows, self)
            self._remote = RemoteRows(self._rows, device, pinned)

    @property
    def rows(self) -> Tensor:
        """All of them, in the memory that stores them, once everything written is there."""
        if self._remote is not None:
            self._remote.wait_until_stored()
        return self._rows

    @property
    def device(self) -> torch.device:
        """Of the memory that stores them."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def changes_in_place(self, dtype: torch.dtype) -> bool:
        """Whether rows of that type are changed where they lie: on this host, in their type."""
        return self._remote is None and self.device.type == "cpu" and self.dtype == dtype

    @property
    def traffic(self) -> RemoteTraffic | None:
        """What was read on a GPU; None where rows are used where they are."""
        return None if self._remote is None else self._remote.traffic

    def get(self, local: Local) -> Tensor:
        """Rows `[U, L, columns]` in the stored type, where they are used.

        A slice is not copied, unless rows are used elsewhere than they are stored.
        """
        if self._remote is not None:
            return self._count(self._remote.get(local))
        if isinstance(local, slice):
            return self._count(self._rows[local])
        where = to_device(torch.from_numpy(local), self.device)
        return self._count(self._rows.index_select(0, where))

    def where_stored(self, local: npt.NDArray[np.int64]) -> list[Tensor]:
        """Each of some units `[L, columns]`: a change of it changes what is stored."""
        if self._map is not None:
            self._used += len(local) * self.unit_bytes
            self._advise(self._map, local, MADV_POPULATE_WRITE)
        return list(map(partial(torch.select, self.rows, 0), local.tolist()))

    def put(self, local: Local, rows: Tensor) -> None:
        """Store rows; those that `get` gave of a slice are there already.

        Rows that are used elsewhere than they are stored must not be changed afterwards.

        Raises:
            RunError: the disk of a file is full.
        """
        if self._remote is not None and rows.device.type != self.device.type:
            self._remote.put(local, rows)
        elif not isinstance(local, slice):
            if self._is_written_by_system:
                self._write_units(local, rows)
                return
            self._count(rows)
            where = to_device(torch.from_numpy(local), self.device)
            self.rows.index_copy_(0, where, rows.to(self.device, self.dtype))
        elif rows.data_ptr() != self._rows[local].data_ptr():
            self.rows[local].copy_(rows)

    def allocate(self, local: npt.NDArray[np.int64]) -> None:
        """Let a file have room for units that were never written: they stay zeros.

        Raises:
            RunError: the disk is full.
        """
        if self._is_written_by_system:
            self.put(local, torch.zeros((len(local), *self.shape[1:]), dtype=self.dtype))
        else:
            self.reserve(local)

    def reserve(self, local: npt.NDArray[np.int64]) -> None:
        """Let a file have room for units that are going to be written through its mapping.

        Raises:
            RunError: the disk is full.
        """
        if self._file is None or self._is_written_by_system:
            return
        for start, stop in self._pages_of(local):
            reserve_room(self._file.fileno(), str(self._path), start, stop, _CURE)

    @property
    def _is_written_by_system(self) -> bool:
        """Whether units of the file are written to it, not through its mapping."""
        is_used_here = self._file is not None and self._remote is None
        return is_used_here and self.unit_bytes >= LEAST_WRITTEN_BYTES

    def _write_units(self, local: npt.NDArray[np.int64], rows: Tensor) -> None:
        """Write units to the file; what is mapped of it shows them at once."""
        assert self._file is not None, "_is_written_by_system"
        size = self.unit_bytes
        data = rows.to(self.dtype).contiguous().view(torch.uint8).view(-1).numpy().data
        with self._explaining_full_disk():
            for number, unit in enumerate(local.tolist()):
                _write_all(self._file, data[number * size : (number + 1) * size], unit * size)

    @contextmanager
    def _explaining_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._path!s}: rows cannot be written: {error.strerror}; {_CURE}"
            ) from error

    def copy_units(self, local: npt.NDArray[np.int64], out: Tensor) -> None:
        """Copy the rows of some units to `out` `[U, L, columns]` on the host, in the stored type.

        Pages of a file do not stay in memory for it.
        """
        where = torch.from_numpy(local).to(self.device)
        if self.device.type == "cpu":
            torch.index_select(self.rows, 0, where, out=out)
        else:
            out.copy_(self.rows.index_select(0, where))
        self._drop_pages()

    @property
    def prefetches(self) -> bool:
        """Whether `prefetch` does anything."""
        return self._map is not None or self._remote is not None

    def prefetch(self, local: npt.NDArray[np.int64]) -> None:
        """Begin to fetch distinct units that will be read soon; returns at once."""
        if self._remote is not None:
            self._remote.prefetch(local)
        elif self._map is not None:
            self._advise(self._map, local, mmap.MADV_WILLNEED)

    def _advise(self, pages: mmap.mmap, local: npt.NDArray[np.int64], advice: int) -> None:
        """Tell the system about the pages of distinct units; not all systems know every advice."""
        with suppress(OSError):
            for start, stop in self._pages_of(local):
                pages.madvise(advice, start, stop - start)

    def _pages_of(self, local: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Bytes from the page of its first unit to its end, for each run of distinct units."""
        local = np.sort(local)
        cuts = np.flatnonzero(np.diff(local) > 1) + 1
        for first, last in pairwise([0, *cuts.tolist(), len(local)]):
            if last > first:
                start = int(local[first]) * self.unit_bytes // mmap.PAGESIZE * mmap.PAGESIZE
                yield start, (int(local[last - 1]) + 1) * self.unit_bytes

    def release(self) -> None:
        """At the end of a step: free what the step needed alone.

        The pages of a file go back to the system's cache if many are in use.
        """
        if self._remote is not None:
            self._remote.end_step()
        if self._used > RESIDENT_BYTES:
            self._drop_pages()

    def _drop_pages(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._used = 0

    def _count(self, rows: Tensor) -> Tensor:
        self._used += rows.numel() * self.dtype.itemsize
        return rows


def _sparse_file(path: Path, size: int) -> FileIO:
    """A file of zeros whose blocks are allocated when they are written.

    It has no name: it ends with the process, however that ends, and a run that goes on with fewer
    workers finds none of it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(path.suffix, f"{path.stem}-", path.parent)
    except OSError as error:
        raise UserError(
            f"head.bank.path: {path} cannot be made ({error.strerror}); name a folder of each "
            "worker's machine that can be written, or use head.bank.memory=host"
        ) from error
    os.unlink(name)
    file = FileIO(descriptor, "r+")
    file.truncate(size)
    return file


def _write_all(file: FileIO, data: memoryview, offset: int) -> None:
    """Write all of `data`; the system may take it in parts."""
    while len(data):
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
