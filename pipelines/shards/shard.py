"""A shard as the index knows it: its size and checksum, and where its samples begin.

In an index of format 1 the tables of a shard are text inside `index.json`; in one of format 2 they
are a part of the columns that all shards share.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.shards.columns import Column, ColumnEntry, smallest_dtype, write_column
from pipelines.shards.packing import pack_labels, unpack_labels, unpack_offsets

Ints = npt.NDArray[np.int64]
Unpack = Callable[[str, int], Ints]

BEGINS: Final = "begins"
LABELS: Final = "labels"
_BLOCK: Final = 512  # a tar is made of blocks of this many bytes


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        url: relative to the folder of the index, or a whole URL.
        samples: how many samples it holds.
        bytes: its size.
        checksum: `sha256:` and the hexadecimal digest of the file.
        blocks: the offset table, see `pack_offsets`.
        classes: the labels, see `pack_labels`; empty: only the tar knows them.
    """

    url: str
    samples: int
    bytes: int
    checksum: str
    blocks: str = ""
    classes: str = ""

    def __post_init__(self) -> None:
        texts = (self.url, self.checksum, self.blocks, self.classes)
        counts = (self.samples, self.bytes)
        if not all(isinstance(text, str) for text in texts) or not all(
            isinstance(count, int) and count >= 0 for count in counts
        ):
            raise ValueError(f"not a shard: {self}")

    @property
    def offsets(self) -> Ints:
        """int64 `[samples + 1]`: where each sample's first header begins, and the last one ends.

        Raises:
            UserError: the table is damaged; so for all that follow.
        """
        return self._unpack(unpack_offsets, self.blocks, self.samples + 1)

    @property
    def labels(self) -> Ints | None:
        """int64 `[samples]`, or None if the index does not hold them."""
        return self._unpack(unpack_labels, self.classes, self.samples) if self.classes else None

    @property
    def has_labels(self) -> bool:
        """Whether the index holds the labels."""
        return bool(self.classes)

    @property
    def packed_labels(self) -> str:
        """The labels as text, see `pack_labels`; a digest is made of it."""
        return self.classes

    def bounds(self, start: int, stop: int) -> Ints:
        """int64 `[stop - start + 1]`: where the samples `[start, stop)` begin, and the last ends.

        Args:
            start, stop: numbers in this shard, from 0 to `samples`.
        """
        return self._kept_offsets[start : stop + 1]

    def label(self, position: int) -> int | None:
        """The label of one sample, by its number in this shard."""
        return None if self._kept_labels is None else int(self._kept_labels[position])

    @cached_property
    def _kept_offsets(self) -> Ints:
        return self.offsets

    @cached_property
    def _kept_labels(self) -> Ints | None:
        return self.labels

    def _unpack(self, unpack: Unpack, text: str, count: int) -> Ints:
        try:
            return unpack(text, count)
        except (ValueError, zlib.error) as error:
            raise UserError(
                f"index.json: the entry of {self.url} is damaged ({error}); make it again"
            ) from None


@dataclass(frozen=True, kw_only=True)
class MappedShard(Shard):
    """A shard whose tables are in columns; it keeps nothing of them.

    Attributes:
        columns: of the whole index.
        first: number of its first sample in them.
        end: byte where its last sample ends.
    """

    columns: IndexColumns
    first: int
    end: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.end, int) or not 0 <= self.end <= self.bytes:
            raise ValueError(f"not a shard: its samples end at byte {self.end} of {self.bytes}")

    @property
    def offsets(self) -> Ints:
        """See `Shard.offsets`."""
        return self.bounds(0, self.samples)

    @property
    def labels(self) -> Ints | None:
        """See `Shard.labels`."""
        column = self.columns.labels
        if column is None:
            return None
        return column.values[self.first : self.first + self.samples].astype(np.int64)

    @property
    def has_labels(self) -> bool:
        """See `Shard.has_labels`."""
        return self.columns.labels is not None

    @property
    def packed_labels(self) -> str:
        """See `Shard.packed_labels`."""
        return "" if self.labels is None else pack_labels(self.labels)

    def bounds(self, start: int, stop: int) -> Ints:
        """See `Shard.bounds`."""
        begins = self.columns.begins
        last = min(stop + 1, self.samples)
        offsets = np.empty(stop - start + 1, np.int64)
        offsets[-1] = self.end
        offsets[: last - start] = begins.values[self.first + start : self.first + last]
        offsets[: last - start] *= _BLOCK
        if (offsets[1:] < offsets[:-1]).any() or offsets[-1] > self.bytes:
            raise begins.damaged(f"samples of {self.url} end before they begin")
        return offsets

    def label(self, position: int) -> int | None:
        """See `Shard.label`."""
        column = self.columns.labels
        return None if column is None else int(column.values[self.first + position])


class IndexColumns(NamedTuple):
    """The columns of an index.

    Attributes:
        begins: `[samples]`, where each sample begins in its tar, in blocks of 512 bytes.
        labels: `[samples]`; None: only the tars know them.
    """

    begins: Column
    labels: Column | None

    @classmethod
    def parse(cls, folder: str, entries: dict[str, Any], cache_dir: str) -> IndexColumns:
        """The columns that `index.json` describes; none is opened.

        Raises:
            KeyError, TypeError, ValueError: they are not described properly.
        """
        begins, labels = entries[BEGINS], entries.get(LABELS)
        return cls(
            Column(folder, ColumnEntry(**begins), cache_dir),
            None if labels is None else Column(folder, ColumnEntry(**labels), cache_dir),
        )

    @property
    def known(self) -> list[Column]:
        """Those that the index has."""
        return [column for column in self if column is not None]


def describe_shard(shard: Shard) -> dict[str, Any]:
    """A shard's row in `index.json`."""
    row = {name: getattr(shard, name) for name in ("url", "samples", "bytes", "checksum")}
    end = shard.end if isinstance(shard, MappedShard) else int(shard.offsets[-1])
    return row | {"end": end}


def write_columns(folder: str, shards: Sequence[Shard]) -> dict[str, dict[str, Any]]:
    """Write the columns of some shards; returns what `index.json` has to say of them.

    Labels are written if they are known of all shards.
    """
    samples = sum(shard.samples for shard in shards)
    has_labels = all(shard.has_labels for shard in shards)
    highest = max((int(shard.offsets[-1]) // _BLOCK for shard in shards), default=0)
    entries = {
        BEGINS: write_column(
            f"{folder}/{BEGINS}.npy",
            smallest_dtype(0, highest),
            samples,
            (shard.offsets[:-1] // _BLOCK for shard in shards),
        )
    }
    if has_labels:
        entries[LABELS] = write_column(
            f"{folder}/{LABELS}.npy",
            smallest_dtype(*_label_range(shards)),
            samples,
            _labels(shards),
        )
    return {name: asdict(entry) for name, entry in entries.items()}


def _labels(shards: Sequence[Shard]) -> Iterator[Ints]:
    for shard in shards:
        labels = shard.labels
        assert labels is not None, "the caller has checked this"
        yield labels


def _label_range(shards: Sequence[Shard]) -> tuple[int, int]:
    """The lowest and the highest label."""
    lowest = highest = 0
    for labels in _labels(shards):
        lowest = min(lowest, int(labels.min(initial=0)))
        highest = max(highest, int(labels.max(initial=0)))
    return lowest, highest
