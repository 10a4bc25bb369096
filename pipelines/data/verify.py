"""Reads a whole data set as training would, and reports what is wrong with it.

Every tar is read from front to back: its size and checksum against the index, then each sample's
name, label and image, which is decoded completely. Images that are the same, byte for byte, are
found by a digest over all tars.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import RunError
from pipelines.data.decode import ImageDecodeError, decode_image
from pipelines.data.sample import BadSampleError, EncodedSample, extract_sample, read_sample
from pipelines.shards.index import ShardIndex
from pipelines.shards.packing import pack_labels, unpack_labels
from pipelines.storage.staging import Journal
from pipelines.storage.urls import RetryingStream, open_stream
from pipelines.storage.worker_pool import (
    HERE,
    LazyTasks,
    Progress,
    Workers,
    no_progress,
    run_tasks,
)

Ints = npt.NDArray[np.int64]

_CHUNK: Final = 1 << 23
_SAMPLES_PER_READ: Final = 128  # samples that are in memory together
_SIDE: Final = 32  # JPEG is read completely, and computed at a scale near this
_DIGEST: Final = 16
_BAD: Final = -1  # the label of a sample that cannot be used
_LISTED: Final = 1000  # problems of one kind in one tar, and duplicates, that are named


class DataProblem(NamedTuple):
    """Something wrong.

    Attributes:
        kind: `shard`, `column`, `sample`, `image`, `label` or `duplicate`.
        location: of a shard or a sample.
        reason: what is wrong.
    """

    kind: str
    location: str
    reason: str


class DatasetReport(NamedTuple):
    """What a data set holds, and what is wrong with it.

    Attributes:
        data: the data set.
        problems: those that are named.
        counts: kind -> problems, named or not.
        per_class: int64 `[C]`, usable images of each class.
        repeated: images that are in their class already.
    """

    data: ShardIndex
    problems: list[DataProblem]
    counts: dict[str, int]
    per_class: Ints
    repeated: int

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.counts


def verify_dataset(
    index: ShardIndex,
    journal: Journal,
    workers: Workers = HERE,
    progress: Progress = no_progress,
) -> DatasetReport:
    """Read a whole data set and report its problems.

    Args:
        index: the data set.
        journal: of this data set; finished tars are not read again.
        workers: who reads.
        progress: called with the finished tars and their number.
    """
    tasks = LazyTasks(len(index.shards), lambda number: index.cut(number, number + 1))
    ordered = run_tasks(verify_shard, tasks, workers, journal.get, journal.record, progress)
    problems = [DataProblem(*problem) for result in ordered for problem in result["problems"]]
    counts: Counter[str] = Counter()
    for result in ordered:
        counts.update(result["counts"])
    for column in index.columns:
        if fault := column.find_fault():
            counts["column"] += 1
            problems.append(DataProblem("column", column.url, f"is {fault}"))
    labels = np.concatenate([_labels(result) for result in ordered] or [np.empty(0, np.int64)])
    digests = np.concatenate([_digests(result) for result in ordered] or [np.empty((0, 2), "<u8")])
    mixed, repeated = find_duplicates(digests, labels)
    if len(mixed):
        counts["duplicate"] = len(mixed)
        problems += [_duplicate_problem(index, labels, pair) for pair in mixed[:_LISTED].tolist()]
    per_class = np.bincount(labels[labels != _BAD], minlength=index.num_classes).astype(np.int64)
    return DatasetReport(index, problems, dict(counts), per_class, repeated)


def _labels(result: dict[str, Any]) -> Ints:
    return unpack_labels(result["labels"], result["samples"])


def _digests(result: dict[str, Any]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(base64.b64decode(result["digests"]), "<u8").reshape(-1, 2)


def find_duplicates(digests: npt.NDArray[np.uint64], labels: Ints) -> tuple[Ints, int]:
    """Images that are equal.

    Args:
        digests: `[N, 2]`, equal for equal images.
        labels: `[N]`, -1 for samples without an image.

    Returns:
        int64 `[n, 2]`, pairs of samples that are equal and in different classes, one pair for each
        further class; and the number of images that are in their class already.
    """
    usable = np.flatnonzero(labels != _BAD)
    order = usable[np.lexsort((usable, labels[usable], digests[usable, 1], digests[usable, 0]))]
    same = (digests[order[1:]] == digests[order[:-1]]).all(1)
    differs = labels[order[1:]] != labels[order[:-1]]
    pairs = np.stack([order[:-1], order[1:]], 1)[same & differs]
    return np.sort(pairs, 1), int((same & ~differs).sum())


def _duplicate_problem(index: ShardIndex, labels: Ints, pair: tuple[int, int]) -> DataProblem:
    one, other = (_sample_name(index, number) for number in pair)
    classes = [int(labels[number]) for number in pair]
    return DataProblem(
        "duplicate", one, f"class {classes[0]}; the same in class {classes[1]}: {other}"
    )


def _sample_name(index: ShardIndex, number: int) -> str:
    """The name of a sample in messages, with its key."""
    location = index.sample_name(*index.locate(number))
    try:
        return f"{location} ({read_sample(index, number).key})"
    except (RunError, BadSampleError):
        return location


def verify_shard(index: ShardIndex) -> dict[str, Any]:
    """Read the only tar of an index; returns the result as JSON-able values."""
    found = _ShardFindings(index)
    shard, url = index.shards[0], index.url(0)
    digest, size = hashlib.sha256(), 0
    try:
        with open_stream(url) as stream:
            for data in _checked_bytes(stream, shard.offsets, found):
                digest.update(data)
                size += len(data)
    except FileNotFoundError:
        found.add("shard", url, "is missing")
        return found.result()
    if size != shard.bytes:
        found.add("shard", url, f"has {size} bytes, the index says {shard.bytes}")
    elif f"sha256:{digest.hexdigest()}" != shard.checksum:
        found.add("shard", url, "its checksum is not that of the index: it was changed or damaged")
    return found.result()


def _checked_bytes(stream: RetryingStream, offsets: Ints, found: _ShardFindings) -> Iterator[bytes]:
    """All bytes of a tar in order; its samples are checked on the way."""
    yield stream.read(int(offsets[0]))
    for first in range(0, len(offsets) - 1, _SAMPLES_PER_READ):
        bounds = offsets[first : first + _SAMPLES_PER_READ + 1] - offsets[first]
        data = stream.read(int(bounds[-1]))
        yield data
        for number, (start, stop) in enumerate(pairwise(bounds.tolist()), first):
            found.check_sample(number, memoryview(data)[start:stop], stop - start)
    while data := stream.read(_CHUNK):
        yield data


class _ShardFindings:
    """What has been found in a tar."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._problems: list[DataProblem] = []
        self._counts: Counter[str] = Counter()
        samples = index.shards[0].samples
        self._labels = np.full(samples, _BAD, np.int64)
        self._digests = np.zeros((samples, 2), "<u8")

    def add(self, kind: str, location: str, reason: str) -> None:
        """Count a problem, and keep it by name unless there are too many of its kind."""
        self._counts[kind] += 1
        if self._counts[kind] <= _LISTED:
            self._problems.append(DataProblem(kind, location, reason))

    def check_sample(self, number: int, raw: memoryview, length: int) -> None:
        """Check one sample."""
        location = self._index.sample_name(0, number)
        try:
            encoded = extract_sample(
                raw, length, self._index.num_classes, self._index.entry(0, number)
            )
        except BadSampleError as error:
            self.add("sample", location, str(error))
            return
        location = f"{location} ({encoded.key})"
        self._check_label(number, location, encoded)
        if encoded.key.startswith("/") or ".." in encoded.key.split("/"):
            self.add("sample", location, "its name leaves the folder")
        try:
            decode_image(encoded.data, _SIDE)
        except ImageDecodeError as error:
            self.add("image", location, str(error))
            return
        if not 0 <= encoded.label < self._index.num_classes:
            return
        self._labels[number] = encoded.label
        digest = hashlib.blake2b(encoded.data, digest_size=_DIGEST).digest()
        self._digests[number] = np.frombuffer(digest, "<u8")

    def _check_label(self, number: int, location: str, encoded: EncodedSample) -> None:
        label = self._index.shards[0].label(number)
        if label is not None and label != encoded.label:
            self.add("label", location, f"{encoded.label}, the index says {label}")
        if not 0 <= encoded.label < self._index.num_classes:
            self.add("label", location, f"{encoded.label} is not in [0, {self._index.num_classes})")

    def result(self) -> dict[str, Any]:
        """See `verify_shard`."""
        return {
            "samples": len(self._labels),
            "problems": self._problems,
            "counts": dict(self._counts),
            "labels": pack_labels(self._labels.tolist()),
            "digests": base64.b64encode(self._digests.tobytes()).decode(),
        }
