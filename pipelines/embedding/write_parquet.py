"""Writes a folder of Parquet files of embeddings, in any number of processes and on any nodes.

A file is a part: the rows of some whole shards, in the order of the index, with key and class. The
parts are those of `write_folder`, and so are the rows, bit for bit. The folder appears when all are
there; what is finished is kept for the same command.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.data.mixture.class_list import names_of
from pipelines.embedding.embed import as_parquet_table
from pipelines.embedding.folder import PLACES, EmbeddingsRecipe
from pipelines.embedding.write_folder import (
    FolderOptions,
    load_embedder,
    part_bounds,
    plan_folder,
    require_room,
    stored_blocks,
)
from pipelines.shards.index import UNLABELLED, ShardIndex
from pipelines.storage.staging import Staging
from pipelines.storage.urls import atomic_write, is_local_url, resolve_url
from pipelines.storage.worker_pool import HERE, LazyTasks, Progress, Workers, no_progress, run_tasks

_GROUP: Final = 64  # blocks of a row group: 8,192 rows


class ParquetFolder(NamedTuple):
    """What was written: path or URL, number of files, of rows and of their numbers."""

    path: str
    files: int
    rows: int
    dim: int


class ParquetTask(NamedTuple):
    """One file.

    Attributes:
        path: of the file.
        recipe: what it holds.
        shards: the part of the index.
        is_labelled: whether its samples have classes.
        gpu: see `FolderOptions`.
    """

    path: str
    recipe: EmbeddingsRecipe
    shards: ShardIndex
    is_labelled: bool
    gpu: bool


def write_parquet_folder(
    run: str,
    source: str,
    out: str,
    options: FolderOptions,
    workers: Workers = HERE,
    progress: Progress = no_progress,
) -> ParquetFolder:
    """Embed a set of shards into a new folder of files `part-000000.parquet` and so on.

    Each has the columns `key`, `class` and `vector`.

    Args:
        run, source, options, workers, progress: see `write_folder`.
        out: path or URL of the folder; all workers reach it.

    Raises:
        UserError: there are no shards, the folder is there, an attempt at it was of something else,
            or there is no room; before any worker starts.
        RunError: a sample cannot be used.
    """
    index, recipe = plan_folder(run, source, options)
    made_of = {k: v for k, v in asdict(recipe).items() if k not in PLACES}
    staging, bounds = Staging(out, {"parquet": made_of}), part_bounds(index)
    try:
        if is_local_url(out):
            written = sum(file.stat().st_size for file in Path(staging.folder).glob("*.parquet"))
            require_room(staging.folder, recipe.file_bytes - written)
        _write_parts(staging, index, bounds, recipe, options.gpu, workers, progress)
    except BaseException:
        staging.abort()
        raise
    staging.publish()
    return ParquetFolder(out, len(bounds) - 1, recipe.samples, recipe.dim)


def _write_parts(
    staging: Staging,
    index: ShardIndex,
    bounds: list[int],
    recipe: EmbeddingsRecipe,
    gpu: bool,
    workers: Workers,
    progress: Progress,
) -> None:
    journal = staging.journal
    assert journal is not None  # there is a recipe
    is_labelled = not index.meta.get(UNLABELLED)

    def _name(number: int) -> str:
        return f"part-{number:06d}.parquet"

    def _task(number: int) -> ParquetTask:
        path = f"{staging.folder}/{_name(number)}"
        return ParquetTask(path, recipe, index.cut(*bounds[number : number + 2]), is_labelled, gpu)

    def _finished(number: int) -> int | None:
        size = journal.get(number)
        return size if size is not None and staging.size(_name(number)) == size else None

    tasks = LazyTasks(len(bounds) - 1, _task)
    run_tasks(make_file, tasks, workers, _finished, journal.record, progress)


def make_file(task: ParquetTask) -> int:
    """Write the file of a part; its bytes.

    Raises:
        RunError: a sample cannot be used, a number is too large for float16, or the checkpoint is
            not the one that the folder was begun with.
    """
    from pyarrow import parquet

    with atomic_write(task.path) as stream:
        writer = None
        for table in _row_groups(task):
            if writer is None:
                writer = parquet.ParquetWriter(stream, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    filesystem, path = resolve_url(task.path)
    return int(filesystem.size(path))


def _row_groups(task: ParquetTask) -> Iterator[Any]:
    """The tables of some blocks each; memory is that of one."""
    recipe, source = task.recipe, task.shards.folder
    embed = load_embedder(recipe.checkpoint, recipe.model_digest, recipe.flip, task.gpu)
    names = _PartNames(task)
    left = stored_blocks(task.shards, embed, recipe)
    while blocks := list(islice(left, _GROUP)):
        rows, labels, keys = zip(*blocks, strict=True)
        every = [key for each in keys for key in each]
        classes = names.of(np.concatenate(labels)) if task.is_labelled else [""] * len(every)
        yield as_parquet_table(source, every, classes, np.concatenate(rows), recipe.made_by)


class _PartNames:
    """Names of the classes of a part, and of no others.

    The file of names may be large and far away: it is read once, where the index has the labels.
    """

    def __init__(self, task: ParquetTask) -> None:
        self._source = task.shards.folder
        self._names: dict[int, str] = {}
        self._read: set[int] = set()
        if task.is_labelled:
            known = (shard.labels for shard in task.shards.shards)
            self._find({number for part in known if part is not None for number in part.tolist()})

    def of(self, labels: npt.NDArray[np.int64]) -> list[str]:
        """The name of the class of each sample; its number, where it has none."""
        numbers = labels.tolist()
        self._find(set(numbers) - self._read)
        return [self._names.get(number, str(number)) for number in numbers]

    def _find(self, numbers: set[int]) -> None:
        if numbers:
            self._names |= names_of(self._source, numbers)
            self._read |= numbers
