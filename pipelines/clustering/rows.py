"""Embeddings of a file, read part by part as rows of length 1; the file's pages do not stay."""

from __future__ import annotations

import mmap
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.shards.index import ShardIndex
from pipelines.storage.urls import is_local_url

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_GATHERED: Final = 512  # scattered rows whose pages, and those around them, are mapped together


class UnitRows:
    """The embeddings of a data set as directions.

    Attributes:
        count: N.
        dim: D.
    """

    def __init__(self, matrix: npt.NDArray[Any], mean: Rows | None = None) -> None:
        """Nothing is read yet.

        Args:
            matrix: floating point `[N, D]`, usually memory-mapped.
            mean: float32 `[D]`, subtracted from the rows of length 1, which are scaled again.
        """
        self._matrix, self._mean = matrix, mean
        self.count, self.dim = matrix.shape

    def centered(self, mean: Rows) -> UnitRows:
        """The same embeddings with a mean direction that is subtracted."""
        return UnitRows(self._matrix, mean)

    def read(self, start: int, stop: int) -> Rows:
        """Float32 `[stop - start, D]` of consecutive images; see `gather`."""
        rows = np.array(self._matrix[start:stop], np.float32)
        release_pages(self._matrix)
        return self._directions(rows)

    def gather(self, numbers: Ints) -> Rows:
        """Float32 `[n, D]` of the images with these numbers, of length 1.

        A row that is zero or not finite has no direction: it is zero.
        """
        rows = np.empty((len(numbers), self.dim), np.float32)
        for start in range(0, len(numbers), _GATHERED):
            stop = start + _GATHERED
            rows[start:stop] = self._matrix[numbers[start:stop]]
            release_pages(self._matrix)
        return self._directions(rows)

    def _directions(self, rows: Rows) -> Rows:
        _scale(rows)
        if self._mean is not None:
            broken = ~rows.any(axis=1)
            rows -= self._mean
            rows[broken] = 0.0
            _scale(rows)
        return rows


def _scale(rows: Rows) -> None:
    """Scale each row to length 1, in place."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    broken = ~np.isfinite(norms) | (norms == 0)
    norms[broken] = 1.0
    rows /= norms[:, None]
    rows[broken] = 0.0


def release_pages(array: npt.NDArray[Any]) -> None:
    """Let go of the pages of a memory-mapped file that this process has read; their content stays.

    Without this they count as memory of the process until the machine runs short of it.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def refuse_remote_target(target: str, made: str) -> None:
    """Raise a UserError if a folder is not on this machine.

    Args:
        target: what `--out` names.
        made: what is made there, in words.
    """
    if not is_local_url(target):
        raise UserError(
            f"--out {target}: {made} made in files of this machine; name a folder here, "
            "and copy it when it is finished"
        )


def refuse_other_rows(index: ShardIndex, rows: npt.NDArray[Any]) -> None:
    """Raise a UserError if there is not one embedding for each image."""
    if len(rows) != index.samples:
        raise UserError(
            f"{len(rows):,} embeddings for the {index.samples:,} images of {index.folder}: "
            "they are of another data set"
        )
