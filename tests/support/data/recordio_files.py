"""Small data sets for the tests of the sources, and what is in the shards that they become."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import fsspec

from pipelines.shards.image_format import IMAGE_EXTENSIONS
from pipelines.shards.index import ShardIndex
from pipelines.sources.recordio import MAGIC
from tests.support.data.images import jpeg

Item = tuple[list[float], bytes]


def items(classes: int = 3, each: int = 4) -> list[Item]:
    """Images class by class; some have the magic in them, at a multiple of 4 or not."""
    found = []
    for number in range(classes * each):
        tail = [b"", MAGIC, b"x" + MAGIC, MAGIC * 3, bytes(2) + MAGIC + b"y"][number % 5]
        image = jpeg(number)
        found.append(([float(number // each)], image + bytes(-len(image) % 4) + tail))
    return found


def pack_record(labels: Sequence[float], image: bytes, key: int = 0) -> bytes:
    """The payload of an image record; one label is written in the header, several behind it."""
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], key, 0) + image
    return (
        struct.pack("<IfQQ", len(labels), 0.0, key, 0)
        + struct.pack(f"<{len(labels)}f", *labels)
        + image
    )


class RecordWriter:
    """Writes `.rec` and `.idx` like mxnet's."""

    def __init__(self, records: IO[bytes], index: IO[bytes] | None = None) -> None:
        """Write to two open files; without an index, keys are lost."""
        self._records, self._index, self._at = records, index, 0

    def write(self, key: int, payload: bytes) -> int:
        """Append a record; returns its offset."""
        start = self._at
        pieces = _split(payload)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            flag = (0 if last else 1) if number == 0 else (3 if last else 2)
            self._at += self._records.write(part(flag, piece))
        if self._index is not None:
            self._index.write(f"{key}\t{start}\n".encode())
        return start


def _split(payload: bytes) -> list[bytes]:
    """Cut at every magic that stands at a multiple of 4, and drop it."""
    pieces, begin = [], 0
    offset = payload.find(MAGIC)
    while offset >= 0:
        if offset % 4 == 0:
            pieces.append(payload[begin:offset])
            begin = offset + 4
            offset = payload.find(MAGIC, begin)
        else:
            offset = payload.find(MAGIC, offset + 1)
    return [*pieces, payload[begin:]]


def layout(images: list[Item], kind: str = "flat") -> tuple[bytes, bytes]:
    """`.rec` and `.idx` of images in one of the two layouts."""
    rec, idx = io.BytesIO(), io.BytesIO()
    writer = RecordWriter(rec, idx)
    if kind == "flat":
        for key, (labels, image) in enumerate(images):
            writer.write(key, pack_record(labels, image, key))
        return rec.getvalue(), idx.getvalue()
    classes = sorted({labels[0] for labels, _ in images})
    first, last = len(images) + 1, len(images) + 1 + len(classes)
    writer.write(0, pack_record([float(first), float(last)], b""))
    for key, (labels, image) in enumerate(images, 1):
        writer.write(key, pack_record(labels, image, key))
    for key, label in enumerate(classes, first):
        mine = [number for number, (labels, _) in enumerate(images, 1) if labels[0] == label]
        writer.write(key, pack_record([float(mine[0]), float(mine[-1] + 1)], b"", key))
    return rec.getvalue(), idx.getvalue()


def save(folder: Path, rec: bytes, idx: bytes | None) -> str:
    """Write the files of a data set; returns the path of `train.rec`."""
    folder.mkdir(exist_ok=True)
    (folder / "train.rec").write_bytes(rec)
    if idx is not None:
        (folder / "train.idx").write_bytes(idx)
    return str(folder / "train.rec")


def part(flag: int, payload: bytes) -> bytes:
    """One part, by the definition of the format."""
    word = struct.pack("<II", 0xCED7230A, flag << 29 | len(payload))
    return word + payload + bytes(-len(payload) % 4)


def content(url: str) -> dict[str, tuple[int, bytes, bytes]]:
    """Key -> label, image, JSON, of all samples of a data set."""
    found = {}
    index = ShardIndex.load(url)
    for number in range(len(index.shards)):
        members: dict[str, dict[str, bytes]] = {}
        with fsspec.open(index.url(number)) as stream, tarfile.open(fileobj=stream) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None
                members.setdefault(stem, {})[extension] = data.read()
        labels = index.shards[number].labels
        assert labels is not None
        for (key, parts), label in zip(members.items(), labels, strict=True):
            assert int(parts["cls"]) == label
            found[key] = (
                int(label),
                next(parts[e] for e in IMAGE_EXTENSIONS if e in parts),
                parts.get("json", b""),
            )
    assert len(found) == index.samples
    return found
