"""What all sources share: classes in `[0, C)`, a global shuffle, shards of equal size, reports.

A source finds its samples first, as columns of numbers, and writes them afterwards, tar by tar in
any number of processes. Its samples are shuffled over the whole data set, because data sets come
sorted by class and a window of a stream would see few of them.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import RunError, UserError
from pipelines.shards.index import Fault, ShardIndex
from pipelines.shards.tables import CLASSES_FILE, Table, class_table, skipped_table, write_table
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.storage.full_disk import explain_full_disk
from pipelines.storage.worker_pool import HERE, Progress, Workers, no_progress

Ints = npt.NDArray[np.int64]
T = TypeVar("T")

_VERSION: Final = 1  # of the way in which samples become tars
_BLOCK: Final = 512
_AT_ONCE: Final = 1 << 16  # samples that are computed with together
_SHOWN: Final = 3  # faults that a message names


class ImportOptions(NamedTuple):
    """How a data set is written.

    Attributes:
        shard_bytes: about how large a tar is.
        shuffle: in a random order, the same one each time; otherwise as the source has them.
        workers: who writes.
        max_bad: largest share of samples that may be left out because they are bad.
    """

    shard_bytes: int = 128 << 20
    shuffle: bool = True
    workers: Workers = HERE
    max_bad: float = 0.01


DEFAULT_OPTIONS: Final = ImportOptions()


class FoundSamples(NamedTuple):
    """The samples of a source.

    Attributes:
        names: of the classes, by class; each has a sample.
        classes: integers `[N]`, the class of each sample.
        sizes: integers `[N]`, bytes of its image.
        faults: samples that had to be left out.
        warnings: messages for the user.
    """

    names: Sequence[str]
    classes: npt.NDArray[Any]
    sizes: npt.NDArray[Any]
    faults: list[Fault]
    warnings: list[str]


@dataclass(frozen=True)
class ImportResult:
    """The index of a finished data set, what was left out of it, and messages for the user."""

    index: ShardIndex
    faults: list[Fault]
    warnings: list[str]
    notes: list[str] = field(default_factory=list)


class TarTasks(Sequence[T]):
    """The task of each tar, made when it is needed."""

    def __init__(self, order: Ints, bounds: Ints, task: Callable[[Ints], T]) -> None:
        """Args: samples in order; where the tars begin, and the end; from samples to a task."""
        self._order, self._bounds, self._task = order, bounds, task

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, number: Any) -> Any:
        return self._task(self._order[self._bounds[number] : self._bounds[number + 1]])


@dataclass(frozen=True)
class NewDataset(Generic[T]):
    """A data set that is to be written.

    Attributes:
        out: folder or URL, which must not exist.
        found: the samples.
        task: from the numbers of some samples, in order, to what makes them.
        about: for the index; with the columns it is the recipe.
        columns: whatever else decides the content, one row per sample.
        options: how to write.
        tables: more files beside the tars.
    """

    out: str
    found: FoundSamples
    task: Callable[[Ints], T]
    about: dict[str, Any]
    columns: Iterable[Ints] = ()
    options: ImportOptions = DEFAULT_OPTIONS
    tables: Mapping[str, Table] = field(default_factory=dict)

    def cut(self) -> TarTasks[T]:
        """The tasks of its tars."""
        found = self.found
        order = _order(len(found.classes), self.options.shuffle, self.about["source"])
        bounds = _tar_bounds(found.sizes, order, self.options.shard_bytes)
        return TarTasks(order, bounds, self.task)

    def recipe(self) -> dict[str, Any]:
        """Everything that decides what is in its tars."""
        return self.about | {
            "version": _VERSION,
            "shuffle": self.options.shuffle,
            "shard_bytes": self.options.shard_bytes,
            "samples": digest_columns([self.found.classes, self.found.sizes, *self.columns]),
        }


def write_dataset(
    new: NewDataset[T],
    make: Callable[[T], Iterable[Sample | Fault]],
    progress: Progress = no_progress,
) -> ImportResult:
    """Write the samples that a source found as a data set; see `write_datasets`."""
    return write_datasets([new], make, progress)[0]


def write_datasets(
    sets: Sequence[NewDataset[T]],
    make: Callable[[T], Iterable[Sample | Fault]],
    progress: Progress = no_progress,
) -> list[ImportResult]:
    """Write data sets that appear together, the last one last.

    Args:
        sets: what to write.
        make: the samples of a task; an importable function.
        progress: called with the finished tars and their number, of all sets.

    Raises:
        UserError: a target exists, or there is no sample.
        RunError: too many samples of a set are bad.
    """
    samples = sum(len(new.found.classes) for new in sets)
    max_bad = max(new.options.max_bad for new in sets)
    check_bad_fraction([fault for new in sets for fault in new.found.faults], samples, max_bad)
    for new in sets:
        if not len(new.found.classes):
            raise UserError(f"{new.about['from']}: no image here")
    tars = [new.cut() for new in sets]
    total = sum(map(len, tars))
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(new.out, new.about["source"], new.recipe()))
            for new in sets
        ]
        faults: list[list[Fault]] = []
        for number, (new, writer) in enumerate(zip(sets, writers, strict=True)):
            before = sum(map(len, tars[:number]))

            def finished(done: int, _: int, before: int = before) -> None:
                progress(before + done, total)

            with _explain_full_disk(new, writer, len(tars[number])):
                later = writer.write_all(make, tars[number], new.options.workers, finished)
                samples -= len(later)
                faults.append([*new.found.faults, *later])
                _write_tables(new, writer, faults[number])
        for writer in writers:
            writer.mark_ended()
        check_bad_fraction([fault for each in faults for fault in each], samples, max_bad)
        return [
            ImportResult(_finish(new, writer, left_out), left_out, new.found.warnings)
            for new, writer, left_out in zip(sets, writers, faults, strict=True)
        ]


def _explain_full_disk(
    new: NewDataset[Any], writer: ShardWriter, tars: int
) -> AbstractContextManager[None]:
    expected = _total_bytes(new.found.sizes) + tars * tarfile.RECORDSIZE
    return explain_full_disk(new.out, writer.folder, expected)


def _write_tables(new: NewDataset[Any], writer: ShardWriter, faults: Sequence[Fault]) -> None:
    classes = class_table(new.found.names, writer.shards)
    tables = {**new.tables, CLASSES_FILE: classes, **skipped_table(faults)}
    for name, table in tables.items():
        write_table(f"{writer.folder}/{name}", table)


def _finish(new: NewDataset[Any], writer: ShardWriter, faults: Sequence[Fault]) -> ShardIndex:
    meta = new.about | {"class_names": CLASSES_FILE, "skipped": len(faults)}
    with _explain_full_disk(new, writer, len(writer.shards)):
        return writer.finish(len(new.found.names), meta)


def describe_unknown_format(data: bytes) -> str:
    """Why bytes are no image, in words."""
    return f"no image of a known format (it begins with {data[:8]!r})" if data else "0 bytes long"


def check_bad_fraction(
    faults: Sequence[Fault], good: int, max_bad: float, unnamed: int = 0
) -> None:
    """Raise RunError, which names the first faults, if a larger share than `max_bad` is bad.

    Args:
        faults: the bad samples that are known by name.
        good: number of the others.
        max_bad: the largest share of bad ones.
        unnamed: number of further bad ones.
    """
    bad = len(faults) + unnamed
    if bad <= max_bad * (bad + good):
        return
    named = "\n".join(f"  {fault.location}: {fault.reason}" for fault in faults[:_SHOWN])
    raise RunError(
        f"{bad} of {bad + good} samples are bad, more than --max-bad {max_bad:g} "
        f"allows; the first of them:\n{named}"
    )


def require_two_classes(source: str, names: Sequence[str], cure: str) -> None:
    """Raise UserError, which ends with the cure, if all images of a source are in one class."""
    if len(names) == 1:
        raise UserError(
            f"{source}: its images are all of one class, {names[0]!r}, and a classifier needs two; "
            f"{cure}"
        )


def dense_classes(values: Ints) -> tuple[Ints, Ints]:
    """The distinct values in order, and for each value its number among them: a class."""
    distinct = np.unique(values)  # its own numbers of the values would take four times as much
    return distinct, np.searchsorted(distinct, values).astype(np.int64, copy=False)


def _order(count: int, shuffle: bool, source: str) -> Ints:
    if not shuffle:
        return np.arange(count)
    # They import torch, which the processes that write have no use for.
    from mhe_dist.seeds import generator
    from pipelines.data.order import stable_permutation

    return stable_permutation(count, generator(0, f"{source}/shuffle"))


def _tar_bounds(sizes: npt.NDArray[Any], order: Ints, shard_bytes: int) -> Ints:
    """Where to cut samples of these sizes, in an order, for equal tars: int64 `[tars + 1]`."""
    total = _total_bytes(sizes)
    tars = max(1, min(len(sizes), round(total / shard_bytes)))
    wanted = total * np.arange(1, tars) / tars
    inner, end = np.zeros(len(wanted), np.int64), 0
    for start in range(0, len(sizes), _AT_ONCE):
        ends = end + np.cumsum(_tar_bytes(sizes[order[start : start + _AT_ONCE]]))
        inner += np.searchsorted(ends, wanted)
        end = ends[-1]
    return np.unique(np.concatenate([[0], inner, [len(sizes)]])).astype(np.int64)


def _total_bytes(sizes: npt.NDArray[Any]) -> int:
    """What all of them take in tars."""
    starts = range(0, len(sizes), _AT_ONCE)
    return sum(int(_tar_bytes(sizes[start : start + _AT_ONCE]).sum()) for start in starts)


def _tar_bytes(sizes: npt.NDArray[Any]) -> Ints:
    """What images of these sizes take in a tar: two headers, image and label in whole blocks."""
    return 3 * _BLOCK + -(-sizes.astype(np.int64) // _BLOCK) * _BLOCK


def digest_texts(texts: Iterable[str]) -> str:
    """A digest of texts, for a recipe."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def digest_columns(columns: Iterable[npt.NDArray[Any]]) -> str:
    """A digest of columns of numbers, for a recipe."""
    digest = hashlib.sha256()
    for column in columns:
        for start in range(0, len(column), _AT_ONCE):
            part = column[start : start + _AT_ONCE]
            digest.update(np.ascontiguousarray(part, "<i8").tobytes())
    return digest.hexdigest()
