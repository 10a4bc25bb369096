"""Tables of an index as short text."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

_BLOCK: Final = 512  # a tar is made of blocks of this many bytes


def pack_offsets(offsets: Iterable[int]) -> str:
    """The offset table as text: base64 of zlib of the uint32 (little-endian) differences in blocks.

    Every member of a tar begins at a multiple of 512 bytes. A sample costs about 2 bytes.
    """
    steps = np.diff(np.asarray(list(offsets), np.int64), prepend=0) // _BLOCK
    return base64.b64encode(zlib.compress(steps.astype("<u4").tobytes())).decode()


def unpack_offsets(text: str, count: int) -> npt.NDArray[np.int64]:
    """The inverse of `pack_offsets`: `count` byte offsets.

    Raises:
        ValueError, zlib.error: it is not a table of that many.
    """
    steps = np.frombuffer(_inflate(text, 4 * count), "<u4")
    return np.cumsum(steps, dtype=np.int64) * _BLOCK


def pack_labels(labels: Iterable[int]) -> str:
    """Labels as text: base64 of zlib of int64 (little-endian), byte planes one after the other.

    The upper planes are all zero and cost nothing; a shuffled label costs about `log2(C) / 6`
    bytes.
    """
    values = np.asarray(list(labels), "<i8")
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(-1, 8).T)
    return base64.b64encode(zlib.compress(planes.tobytes())).decode()


def unpack_labels(text: str, count: int) -> npt.NDArray[np.int64]:
    """The inverse of `pack_labels`: `count` labels.

    Raises:
        ValueError, zlib.error: it is not a table of that many.
    """
    planes = np.frombuffer(_inflate(text, 8 * count), np.uint8).reshape(8, count)
    return np.ascontiguousarray(planes.T).view("<i8")[:, 0].astype(np.int64)


def _inflate(text: str, size: int) -> bytes:
    """Decompress to exactly `size` bytes, and never to more."""
    stream = zlib.decompressobj()
    data = stream.decompress(base64.b64decode(text, validate=True), size + 1)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes or more where {size} belong")
    return data
