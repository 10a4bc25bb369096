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
from mhe_dist.checkpoint.tensor_reader import StoredTensor, read_tensors
from mhe_dist.distributed.collectives import broadcast
from mhe_dist.distributed.failures import failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from mhe_dist.storage_retry import until_answered


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
        return until_answered(lambda: FsspecReader(self.path).read_metadata(), self.path)

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        """Name -> where the tensor lies."""
        items = self._metadata.storage_data.items()
        return {
            index.fqn: StoredTensor(
                info.relative_path, info.offset, info.offset + info.length, index.fqn
            )
            for index, info in items
        }

    def first_damaged_tensor(self, names: Iterable[str]) -> str | None:
        """The first of some tensors that is not as it was written, in words; None: there is none.

        Their bytes alone are read. Each tensor is stored as `torch.save` writes it: a zip, which
        has a CRC-32 of each of its parts.
        """
        folder = CheckpointFolder(self.path)
        for name in names:
            stored = self._stored[name]
            if fault := folder.find_fault_of_zip(stored.file, stored.begin, stored.end):
                return f"{name} in {stored.file} {fault}"
        return None

    def load(self, select: Callable[[str], bool]) -> dict[str, Tensor]:
        """Tensors on the host, of the names that `select` accepts; no other bytes are read.

        Each rank may load other names; none waits for another.

        Raises:
            StorageUnavailable: the disk or the store gives no answer.
            RunError: the files do not hold what the checkpoint says.
        """
        expected = {name: about for name, about in self.names().items() if select(name)}
        wanted = (self._stored[name] for name in expected)
        tensors: dict[str, Tensor] = {}
        for name, tensor in read_tensors(CheckpointFolder(self.path), wanted):
            if (tuple(tensor.shape), tensor.dtype) != expected[name]:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise RunError(f"{self.path}: {name} is {found}, unlike the checkpoint says")
            tensors[name] = tensor
        return {name: tensors[name] for name in expected}

    def load_together(self, select: Callable[[str], bool], topology: Topology) -> dict[str, Tensor]:
        """What `load` gives, on all ranks, which must call with the same names.

        Each reads a share of the bytes, as they follow one another in the files, and sends it to
        the others: the store is asked once for each byte, not once by each rank.

        Raises:
            StorageUnavailable, RunError: see `load`; on all ranks.
        """
        with failing_together(topology):
            readers = self._readers(select, topology.world_size)
            mine = self.load(lambda name: readers.get(name) == topology.rank)
        tensors: dict[str, Tensor] = {}
        for name, (shape, dtype) in self.names().items():
            if name in readers:
                own = mine.pop(name, None)
                tensors[name] = torch.empty(shape, dtype=dtype) if own is None else own.contiguous()
                broadcast(tensors[name], readers[name], topology)
        return tensors

    def _readers(self, select: Callable[[str], bool], ranks: int) -> dict[str, int]:
        """Name -> the rank that reads it, such that the bytes are balanced."""
        stored = sorted(self._stored[name] for name in self.names() if select(name))
        total, before = sum(each.end - each.begin for each in stored), 0
        readers: dict[str, int] = {}
        for each in stored:
            readers[each.name] = before * ranks // total
            before += each.end - each.begin
        return readers


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
