"""Writes tars and their index: a data set appears whole under its name, or not at all."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import IO, Any, NamedTuple, TypeVar

from pipelines.shards.index import Fault, ShardIndex
from pipelines.shards.packing import pack_labels, pack_offsets
from pipelines.shards.shard import Shard
from pipelines.storage.staging import Staging
from pipelines.storage.urls import atomic_write
from pipelines.storage.worker_pool import HERE, LazyTasks, Progress, Workers, no_progress, run_tasks

T = TypeVar("T")


class Sample(NamedTuple):
    """One sample of a tar: a key, unique and without a dot, and its members by extension."""

    key: str
    members: dict[str, bytes]


class ShardWriter:
    """Writes a data set, tar after tar, then `finish`.

    It appears under its name when it is finished, and not before (see `Staging`). If the `with`
    block ends earlier, nothing is left behind without a recipe. With a recipe, finished tars are
    kept, and the next writer with the same target and recipe takes them as they are.

    Attributes:
        shards: the finished tars, in order.
        reused: how many of them an earlier attempt had finished.
    """

    def __init__(self, folder: str, prefix: str, recipe: Any | None = None) -> None:
        """Claim the target.

        Args:
            folder: path or URL of the data set, which must not exist.
            prefix: of the tars' names: `prefix-000000.tar` and so on.
            recipe: JSON-able; everything that decides what is in the tars.

        Raises:
            UserError: there is something at `folder` already, or an attempt with another recipe.
        """
        self._staging = Staging(folder, recipe)
        self._prefix = prefix
        self.shards: list[Shard] = []
        self._finished = False
        self.reused = 0

    @property
    def folder(self) -> str:
        """Where the files are now; the target, once it is finished."""
        return self._staging.folder

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            self._staging.abort()

    def mark_ended(self) -> None:
        """Note that every tar is written: if they are refused now, nothing was interrupted."""
        if self._staging.journal is not None:
            self._staging.journal.mark_ended()

    def write(self, samples: Iterable[Sample | Fault]) -> Shard:
        """Write the next tar; its samples keep their order.

        Raises:
            ValueError: a key that WebDataset would split or skip.
        """
        self.write_all(_unchanged, [samples])
        return self.shards[-1]

    def write_all(
        self,
        make: Callable[[T], Iterable[Sample | Fault]],
        tasks: Sequence[T],
        workers: Workers = HERE,
        progress: Progress = no_progress,
    ) -> list[Fault]:
        """Write one tar for each task.

        Args:
            make: the samples of a task; a function that can be imported. A sample that cannot be
                made is a `Fault` in its place.
            tasks: taken one by one, and only for tars that are not finished yet.
            workers: who writes.
            progress: called with the finished tars and their number.

        Returns:
            The faults, in the order of the tars.
        """
        first, journal = len(self.shards), self._staging.journal
        urls_ = [f"{self._prefix}-{first + i:06d}.tar" for i in range(len(tasks))]

        def finished(number: int) -> tuple[Shard, list[Fault]] | None:
            found = self._finished_before(first + number, urls_[number])
            self.reused += found is not None
            return found

        def record(number: int, result: tuple[Shard, list[Fault]]) -> None:
            if journal is not None:
                journal.record(first + number, [asdict(result[0]), result[1]])

        todo = LazyTasks(len(tasks), lambda n: (f"{self.folder}/{urls_[n]}", urls_[n], tasks[n]))
        made = run_tasks(partial(_make_tar, make), todo, workers, finished, record, progress)
        self.shards += [shard for shard, _ in made]
        return [fault for _, faults in made for fault in faults]

    def _finished_before(self, number: int, url: str) -> tuple[Shard, list[Fault]] | None:
        """The tar of an earlier attempt and its faults, if the file is still complete."""
        journal = self._staging.journal
        result = None if journal is None else journal.get(number)
        if result is None:
            return None
        shard = Shard(**result[0])
        if shard.url != url or self._staging.size(url) != shard.bytes:
            return None
        return shard, [Fault(*fault) for fault in result[1]]

    def finish(self, num_classes: int, meta: dict[str, Any] | None = None) -> ShardIndex:
        """Write the index, its columns first, and give the data set its final name."""
        ShardIndex(self.folder, num_classes, self.shards, meta or {}).save()
        self._staging.publish()
        self._finished = True
        return ShardIndex(self.folder, num_classes, self.shards, meta or {})


def _unchanged(samples: Iterable[Sample | Fault]) -> Iterable[Sample | Fault]:
    return samples


def _make_tar(
    make: Callable[[T], Iterable[Sample | Fault]], task: tuple[str, str, T]
) -> tuple[Shard, list[Fault]]:
    target, url, samples = task
    with atomic_write(target) as stream:
        return _write_tar(stream, url, make(samples))


class _HashingWriter(io.RawIOBase):
    """Counts and hashes what is written through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.bytes, self.hash = stream, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """See `io.RawIOBase`."""
        self.stream.write(data)
        self.hash.update(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes


def _write_tar(
    stream: IO[bytes], url: str, samples: Iterable[Sample | Fault]
) -> tuple[Shard, list[Fault]]:
    """Write one tar, the same bytes for the same samples, and describe it."""
    counted = _HashingWriter(stream)
    offsets, labels, faults = [0], [], []
    with tarfile.open(fileobj=counted, mode="w") as tar:
        for sample in samples:
            if isinstance(sample, Fault):
                faults.append(sample)
                continue
            if not sample.key or "." in sample.key or sample.key.startswith("__"):
                raise ValueError(f"{sample.key!r} cannot be the key of a WebDataset sample")
            for extension, data in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            offsets.append(tar.offset)
            labels.append(sample.members.get("cls", b""))
    known = all(label.isdigit() for label in labels)
    shard = Shard(
        url,
        len(labels),
        counted.bytes,
        f"sha256:{counted.hash.hexdigest()}",
        pack_offsets(offsets),
        pack_labels(int(label) for label in labels) if known else "",
    )
    return shard, faults
