"""The keys of samples, read from the headers of their tars."""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.shards.image_format import is_apple_metadata
from pipelines.shards.index import ShardIndex
from pipelines.storage.urls import RangeReader

_HEADER: Final = 512  # bytes
_PER_READ: Final = 256  # headers that are asked for at the same time
_PLAIN: Final = b"0\0"  # type flags of an ordinary file
HASH: Final = np.dtype([("high", "<u8"), ("low", "<u8")])


class KeyTask(NamedTuple):
    """A shard whose keys are wanted.

    Attributes:
        data: index of this shard alone.
        with_shard: whether the tar's name belongs to a sample's name.
    """

    data: ShardIndex
    with_shard: bool


def hash_texts(texts: list[str]) -> npt.NDArray[np.void]:
    """128 bits of each text, `[n]` of `HASH`: equal for equal texts, and for no others."""
    digests = [
        hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()
        for text in texts
    ]
    return np.frombuffer(b"".join(digests), HASH)


def hash_keys(task: KeyTask) -> bytes:
    """The hashes (`hash_texts`) of the names of all samples of a shard, in order."""
    prefix = f"{task.data.shards[0].url}\0" if task.with_shard else ""
    keys = read_keys(task.data, 0, 0, task.data.shards[0].samples)
    return hash_texts([prefix + key for key in keys]).tobytes()


def read_keys(index: ShardIndex, shard: int, start: int, stop: int) -> list[str]:
    """The keys of the samples `[start, stop)` of a shard; of each its first 512 bytes are read.

    Raises:
        UserError: the tar is missing, or is not the one of the index.
        RunError: it cannot be read.
    """
    return read_some_keys(index, shard, np.arange(start, stop))


def read_some_keys(index: ShardIndex, shard: int, positions: npt.NDArray[np.int64]) -> list[str]:
    """The keys of samples of a shard by their positions in it, ascending; see `read_keys`."""
    keys: list[str] = []
    with RangeReader(index.url(shard)) as reader:
        for first in range(0, len(positions), _PER_READ):
            chosen = positions[first : first + _PER_READ]
            bounds = index.shards[shard].bounds(int(chosen[0]), int(chosen[-1]) + 1)
            begins = bounds[chosen - chosen[0]]
            headers = reader.read_many(begins.tolist(), (begins + _HEADER).tolist())
            for position, header in zip(chosen.tolist(), headers, strict=True):
                key = _key(header)
                if key is None:
                    at = position - int(chosen[0])
                    raw = reader.read(int(bounds[at]), int(bounds[at + 1]))
                    key = _parsed_key(raw, index.sample_name(shard, position))
                keys.append(key)
    return keys


def _key(header: bytes) -> str | None:
    """The key that a header tells, or None: its name is long, or it is no plain file."""
    if len(header) < _HEADER or header[156] not in _PLAIN or header[345]:
        return None
    try:
        name = header[:100].partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        return None
    key, dot, rest = name.partition(".")
    is_plain = dot and key and "/" not in rest and not key.endswith("/")
    return key if is_plain and not is_apple_metadata(name) else None


def _parsed_key(raw: bytes, name: str) -> str:
    # It imports torch, which the processes that read headers have no use for.
    from pipelines.data.sample import BadSampleError, parse_members

    try:
        return str(parse_members(memoryview(raw), alone=False)["__key__"])
    except BadSampleError as error:
        raise UserError(
            f"{name}: has no key ({error}); check the data set with `mhe data verify`"
        ) from error
