"""MXNet's RecordIO with images, as InsightFace data sets come, without mxnet.

A file is a sequence of *parts*, all little-endian: `u32 magic`, `u32 cflag << 29 | length`, the
payload, zeros to a multiple of 4. A record is one part (cflag 0), or several (1 first, 2 middle, 3
last) that were cut where the payload had the magic at a multiple of 4; those 4 bytes were dropped
and belong between the parts. So the magic at a multiple of 4 always is the beginning of a part.

The payload of an image record: `<IfQQ` (flag, label, id, id2), `flag` more float32 labels which
then count instead of the first, the encoded image.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.storage.buffered_file import open_buffered

Ints = npt.NDArray[np.int64]

MAGIC: Final = struct.pack("<I", 0xCED7230A)
EXACT_LABELS: Final = 1 << 24  # float32 tells all integers below this apart
_HEAD: Final = struct.Struct("<II")
_IMAGE: Final = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS: Final = 29
_HEAD_BYTES: Final = 64  # bytes that usually hold the head of a part and all before the image
_CHUNK: Final = 1 << 22
_MAX_CLASSES: Final = 1 << 40
_DIGITS: Final = 18
_ADVICE: Final = "get the file again, or read the records without it (--no-idx)"


class BadRecordError(Exception):
    """Bytes that are no record; the message says why."""


class Frame(NamedTuple):
    """Where a record lies: `[start, stop)` in the file, and its payload's pieces in there."""

    start: int
    stop: int
    parts: list[tuple[int, int]]


class ImageRecord(NamedTuple):
    """An unpacked payload; the class is the first label. An identity record has no image."""

    labels: list[float]
    image: bytes


class ByteSource(Protocol):
    """Bytes that can be read from anywhere (`RangeReader`, `BytesInMemory`)."""

    size: int

    def read(self, start: int, stop: int) -> bytes:
        """The bytes `[start, stop)`, fewer at the end."""


class BytesInMemory:
    """Bytes in memory as a `ByteSource`."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read(self, start: int, stop: int) -> bytes:
        """See `ByteSource`."""
        return self._data[start:stop]


def scan_frames(source: ByteSource) -> Iterator[Frame | tuple[int, BadRecordError]]:
    """All records from front to back; for a damaged one, its offset and the error.

    After a damaged record, the search goes on for the next record that begins.
    """
    at = 0
    while at < source.size:
        try:
            frame = read_frame(source, at)
        except BadRecordError as error:
            yield at, error
            at = _next_record(source, at + 4)
        else:
            yield frame
            at = frame.stop


def read_indexed_frames(
    source: ByteSource, offsets: Ints
) -> Iterator[Frame | tuple[int, BadRecordError]]:
    """The records that an index names, by rising offset; see `scan_frames`."""
    for start, following in pairwise([*offsets.tolist(), source.size]):
        try:
            yield read_frame(source, start, following)
        except BadRecordError as error:
            yield start, error


def read_frame(source: ByteSource, start: int, following: int | None = None) -> Frame:
    """The record that begins at an offset.

    Args:
        source: the file.
        start: the offset.
        following: where an index says that the next record begins.

    Raises:
        BadRecordError: none does, or it is not followed by another one or by the end of the file.
    """
    parts: list[tuple[int, int]] = []
    at = start
    while True:
        flag, length = _part(source, at)
        if flag not in ((_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)):
            raise BadRecordError(f"a part with flag {flag} where there belongs another")
        if at + 8 + length > source.size:
            raise BadRecordError("the file ends inside it")
        parts.append((at + 8, at + 8 + length))
        at += 8 + length + -length % 4
        if flag in (_WHOLE, _LAST):
            break
    stop = min(at, source.size)
    if following is not None and stop > following:
        raise BadRecordError("it reaches into the next one")
    if stop not in (following, source.size) and not _begins_record(source, stop):
        raise BadRecordError("no other record begins where it ends")
    return Frame(start, stop, parts)


def _part(source: ByteSource, at: int) -> tuple[int, int]:
    """cflag and payload length of the part at an offset."""
    head = source.read(at, at + 8)
    if at % 4 or len(head) < 8 or head[:4] != MAGIC:
        raise BadRecordError(f"no record begins at byte {at}")
    word = _HEAD.unpack(head)[1]
    return word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)


def _next_record(source: ByteSource, start: int) -> int:
    """Offset of the first part at or after `start` that begins a record; the size if none does."""
    at = start + -start % 4
    while at < source.size:
        chunk = source.read(at, at + _CHUNK + 4)
        offset = chunk.find(MAGIC)
        while offset >= 0:
            if offset % 4 == 0 and _begins_record(source, at + offset):
                return at + offset
            offset = chunk.find(MAGIC, offset + 1)
        at += _CHUNK
    return source.size


def _begins_record(source: ByteSource, at: int) -> bool:
    return at + 8 <= source.size and _part(source, at)[0] in (_WHOLE, _FIRST)


def read_payload_head(source: ByteSource, frame: Frame) -> tuple[ImageRecord, int]:
    """Labels of a record and the bytes of its image, which is not read.

    Raises:
        BadRecordError: the payload is shorter than what it announces.
    """
    size = sum(stop - start for start, stop in frame.parts) + 4 * (len(frame.parts) - 1)
    if len(frame.parts) > 1:
        record = unpack_record(join_parts(source.read(frame.start, frame.stop), frame))
        return ImageRecord(record.labels, b""), len(record.image)
    start, stop = frame.parts[0]
    head = source.read(start, min(stop, start + _HEAD_BYTES))
    announced = _announced(head)
    if announced > size:
        raise BadRecordError(f"a payload of {size} bytes announces {announced}")
    if announced > len(head):
        head = source.read(start, start + announced)
    return ImageRecord(unpack_record(head[:announced]).labels, b""), size - announced


def join_parts(data: bytes, frame: Frame) -> bytes:
    """The payload of a record from its bytes `[frame.start, frame.stop)`.

    Raises:
        BadRecordError: too few bytes; or the magic is where a writer would have cut, so that a
            length is wrong.
    """
    if len(data) < frame.stop - frame.start:
        raise BadRecordError("the file ends inside it")
    parts = [data[start - frame.start : stop - frame.start] for start, stop in frame.parts]
    if any(_has_magic(part) for part in parts):
        raise BadRecordError("other records begin inside it")
    return MAGIC.join(parts)


def unpack_record(payload: bytes) -> ImageRecord:
    """Labels and image of a payload.

    Raises:
        BadRecordError: it is shorter than what it announces.
    """
    announced = _announced(payload)
    if announced > len(payload):
        raise BadRecordError(f"a payload of {len(payload)} bytes announces {announced}")
    flag, label, _, _ = _IMAGE.unpack_from(payload)
    labels = struct.unpack_from(f"<{flag}f", payload, _IMAGE.size) if flag else [label]
    return ImageRecord(list(labels), payload[announced:])


def _announced(payload: bytes) -> int:
    """Bytes before the image, by the first 4 of a payload."""
    if len(payload) < _IMAGE.size:
        raise BadRecordError(f"a payload of {len(payload)} bytes is too short for an image")
    return _IMAGE.size + 4 * int.from_bytes(payload[:4], "little")


def class_of_labels(labels: Sequence[float]) -> int:
    """The class of an image: its first label.

    Raises:
        BadRecordError: it is no class.
    """
    label = labels[0] if labels else math.nan
    if not 0 <= label < _MAX_CLASSES or label % 1:
        raise BadRecordError(f"its label {label} is no class")
    return int(label)


def read_record_index(url: str) -> tuple[Ints, Ints]:
    """Keys and offsets of an `.idx` file, in the order of the offsets.

    Raises:
        UserError: a line is not `key`, tab, `offset`, or a key or an offset is there twice.
    """
    keys, offsets = array("q"), array("q")
    for number, line in enumerate(_lines(url), 1):
        fields = line.split()
        if len(fields) != 2 or not all(f.isdigit() and len(f) <= _DIGITS for f in fields):
            raise UserError(
                f"{url}: line {number}, {line[:40]!r}, is not a key and an offset; {_ADVICE}"
            )
        keys.append(int(fields[0]))
        offsets.append(int(fields[1]))
    key, offset = np.frombuffer(keys, np.int64), np.frombuffer(offsets, np.int64)
    for name, values in (("key", key), ("offset", offset)):
        if _rises(values):
            continue
        ordered = np.sort(values)
        if (twice := np.flatnonzero(ordered[1:] == ordered[:-1])).size:
            raise UserError(f"{url}: {name} {ordered[twice[0]]} is there twice; {_ADVICE}")
    if _rises(offset):
        return key, offset
    order = np.argsort(offset, kind="stable")
    return key[order], offset[order]


def _rises(values: Ints) -> bool:
    """Whether each value is above the one before it."""
    return bool((values[1:] > values[:-1]).all())


def _lines(url: str) -> Iterator[bytes]:
    """The lines of a file, without their ends; a very long one comes in pieces."""
    with open_buffered(url) as stream:
        for line in iter(partial(stream.readline, _CHUNK), b""):
            yield line.removesuffix(b"\n")


def _has_magic(piece: bytes) -> bool:
    """Whether a piece has the magic at a multiple of 4."""
    offset = piece.find(MAGIC)
    while offset > 0 and offset % 4:
        offset = piece.find(MAGIC, offset + 1)
    return offset >= 0
