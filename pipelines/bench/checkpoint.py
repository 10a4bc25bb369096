"""How long a save holds up training, beside a synchronous `torch.save` of the same state.

The ways of saving take turns in one process, so that other load on the machine affects all equally.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mhe_dist.checkpoint.retention import RetentionPolicy
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from mhe_dist.sizes import MIB

TENSOR_BYTES = 64 * MIB


@dataclass(frozen=True)
class SaveTimes:
    """Medians over the rounds.

    Attributes:
        bytes: of the state.
        blocked_s: seconds until `CheckpointStore.save` gave the tensors back.
        written_s: seconds from that call to the manifest.
        plain_s: seconds of `torch.save` and fsync.
        disk_s: seconds of writing as many bytes in large pieces and fsync.
    """

    bytes: int
    blocked_s: float
    written_s: float
    plain_s: float
    disk_s: float

    @property
    def blocked(self) -> float:
        """The share of a synchronous save that training waits for."""
        return self.blocked_s / self.plain_s


def measure_saves(folder: Path, size: int, rounds: int = 3) -> SaveTimes:
    """Save a state of `size` bytes in each way, `rounds` times, below `folder`.

    Raises:
        RunError: a save failed.
    """
    torch.manual_seed(0)
    count = max(1, size // TENSOR_BYTES)
    state = {f"t{i}": torch.randn(size // count // 4) for i in range(count)}
    store = CheckpointStore(str(folder / "checkpoints"), Topology(), RetentionPolicy())
    rows = [
        (
            *_time_save(store, step, state),
            _time_torch_save(folder, state),
            _time_disk(folder, state),
        )
        for step in range(rounds + 1)
    ]
    times = [median(column) for column in zip(*rows[1:], strict=True)]  # the first one warms up
    return SaveTimes(sum(t.nbytes for t in state.values()), *times)


def _time_save(store: CheckpointStore, step: int, state: dict[str, Tensor]) -> tuple[float, float]:
    begin = time.perf_counter()
    store.save(step, state, {}, {})
    blocked = time.perf_counter() - begin
    saved = store.wait()
    if saved is None or saved.error is not None:
        raise RunError(f"the save failed: {saved and saved.error}")
    return blocked, saved.seconds


def _time_torch_save(folder: Path, state: dict[str, Tensor]) -> float:
    begin = time.perf_counter()
    with (folder / "plain.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def _time_disk(folder: Path, state: dict[str, Tensor]) -> float:
    begin = time.perf_counter()
    with (folder / "disk").open("wb", buffering=0) as file:
        for tensor in state.values():
            tensor.numpy().tofile(file)
        os.fsync(file.fileno())
    return time.perf_counter() - begin
