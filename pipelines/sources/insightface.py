"""InsightFace data sets (`train.rec`, `train.idx`, `property`) to shards, images byte for byte.

In the *classic* layout the first record is a header and the last ones are identity records, all of
them two labels without an image; in the *flat* one every record is an image. So a record without an
image is no sample in either layout.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import fsspec
import numpy as np

from mhe_dist.errors import UserError
from mhe_dist.redact import scrub
from pipelines.shards.image_format import image_extension
from pipelines.shards.index import Fault
from pipelines.shards.writer import Sample
from pipelines.sources.convert import (
    DEFAULT_OPTIONS,
    FoundSamples,
    ImportOptions,
    ImportResult,
    Ints,
    NewDataset,
    dense_classes,
    describe_unknown_format,
    require_two_classes,
    write_dataset,
)
from pipelines.sources.recordio import (
    EXACT_LABELS,
    BadRecordError,
    BytesInMemory,
    Frame,
    class_of_labels,
    join_parts,
    read_frame,
    read_indexed_frames,
    read_payload_head,
    read_record_index,
    scan_frames,
    unpack_record,
)
from pipelines.storage.staging import require_absent_or_resumable
from pipelines.storage.urls import RangeReader, url_exists
from pipelines.storage.worker_pool import Progress, no_progress

_RECORDS_PER_REQUEST: Final = 256  # records that are asked for together
_REPORT_EVERY: Final = 10_000  # records
_RECORD_FILE: Final = "give the .rec file of the data set, such as train.rec"


def import_recordio(
    rec: str,
    out: str,
    use_index: bool = True,
    options: ImportOptions = DEFAULT_OPTIONS,
    scanning: Progress = no_progress,
    writing: Progress = no_progress,
) -> ImportResult:
    """Convert a RecordIO file.

    Args:
        rec: path or URL of the `.rec` file; `.idx` and `property` are looked for beside it.
        out: folder or URL for the shards, which must not exist.
        use_index: read the records that `.idx` names; otherwise all that the file has.
        options: of writing.
        scanning: called with the bytes that were looked through, and all.
        writing: called with the finished tars and their number.

    Raises:
        UserError: no such file, none of RecordIO, a damaged index, a single class, an output that
            exists.
        RunError: more bad records than the options allow.
    """
    require_absent_or_resumable(out)
    _refuse_folder(rec)
    with RangeReader(rec) as reader:
        records = _scan(reader, _index_of(rec) if use_index else None, scanning)
    records.require_any()
    distinct, classes = dense_classes(records.column("labels"))
    records.labels = array("q")  # they have become classes
    keys, starts, stops = (records.column(name) for name in ("keys", "starts", "stops"))
    warnings = _warnings(records, distinct, _announced_classes(rec))
    names = [str(label) for label in distinct.tolist()]
    if not records.faults:  # else the records of the other class may be among the bad ones
        require_two_classes(scrub(rec), names, "give the file that has all of them")
    found = FoundSamples(names, classes, records.column("sizes"), records.faults, warnings)

    def task(chosen: Ints) -> _RecordTask:
        return _RecordTask(rec, keys[chosen], starts[chosen], stops[chosen], classes[chosen])

    about = {"source": "recordio", "from": scrub(rec)}
    new = NewDataset(out, found, task, about, [keys, starts, stops], options)
    return write_dataset(new, _samples, writing)


@dataclass
class _Records:
    """The image records of a file as columns, and what else the file holds."""

    rec: str
    keys: array[int] = field(default_factory=lambda: array("q"))
    starts: array[int] = field(default_factory=lambda: array("q"))
    stops: array[int] = field(default_factory=lambda: array("q"))
    labels: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    faults: list[Fault] = field(default_factory=list)
    header: list[float] | None = None
    identities: int = 0

    def column(self, name: str) -> Ints:
        """One of the columns as int64 `[N]`."""
        return np.frombuffer(getattr(self, name), np.int64)

    def add(self, key: int, frame: Frame, labels: list[float], size: int) -> None:
        """Take a record.

        Raises:
            BadRecordError: it is neither an image with a class nor an identity.
        """
        if size == 0 and len(labels) == 2:
            if frame.start == 0:
                self.header = labels
            else:
                self.identities += 1
            return
        if size == 0:
            raise BadRecordError("no image")
        label = class_of_labels(labels)
        row = (key, frame.start, frame.stop, label, size)
        for name, value in zip(("keys", "starts", "stops", "labels", "sizes"), row, strict=True):
            getattr(self, name).append(value)

    def require_any(self) -> None:
        """Refuse a file in which nothing was found but faults: it is of another kind."""
        if self.faults and not self.keys and not self.header and not self.identities:
            reason = self.faults[0].reason
            raise UserError(f"{self.rec}: is no RecordIO file ({reason}); {_RECORD_FILE}")


def _refuse_folder(rec: str) -> None:
    """Name the file to give in place of its folder."""
    if os.path.isdir(rec):
        names = sorted(name for name in os.listdir(rec) if name.endswith(".rec"))
        inside = [f"{rec.rstrip('/')}/{name}" for name in names]
        cure = f"give the file in it: {', '.join(inside)}" if inside else _RECORD_FILE
        raise UserError(f"{rec}: is a folder, and a file is needed; {cure}")


def _scan(reader: RangeReader, index: tuple[Ints, Ints] | None, progress: Progress) -> _Records:
    """Look at the head of every record."""
    records = _Records(reader.url)
    found = scan_frames(reader) if index is None else read_indexed_frames(reader, index[1])
    for number, frame in enumerate(found):
        key = number if index is None else int(index[0][number])
        try:
            if not isinstance(frame, Frame):
                raise frame[1]
            record, size = read_payload_head(reader, frame)
            records.add(key, frame, record.labels, size)
        except BadRecordError as error:
            start = frame.start if isinstance(frame, Frame) else frame[0]
            records.faults.append(Fault(_record_location(reader.url, key, start), str(error)))
        if number % _REPORT_EVERY == 0 and isinstance(frame, Frame):
            progress(frame.stop, reader.size)
    progress(reader.size, reader.size)
    return records


def _record_location(rec: str, key: int, start: int) -> str:
    return f"{rec.rpartition('/')[2]} record {key} at byte {start}"


class _RecordTask(NamedTuple):
    """Records that go into one tar, with their classes."""

    rec: str
    keys: Ints
    starts: Ints
    stops: Ints
    classes: Ints


def _samples(task: _RecordTask) -> Iterator[Sample | Fault]:
    with RangeReader(task.rec) as reader:
        for first in range(0, len(task.keys), _RECORDS_PER_REQUEST):
            part = slice(first, first + _RECORDS_PER_REQUEST)
            parts = reader.read_many(task.starts[part].tolist(), task.stops[part].tolist())
            for number, data in enumerate(parts, first):
                key, start = int(task.keys[number]), int(task.starts[number])
                try:
                    yield _sample(key, int(task.classes[number]), data)
                except BadRecordError as error:
                    yield Fault(_record_location(task.rec, key, start), str(error))


def _sample(key: int, label: int, data: bytes) -> Sample:
    """The sample of one record.

    Raises:
        BadRecordError: the record changed since it was found, or holds no image.
    """
    record = unpack_record(join_parts(data, read_frame(BytesInMemory(data), 0, len(data))))
    extension = image_extension(record.image)
    if extension is None:
        raise BadRecordError(describe_unknown_format(record.image))
    members = {extension: record.image, "cls": str(label).encode()}
    if len(record.labels) > 1:
        members["json"] = json.dumps({"labels": record.labels}).encode()
    return Sample(f"{key:09d}", members)


def _index_of(rec: str) -> tuple[Ints, Ints] | None:
    """The index beside a `.rec` file, if there is one."""
    url = f"{rec.removesuffix('.rec')}.idx"
    return read_record_index(url) if url_exists(url) else None


def _announced_classes(rec: str) -> int | None:
    """Number of classes by the `property` file (`num_classes,H,W`), if it is there and says so."""
    url = f"{rec.rpartition('/')[0] or '.'}/property"
    try:
        with fsspec.open(url, "rb") as stream:
            match = re.match(rb"\s*(\d{1,18})\s*,", stream.read(100))
    except OSError:
        return None
    return int(match[1]) if match else None


def _warnings(records: _Records, distinct: Ints, announced: int | None) -> list[str]:
    """A message for each pair of counts that do not agree."""
    warnings = []
    classes = len(distinct)
    if classes and max(int(distinct[-1]) + 1, records.identities, announced or 0) > EXACT_LABELS:
        warnings.append(
            f"labels are float32 in this format, which tells integers below {EXACT_LABELS:,} apart "
            f"only: classes above may have been merged when the file was written"
        )
    if records.identities and records.identities != classes:
        warnings.append(
            f"{records.identities:,} identity records, but the images have {classes:,} classes"
        )
    if announced is not None and announced != classes:
        warnings.append(f"property says {announced:,} classes, the images have {classes:,}")
    if records.header and records.header[0] < EXACT_LABELS:
        images, kept = int(records.header[0]) - 1, len(records.keys) + len(records.faults)
        if images != kept:
            warnings.append(f"the header announces {images:,} images, the file has {kept:,}")
    return warnings
