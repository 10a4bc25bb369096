"""Writes a folder of embeddings, part by part, in any number of processes and on any nodes.

What a part holds depends on its shards and the model alone: images are embedded in blocks of one
constant size that begin with the part, the last one padded, by one thread. So the bytes are the
same whatever works on them, and a part that is missing or damaged is made again by itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist.backbone.model import digest_model
from mhe_dist.distributed.device import rank_device
from mhe_dist.engine.settings import set_float_kernels
from mhe_dist.errors import RunError, UserError
from mhe_dist.sizes import format_mib
from pipelines.data.sequential import read_in_order
from pipelines.embedding.embeddings import BLOCK, block_embedder, normalize_embeddings
from pipelines.embedding.folder import (
    DTYPES,
    PART_ROWS,
    PLACES,
    EmbeddingsFolder,
    EmbeddingsPart,
    EmbeddingsRecipe,
    holds_rows,
    local_folder,
)
from pipelines.embedding.made_by import MadeBy
from pipelines.runs.trained import TrainedBackbone, load_trained_backbone
from pipelines.shards.index import INDEX_FILE, ShardIndex, index_exists
from pipelines.storage.staging import JOURNAL, Journal, lock_folder, remove_temporary_files
from pipelines.storage.unusable_path import describe_unusable_path
from pipelines.storage.urls import resolve_url, to_url
from pipelines.storage.worker_pool import HERE, LazyTasks, Progress, Workers, no_progress, run_tasks


class FolderOptions(NamedTuple):
    """How a data set is embedded.

    Attributes:
        flip: add the embedding of the mirrored image.
        normalize: scale the rows to length 1.
        dtype: `float32` or `float16`.
        gpu: workers compute on their GPU; otherwise on one thread of a CPU.
    """

    flip: bool = False
    normalize: bool = False
    dtype: str = "float32"
    gpu: bool = False


class PartTask(NamedTuple):
    """One part, for a process that need not know the others.

    Attributes:
        folder: where it is written; its manifest need not be there yet.
        shards: the part of the index.
        part: its rows; with the checksum that they should have, or an empty one.
        gpu: see `FolderOptions`.
    """

    folder: EmbeddingsFolder
    shards: ShardIndex
    part: EmbeddingsPart
    gpu: bool


def write_folder(
    run: str,
    source: str,
    out: str,
    options: FolderOptions,
    workers: Workers = HERE,
    progress: Progress = no_progress,
) -> EmbeddingsFolder:
    """Embed a set of shards into a folder; what is there already stays, after a look at its bytes.

    Args:
        run: see `load_trained_backbone`.
        source: folder or URL of the shards.
        out: the folder; all workers reach it under this path.
        options: how.
        workers: who embeds.
        progress: called with the finished parts and their number.

    Raises:
        UserError: there are no shards, the folder holds something else, or there is no room; before
            any worker starts.
        RunError: a sample cannot be used, or the disk is full.
    """
    out = local_folder(out)
    index, recipe = plan_folder(run, source, options)
    with _claimed(out, recipe) as folder:
        file = Path(folder.rows_path)
        written = file.stat().st_blocks * 512 if file.exists() else 0
        require_room(out, recipe.file_bytes - written)
        read_in_order(index, 0, 1, recipe.image_size)  # as a worker would, on some other node
        _make_file(folder)
        _write_parts(folder, index, options.gpu, workers, progress).save()
        shutil.rmtree(Path(out) / JOURNAL)
    return EmbeddingsFolder.open(out)


def plan_folder(
    run: str, source: str, options: FolderOptions
) -> tuple[ShardIndex, EmbeddingsRecipe]:
    """What is embedded, and how; see `write_folder`.

    Raises:
        UserError: there are no shards, or an option has no such value.
    """
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype}: choose {' or '.join(DTYPES)}")
    source = to_url(*resolve_url(source.rstrip("/")))
    index = _load_shards(source)
    return index, _recipe(load_trained_backbone(run), index, source, options)


def _load_shards(source: str) -> ShardIndex:
    if not index_exists(source):
        raise UserError(
            f"--images {source}: a folder of embeddings follows the index of shards, and there is "
            f"no {INDEX_FILE} here: make shards (mhe data folder --no-classes, mhe data index), or "
            "let --out end with .npz or .parquet"
        )
    index = ShardIndex.load(source)
    if not index.samples:
        raise UserError(f"{source}: holds no sample")
    return index


def _recipe(
    backbone: TrainedBackbone, index: ShardIndex, source: str, options: FolderOptions
) -> EmbeddingsRecipe:
    return EmbeddingsRecipe(
        source=source,
        index_digest=index.digest,
        **MadeBy.of(backbone, options.flip)._asdict(),
        normalize=options.normalize,
        dtype=options.dtype,
        samples=index.samples,
        dim=backbone.config.model.embedding_dim,
    )


@contextmanager
def _claimed(out: str, recipe: EmbeddingsRecipe) -> Iterator[EmbeddingsFolder]:
    """The folder, with what is known of its parts; no other process writes into it meanwhile.

    Raises:
        UserError: it holds something else, or another process is at it.
    """
    path = Path(out)
    if path.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    has_manifest = holds_rows(out)
    if not has_manifest and path.exists() and any(p.name[0] != "." for p in path.iterdir()):
        raise UserError(f"--out {out}: is a folder of something else; choose another one")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path / JOURNAL, out)
    except OSError as error:
        # The folder of mhe cluster and mhe audit is another option's, or has its name from --out.
        reason = describe_unusable_path(error) or f"{out}: cannot be written ({error})"
        raise UserError(reason) from error
    try:
        parts: Sequence[EmbeddingsPart] = []
        if has_manifest:
            found = EmbeddingsFolder.read(out)
            recipe.refuse_other(found.recipe, out)
            parts = found.parts
        remove_temporary_files(path)
        yield EmbeddingsFolder(out, recipe, parts)
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def require_room(folder: str, missing: int) -> None:
    """Raise UserError if the disk of a folder has no room for bytes that are not written yet."""
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"--out {folder}: {format_mib(missing)} are still to be written and "
            f"{format_mib(free)} are free: make room there or choose another --out; "
            "--dtype float16 takes half"
        )


def _make_file(folder: EmbeddingsFolder) -> None:
    """Make the file of the rows, or give it its size and header again; the manifest comes first."""
    folder.save()
    descriptor = os.open(folder.rows_path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, folder.recipe.file_bytes)
        os.pwrite(descriptor, folder.recipe.header, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_parts(
    folder: EmbeddingsFolder, index: ShardIndex, gpu: bool, workers: Workers, progress: Progress
) -> EmbeddingsFolder:
    """Make the parts that are missing; returns the folder with all of them."""
    known = {part.first: part for part in folder.parts}
    recipe = {k: v for k, v in asdict(folder.recipe).items() if k not in PLACES}
    journal = Journal(f"{folder.path}/{JOURNAL}/parts", recipe)
    starts, bounds = index.starts, part_bounds(index)
    for number in range(len(bounds) - 1):
        if (kept := journal.get(number)) is not None:
            known[kept[0]] = EmbeddingsPart(*kept)
    empty = replace(folder, parts=[])

    def _task(number: int) -> PartTask:
        begin, end = bounds[number : number + 2]
        first, stop = int(starts[begin]), int(starts[end])
        part, before = EmbeddingsPart(first, stop - first, ""), known.get(first)
        if before is not None and before.rows == part.rows:
            part = before
        return PartTask(empty, index.cut(begin, end), part, gpu)

    tasks = LazyTasks(len(bounds) - 1, _task)
    parts = run_tasks(make_part, tasks, workers, record=journal.record, progress=progress)
    return replace(folder, parts=parts)


def part_bounds(index: ShardIndex) -> list[int]:
    """The shards with which parts begin, and the number of shards."""
    bounds, first = [0], 0
    for shard in range(1, len(index.starts)):
        end = int(index.starts[shard])
        if end - first >= PART_ROWS or shard == len(index.shards):
            bounds.append(shard)
            first = end
    return bounds


def make_part(task: PartTask) -> EmbeddingsPart:
    """Write the rows of a part, unless they are there.

    Raises:
        RunError: a sample cannot be used, a number is too large for float16, or the checkpoint is
            not the one that the folder was begun with.
    """
    folder, part = task.folder, task.part
    if part.checksum and folder.checksum(part.first, part.rows) == part.checksum:
        return part
    recipe = folder.recipe
    embed = load_embedder(recipe.checkpoint, recipe.model_digest, recipe.flip, task.gpu)
    with _PartWriter(folder, part.first) as writer:
        for rows, _, _ in stored_blocks(task.shards, embed, recipe):
            writer.write(rows)
    return EmbeddingsPart(part.first, part.rows, writer.checksum)


class _PartWriter:
    """Writes the rows of a part in place, one after the other; they are on the disk at the end.

    Not through a map: where a disk is full that ends the process, and of a page that two nodes
    write to, a network file system keeps what one of them wrote.
    """

    def __init__(self, folder: EmbeddingsFolder, first: int) -> None:
        self._path, self._digest = folder.rows_path, hashlib.sha256()
        self._at = len(folder.recipe.header) + first * folder.recipe.row_bytes

    def __enter__(self) -> _PartWriter:
        with self._explained():
            self._descriptor = os.open(self._path, os.O_WRONLY)
        return self

    def __exit__(self, *_: object) -> None:
        with self._explained():
            try:
                os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)

    @property
    def checksum(self) -> str:
        """Of what was written."""
        return f"sha256:{self._digest.hexdigest()}"

    def write(self, rows: npt.NDArray[Any]) -> None:
        """Write the next rows."""
        data = memoryview(rows.tobytes())
        self._digest.update(data)
        while data:
            with self._explained():
                written = os.pwrite(self._descriptor, data, self._at)
            data, self._at = data[written:], self._at + written

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot be written ({error}); then the same command goes on"
            ) from error


def stored_blocks(
    shards: ShardIndex, embed: Callable[[Tensor], Tensor], recipe: EmbeddingsRecipe
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64], list[str]]]:
    """The rows of some shards, a block at a time, as they are stored; with labels and keys.

    Raises:
        RunError: a sample cannot be used, or a number is too large for float16.
    """
    side = recipe.image_size
    for start in range(0, shards.samples, BLOCK):
        stop = min(start + BLOCK, shards.samples)
        pixels = torch.zeros(BLOCK, 3, side, side, dtype=torch.uint8)
        images, labels, keys = read_in_order(shards, start, stop, side)
        pixels[: stop - start] = images
        rows: npt.NDArray[Any] = embed(pixels).cpu().numpy()[: stop - start]
        if recipe.normalize:
            rows = normalize_embeddings(rows)
        with np.errstate(over="ignore"):
            stored = rows.astype(recipe.stored)
        if recipe.dtype == "float16" and (np.isinf(stored) & np.isfinite(rows)).any():
            raise RunError(
                f"{shards.folder}: an embedding has a number beyond the range of float16; embed "
                "with --normalize, or with --dtype float32"
            )
        yield stored, labels.numpy(), keys


def load_embedder(
    checkpoint: str, model_digest: str, flip: bool, gpu: bool
) -> Callable[[Tensor], Tensor]:
    """The function of a block of images; on a CPU by one thread, whose bits no setting changes.

    Raises:
        RunError: the checkpoint has other weights than those of `model_digest`.
    """
    embed = block_embedder(_load(checkpoint, model_digest, gpu).embed, flip)

    def _on_one_thread(pixels: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return embed(pixels)
        finally:
            torch.set_num_threads(threads)

    return embed if gpu else _on_one_thread


@lru_cache(maxsize=1)
def _load(checkpoint: str, model_digest: str, gpu: bool) -> TrainedBackbone:
    """A backbone, which a process keeps for its next part.

    Raises:
        RunError: it is another one.
    """
    set_float_kernels("float32")
    backbone = load_trained_backbone(checkpoint, rank_device(gpu))
    if (digest := digest_model(backbone.model)) != model_digest:
        raise RunError(
            f"{checkpoint}: has weights {digest}, the embeddings were begun with {model_digest}: "
            "the checkpoint was changed"
        )
    return backbone
