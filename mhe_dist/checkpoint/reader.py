"""One complete checkpoint: what it holds, and loading some or all of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mhe_dist.checkpoint.files import RUN, SCORES, CheckpointFolder
from mhe_dist.checkpoint.step_folder import describe_missing_step, describe_siblings, step_of
from mhe_dist.errors import RunError, UserError


class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: URL of its folder.
        step: its step.
    """

    def __init__(self, path: str, step: int) -> None:
        self.path = path
        self.step = step

    @cached_property
    def run(self) -> dict[str, Any]:
        """What was given to `save` as `run`."""
        return CheckpointFolder(self.path).read_json(RUN)

    @property
    def scores(self) -> dict[str, float]:
        """Those of `read_scores`; empty also where they cannot be read now."""
        with suppress(Exception):  # stores raise what they like
            return self.read_scores()
        return {}

    def read_scores(self) -> dict[str, float]:
        """Figures of the evaluation of this model; empty: it was not evaluated.

        They are in `run`, or in a file of their own when a resumed run evaluated.

        Raises:
            OSError, and what else a store raises: they cannot be read, perhaps for the moment.
        """
        if scores := self.run.get("scores"):
            return scores
        try:
            return CheckpointFolder(self.path).read_json(SCORES)
        except (FileNotFoundError, ValueError):
            return {}

    def names(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every tensor."""
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @cached_property
    def _metadata(self) -> Any:
        return FsspecReader(self.path).read_metadata()

    def first_damaged_tensor(self, names: Iterable[str]) -> str | None:
        """The first of some tensors that is not as it was written, in words; None: there is none.

        Their bytes alone are read. Each tensor is stored as `torch.save` writes it: a zip, which
        has a CRC-32 of each of its parts.
        """
        folder = CheckpointFolder(self.path)
        stored = {index.fqn: info for index, info in self._metadata.storage_data.items()}
        for name in names:
            info = stored[name]
            end = info.offset + info.length
            if fault := folder.find_fault_of_zip(info.relative_path, info.offset, end):
                return f"{name} in {info.relative_path} {fault}"
        return None

    def load(self, select: Callable[[str], bool]) -> dict[str, Tensor]:
        """Tensors on the host, of the names that `select` accepts; no other bytes are read.

        Each rank may load other names; none waits for another.

        Raises:
            RunError: the files cannot be read.
        """
        tensors = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in self.names().items()
            if select(name)
        }
        try:
            # With collectives DCP would ask all ranks to load the same names.
            dcp.load(tensors, storage_reader=FsspecReader(self.path), no_dist=True)
        except dcp.CheckpointException as error:
            for cause, _ in error.failures.values():
                if not isinstance(cause, Exception):  # Ctrl-C is no damage of the files
                    raise cause from None
            raise RunError(f"{self.path}: {first_failure(error)}") from error
        return tensors


def open_step_folder(url: str) -> Checkpoint:
    """The checkpoint that a `step_*` folder is, if its files have the sizes of its manifest.

    Raises:
        UserError: there is none, or it is not complete; names those beside it.
    """
    url = url.rstrip("/")
    if missing := describe_missing_step(url):
        raise UserError(missing)
    if isinstance(reason := CheckpointFolder(url).manifest(), str):
        raise UserError(f"{url} is not a complete checkpoint: {reason}; {describe_siblings(url)}")
    step = step_of(url)
    assert step is not None, "the caller has looked"
    return Checkpoint(url, step)


def first_failure(error: BaseException) -> str:
    """One line of an error; of DCP's, which quotes every rank's traceback, the first cause."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    if isinstance(error, RunError):  # rank 0's message
        return str(error)
    return f"{type(error).__name__}: {error}"
