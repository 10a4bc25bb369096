"""The store of class centres of one partition, with the optimizer state of each row.

A bank holds *units* of L consecutive rows: the heads of Multi-Head Sampling, single rows
elsewhere. A unit is initialised when it is first touched. Its first rows depend on its number
alone, so the time, the rank and the order do not matter. Memory is allocated page by page, as units
are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist import seeds
from mhe_dist.bank.remote_rows import Local, RemoteTraffic
from mhe_dist.bank.row_store import Memory, RowStore
from mhe_dist.bank.saved_rows import SavedRows
from mhe_dist.distributed.topology import CPU
from mhe_dist.distributed.transfer import to_device
from mhe_dist.kernels.dispatch import MAX_UNIT_ROWS, MAX_WIDTH, use_kernels
from mhe_dist.sizes import DEVICE_CHUNK_BYTES, HOST_CHUNK_BYTES

LARGE_UNIT_BYTES = 1 << 17
ROUNDED_VALUES = 1 << 17  # that are rounded at a time on a host
# From this size on, an operation on a list of units costs no more than one on a copy of them all.
LISTED_UNIT_BYTES = 1 << 14

Initial = Callable[[Tensor], Tensor]
# Global numbers of units: a host int64 tensor `[U]`, or a range, whose rows are consecutive.
Units = Tensor | range


class Bank:
    """Rows `[units, L, D]` and per-row state of one rank.

    Args:
        units: global numbers of the units of this partition.
        length: L, rows of a unit.
        width: D, columns of a row.
        initial: int64 unit numbers `[U]` on the host -> first rows `[U, L, D]` on `device`.
        fields: the optimizer's row state, which starts at zero: name -> float32 columns, or None
            for a state of D columns in the type of the rows.
        dtype: type of the stored rows and state; bfloat16 is rounded stochastically.
        compute_dtype: type of what is read.
        memory: `device` keeps rows where they are used, `host` in RAM, `file` in sparse files.
        device: where rows are used.
        folder: where `file` puts its files.
        seed: keys the stochastic rounding.
    """

    def __init__(
        self,
        units: range,
        length: int,
        width: int,
        initial: Initial,
        fields: Mapping[str, int | None] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
        memory: Memory = "device",
        device: torch.device = CPU,
        folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.units, self.length, self.width = units, length, width
        columns = {"weight": None, **(fields or {})}
        self.fields = tuple(columns)
        self.compute_dtype, self.device, self.seed = compute_dtype, device, seed
        self._initial = initial
        self._touched = np.zeros(len(units), dtype=bool)
        self._store = {
            name: RowStore(
                (len(units), length, width if own is None else own),
                dtype if own is None else torch.promote_types(dtype, torch.float32),
                memory,
                device,
                None if folder is None else Path(folder) / f"{name}.rows",
            )
            for name, own in columns.items()
        }

    @property
    def touched(self) -> Tensor:
        """Global numbers of the units that were touched, ascending, int64 on the host."""
        return torch.from_numpy(np.flatnonzero(self._touched) + self.units.start)

    @property
    def bytes(self) -> int:
        """Bytes of all rows and their state, touched or not."""
        return sum(store.nbytes for store in self._store.values())

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit with its state, as they are stored."""
        return sum(store.unit_bytes for store in self._store.values())

    @property
    def stored(self) -> dict[str, Tensor]:
        """All rows and their state by field, as they are stored."""
        return {name: store.rows for name, store in self._store.items()}

    @property
    def takes_kernels(self) -> bool:
        """Whether a kernel may update stored float32 or bfloat16 rows where they lie."""
        fits = self.length <= MAX_UNIT_ROWS and self.width <= MAX_WIDTH
        fits = fits and self.compute_dtype == torch.float32
        there = all(store.device.type == self.device.type for store in self._store.values())
        return fits and there and use_kernels(*self.stored.values())

    @property
    def units_per_chunk(self) -> int:
        """Units that make a chunk."""
        unit_bytes = self.length * self.width * self.compute_dtype.itemsize
        return max(1, chunk_bytes(self.device) // unit_bytes)

    def parts(self, units: Units) -> list[tuple[slice, Units]]:
        """Parts of `units` whose rows are updated together: slices of `units`, with their units.

        Small units make one part, whose rows are copied. A large unit on a host is a part of its
        own, given as a range, which is updated in place: a copy would take as long as the update.
        """
        weight = self._store["weight"]
        in_place = weight.changes_in_place(self.compute_dtype)
        if isinstance(units, range) or not in_place or weight.unit_bytes < LARGE_UNIT_BYTES:
            return [(slice(None), units)]
        return [(slice(i, i + 1), range(u, u + 1)) for i, u in enumerate(units.tolist())]

    @property
    def lists_units(self) -> bool:
        """Whether units are large enough for `changing`."""
        on_host = self.device.type == "cpu" == self._store["weight"].device.type
        unit_bytes = self.length * self.width * self.compute_dtype.itemsize
        return on_host and unit_bytes >= LISTED_UNIT_BYTES

    @contextmanager
    def changing(self, units: Tensor, step: int) -> Iterator[dict[str, list[Tensor]]]:
        """Each field of each of some touched, distinct units `[L, columns]`, to be changed.

        What they are at the end of the block is stored. They are no copies where rows are stored on
        this host in the compute type. `step` keys the rounding.
        """
        local = units.numpy() - self.units.start
        fields, copies = {}, {}
        for name, store in self._store.items():
            if store.changes_in_place(self.compute_dtype):
                fields[name] = store.where_stored(local)
            else:
                copies[name] = self.read(units, name)
                fields[name] = list(copies[name].unbind())
        yield fields
        self.write(units, copies, step)

    def touch(self, units: Units) -> None:
        """Initialise those of `units` that were never touched."""
        local = self._local(units)
        fresh = np.flatnonzero(~self._touched[local])
        fresh = fresh + local.start if isinstance(local, slice) else np.unique(local[fresh])
        chunk = max(1, chunk_values(self.device) // (self.length * self.width))
        for start in range(0, len(fresh), chunk):
            part = fresh[start : start + chunk]
            numbers = torch.from_numpy(part + self.units.start)
            self._store["weight"].reserve(part)
            self._put("weight", numbers, self._initial(numbers), step=-1)
            for name in self.fields[1:]:
                self._store[name].allocate(part)
        self._touched[fresh] = True

    def read(self, units: Units, field: str = "weight") -> Tensor:
        """Rows `[U, L, D]` of `units` in the compute type.

        Rows of units that were never touched are made for the result and not kept. A range of
        touched units that is stored on the compute device and in the compute type is not copied:
        a change of the result changes the bank.
        """
        rows = self._get(field, units)
        if field == "weight":
            fresh = np.flatnonzero(~self._touched[self._local(units)])
            if len(fresh):
                rows = rows.clone() if isinstance(units, range) else rows
                where = torch.from_numpy(fresh)
                numbers = where + units.start if isinstance(units, range) else units[where]
                rows[to_device(where, rows.device)] = self._initial(numbers).to(rows)
        return rows

    def read_for_products(
        self, units: Units, normalise: bool, scaled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rows `[U, L, D]` of `units` in the compute type, and `1 / |w|` of each `[U, L]`.

        Args:
            units: see `read`; those that were never touched cost a pass more.
            normalise: whether rows are normalised; without, ones stand for `1 / |w|`.
            scaled: whether the rows are given as `w / |w|`.
        """
        # The kernel reads what is stored, and nothing is stored of units that were never touched.
        if normalise and self.takes_kernels and self._touched[self._local(units)].all():
            from mhe_dist.kernels.row_read import read_rows

            return read_rows(self.stored["weight"], self.positions(units), scaled)
        rows = self.read(units)
        if not normalise:
            return rows, rows.new_ones(rows.shape[:-1])
        inverse = inverse_norms(rows)
        return (rows * inverse.unsqueeze(-1) if scaled else rows), inverse

    def write(self, units: Units, values: dict[str, Tensor], step: int) -> None:
        """Store fields `[U, L, D]` of touched, distinct `units`; `step` keys the rounding."""
        for field, rows in values.items():
            self._put(field, units, rows, step)

    def load(self, units: Tensor, saved: Mapping[str, Tensor], prefix: str = "") -> None:
        """Store fields as they were saved, bit for bit, and mark `units` as touched.

        Args:
            units: whose rows they are.
            saved: by name, which begins with `prefix`; also other tensors. Row state that is not
                among them, as the momentum of a run that had none, is zero, as it was at first.
            prefix: see `saved`.
        """
        local = (units - self.units.start).numpy()
        for field, store in self._store.items():
            rows = saved.get(prefix + field)
            if rows is None and field != "weight":
                store.allocate(local)
            else:
                store.reserve(local)
                store.put(local, saved[prefix + field])
        self._touched[local] = True

    def put_rows(self, field: str, units: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Store single rows `[n, columns]` in slots `[n]` of touched `units` `[n]`, bit for bit."""
        store = self._store[field].rows
        where = (units - self.units.start) * self.length + slots
        store.view(-1, store.shape[-1]).index_copy_(0, where.to(store.device), rows.to(store))

    def saved(self, units: Tensor) -> dict[str, SavedRows]:
        """All fields of `units` in the stored type, as `load` takes them once they are copied."""
        local = units.numpy() - self.units.start
        return {name: SavedRows(store, local) for name, store in self._store.items()}

    def forget(self) -> None:
        """Mark every unit as never touched and clear the optimizer state."""
        local = self.touched - self.units.start
        for name in self.fields[1:]:
            store = self._store[name].rows
            store.index_fill_(0, local.to(store.device), 0)
        self._touched[local.numpy()] = False

    def held(self, units: Tensor) -> Tensor:
        """Which of `units` are in this partition."""
        return (units >= self.units.start) & (units < self.units.stop)

    @property
    def prefetches(self) -> bool:
        """Whether `prefetch` does anything."""
        return any(store.prefetches for store in self._store.values())

    def prefetch(self, units: Tensor) -> None:
        """Begin to fetch distinct units that the next step will need; see `RowStore.prefetch`."""
        local = units.numpy() - self.units.start
        for store in self._store.values():
            store.prefetch(local[self._touched[local]])

    def take_traffic(self) -> RemoteTraffic | None:
        """What was read since the last call, in all fields; None where rows are used in place."""
        total = RemoteTraffic()
        found = [store.traffic for store in self._store.values() if store.traffic is not None]
        for traffic in found:
            total.units += traffic.units
            total.ahead += traffic.ahead
            total.wait_s += traffic.wait_s
            traffic.units, traffic.ahead, traffic.wait_s = 0, 0, 0.0
        return total if found else None

    def release(self) -> None:
        """Free memory that was needed for the update of rows alone; call it between two steps."""
        for store in self._store.values():
            store.release()

    def positions(self, units: Units) -> Tensor:
        """Positions of `units` in this partition, int64 on the device."""
        if isinstance(units, range):
            first = self.units.start
            return torch.arange(units.start - first, units.stop - first, device=self.device)
        return to_device(units - self.units.start, self.device)

    def rounding_key(self, field: str, step: int) -> int:
        """Keys the stochastic rounding of a field in a step."""
        return seeds.derive(self.seed, f"rounding of {field}", step)

    def _local(self, units: Units) -> Local:
        """Positions of `units` in this partition, as NumPy and torch index."""
        first = self.units.start
        if isinstance(units, range):
            return slice(units.start - first, units.stop - first)
        local: npt.NDArray[np.int64] = units.numpy() - first
        return local

    def _get(self, field: str, units: Units) -> Tensor:
        rows = self._store[field].get(self._local(units))
        return rows.to(self.device, self.compute_dtype, non_blocking=True)

    def _put(self, field: str, units: Units, rows: Tensor, step: int) -> None:
        store = self._store[field]
        if store.dtype == torch.bfloat16:
            if isinstance(units, range):
                numbers = torch.arange(units.start, units.stop, device=rows.device)
            else:
                numbers = to_device(units, rows.device)
            rows = _round(rows, numbers, self.rounding_key(field, step))
        store.put(self._local(units), rows)


def inverse_norms(rows: Tensor) -> Tensor:
    """`1 / |w|` `[..., L]` of rows `[..., L, D]`."""
    return torch.linalg.vector_norm(rows, dim=-1).clamp_min_(1e-12).reciprocal_()


def chunk_values(device: torch.device) -> int:
    """Values of first rows that are made at once."""
    return 1 << (24 if device.type == "cuda" else 22)


def chunk_bytes(device: torch.device) -> int:
    """Bytes of a chunk, by the caches and the launch cost of the device."""
    return DEVICE_CHUNK_BYTES if device.type == "cuda" else HOST_CHUNK_BYTES


def _round(rows: Tensor, units: Tensor, key: int) -> Tensor:
    """`round_stochastically`, by its kernel where kernels are used; the bits are the same."""
    fits = rows.shape[1:].numel() <= MAX_UNIT_ROWS * MAX_WIDTH
    if fits and rows.dtype == torch.float32 and use_kernels(rows, units):
        from mhe_dist.kernels.row_update import round_rows

        return round_rows(rows, units, key)
    return round_stochastically(rows, units, key)


def round_stochastically(rows: Tensor, units: Tensor, key: int) -> Tensor:
    """Round float32 `[U, L, D]` to bfloat16, up with the probability that keeps the mean.

    The noise is a hash of (key, unit, position in the unit), the same on any rank and device.
    """
    rounded = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
    # A dozen passes over some values at a time, that stay in a core's cache.
    per_chunk = ROUNDED_VALUES if rows.device.type == "cpu" else rows.numel()
    units_per_chunk = max(1, per_chunk // max(1, rows.shape[1:].numel()))
    parts = (tensor.split(units_per_chunk) for tensor in (rounded, rows, units))
    for out, values, numbers in zip(*parts, strict=True):
        out.copy_(_with_noise(values.float().contiguous(), numbers, key))
    return rounded


def _with_noise(rows: Tensor, units: Tensor, key: int) -> Tensor:
    """float32 `[U, L, D]` whose last 16 bits were rounded away; not of what is not finite."""
    noise = torch.arange(rows.shape[1:].numel(), dtype=torch.int32, device=rows.device)
    start = units.to(torch.int32) * 374761393 + seeds.signed(key, 32)
    noise = noise.mul_(-1640531527) + start[:, None]
    shifted = noise >> 15
    noise.bitwise_xor_(shifted).mul_(-2048144789)
    torch.bitwise_right_shift(noise, 13, out=shifted)
    noise.bitwise_xor_(shifted).mul_(-1028477379)
    noise.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    bits = noise.view(rows.shape).add_(rows.view(torch.int32))
    # Noise would carry a NaN's bits over into the sign: NaN stays NaN, for the guard to see.
    return torch.where(rows.isfinite(), bits.bitwise_and_(-65536).view(torch.float32), rows)
