"""The samples of an epoch, drawn once per node into a file that all its processes map.

The file holds, for each pass over a data set that does not take it whole, the numbers of its
samples, sorted. It begins with a key, the digest of all that decides the draw, and a file with
another key or another size is drawn again. One process draws while the others wait.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.data.order import Ints
from pipelines.shards.columns import CACHE_VARIABLE, smallest_dtype
from pipelines.storage.cache import FileCache

_FORMAT: Final = "mhe-draw-1"
_KEY: Final = 64  # bytes: hexadecimal digits
_FEWEST_BYTES: Final = 4 << 30  # that are kept in the folder at most, however small the draws are
_KEPT: Final = 4  # draws of this size that find room there
_CHUNK: Final = 1 << 20  # numbers that are written together


class PassDraw(NamedTuple):
    """What one pass over a data set has in an epoch.

    Attributes:
        starts: int64 `[shards + 1]`, as `ShardIndex.starts`.
        samples: how many are drawn.
        numbers: draws them: int64 `[samples]`, sorted; None: all samples of the data set.
    """

    starts: Ints
    samples: int
    numbers: Callable[[], Ints] | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers in the file; it holds the total, too."""
        return np.dtype(smallest_dtype(0, int(self.starts[-1]))).newbyteorder("<")


class DrawnSamples(Sequence[Ints | None]):
    """For each shard the numbers of its samples that are in an epoch, sorted; None: all.

    Attributes:
        sizes: int64 `[shards]`, how many of each are in the epoch.
    """

    def __init__(
        self, passes: Sequence[PassDraw], drawn: Sequence[npt.NDArray[Any] | None]
    ) -> None:
        """Take the draws.

        Args:
            passes: their shards follow one another.
            drawn: the numbers of each pass, as `PassDraw.numbers`.
        """
        self._drawn = drawn
        self._firsts = np.cumsum([0, *(len(each.starts) - 1 for each in passes)])
        self._starts = [each.starts for each in passes]
        # Compared as the numbers' own type, or all of them would be converted.
        self._cuts = [
            each.starts
            if found is None
            else np.searchsorted(found, each.starts.astype(found.dtype))
            for each, found in zip(passes, drawn, strict=True)
        ]
        self.sizes = np.concatenate([np.diff(cuts) for cuts in self._cuts]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, shard: Any) -> Any:
        """See the class."""
        return self.of(shard, 0, int(self.sizes[shard]))

    def of(self, shard: int, start: int, stop: int) -> Ints | None:
        """The numbers in a shard of its samples `[start, stop)` among those in the epoch."""
        if not 0 <= shard < len(self):
            raise IndexError(shard)
        owner = int(np.searchsorted(self._firsts, shard, side="right")) - 1
        numbers, position = self._drawn[owner], shard - int(self._firsts[owner])
        if numbers is None:
            return None
        cut = int(self._cuts[owner][position])
        return numbers[cut + start : cut + stop].astype(np.int64) - self._starts[owner][position]


def draw_samples(passes: Sequence[PassDraw], content: Any, folder: str) -> DrawnSamples:
    """Draw the samples of an epoch, or map what another process of this node has drawn.

    Args:
        passes: of the epoch.
        content: JSON-able, all that decides the draw.
        folder: of this node, for the file.

    Raises:
        UserError: the node has no room for it.
    """
    if all(each.numbers is None for each in passes):
        return DrawnSamples(passes, [None] * len(passes))
    key = hashlib.sha256(json.dumps([_FORMAT, content]).encode()).hexdigest()
    size = _KEY + sum(each.samples * each.dtype.itemsize for each in passes if each.numbers)
    try:
        cache = FileCache(folder, max(_FEWEST_BYTES, _KEPT * size))
        while True:
            stream = cache.open(key, size, lambda part: _write(part, key, passes))
            if stream is None:
                raise OSError(errno.ENOSPC, "other processes are drawing there, for other runs")
            with stream:
                if stream.read(_KEY) == key.encode():
                    return DrawnSamples(passes, list(_mapped(stream, size, passes)))
                cache.discard(key, stream)
    except OSError as error:
        raise UserError(
            f"{folder}: the samples of an epoch cannot be kept there ({error}); they take "
            f"{size:,} bytes: make room, or name another folder of this machine with "
            f"{CACHE_VARIABLE}"
        ) from error


def _write(part: BinaryIO, key: str, passes: Sequence[PassDraw]) -> None:
    part.write(key.encode())
    for each in passes:
        if each.numbers is not None:
            numbers = each.numbers()
            for start in range(0, len(numbers), _CHUNK):
                part.write(numbers[start : start + _CHUNK].astype(each.dtype).tobytes())


def _mapped(
    stream: BinaryIO, size: int, passes: Sequence[PassDraw]
) -> Iterator[npt.NDArray[Any] | None]:
    """The numbers of each pass in the file."""
    mapped, offset = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ), _KEY
    for each in passes:
        if each.numbers is None:
            yield None
            continue
        yield np.frombuffer(mapped, each.dtype, each.samples, offset)
        offset += each.samples * each.dtype.itemsize
