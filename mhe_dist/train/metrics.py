"""Values of a run that stay on the device until a window of steps is over.

Between two drains nothing waits for the device and nothing is communicated. A drain is one
all-reduce of one packed float64 tensor and one copy to the host, whatever was recorded
(torchmetrics' aggregators would reduce each metric on its own).
"""

from __future__ import annotations

import resource
import zlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from mhe_dist.sizes import GIB

Kind = Literal["mean", "sum", "max"]
Value = Tensor | float


class MetricsWindow(NamedTuple):
    """What was recorded since the last drain, the same on all ranks.

    Attributes:
        losses: (step, mean loss over the global batch), in the order of the steps.
        metrics: name -> value over the whole window and all ranks.
    """

    losses: list[tuple[int, float]]
    metrics: dict[str, float]

    def records(self) -> list[tuple[int, dict[str, float]]]:
        """One record for each step, its loss; the last one carries the window's metrics too."""
        records = [(step, {"loss": loss}) for step, loss in self.losses]
        if records:
            records[-1][1].update(self.metrics)
        return records


class MetricsAccumulator:
    """Accumulates until `drain`. All ranks must record the same steps and the same names."""

    def __init__(self, topology: Topology) -> None:
        """Args: topology: the ranks that a drain reduces over."""
        self._topology = topology
        self._clear()

    def add_loss(self, step: int, loss: Value) -> None:
        """Add what a head returned for one micro-batch (`HeadOutput.loss`).

        The mean over a rank's micro-batches and over ranks is the mean loss over the global
        batch (heads/base.py: each is `W * k / N` times a sum), so that is what a step's loss is.
        """
        total, count = self._losses.get(step, (0.0, 0))
        self._losses[step] = (total + _double(loss), count + 1)

    def add(self, values: Mapping[str, Value], kind: Kind = "mean", weight: float = 1.0) -> None:
        """Add scalars; tensors stay where they are.

        Args:
            values: name -> number, or tensor of one element; a name keeps to one of them.
            kind: how the values of a name become one, over calls and over ranks.
            weight: mean: how much these values count; 0 for a rank that had no sample.
        """
        for name, given in values.items():
            key, value = (kind, name), _double(given)
            if kind == "max":
                known = self._values.get(key)
                self._values[key] = value if known is None else _larger(known, value)
                continue
            # A mean over nothing is NaN, and NaN times a weight of 0 would stay NaN.
            self._values[key] = self._values.get(key, 0.0) + (value * weight if weight else 0.0)
            self._weights[key] = self._weights.get(key, 0.0) + weight

    def drain(self) -> MetricsWindow:
        """Reduce over the ranks, empty the window; all ranks must call.

        Raises:
            RunError: the ranks recorded different names or steps.
        """
        steps, keys = sorted(self._losses), sorted(self._values)
        peaks = [key for key in keys if key[0] == "max"]
        sums = [key for key in keys if key[0] != "max"]
        world, rank = self._topology.world_size, self._topology.rank
        layout = float(zlib.crc32(repr((steps, keys)).encode()))
        values: list[Value] = [layout]
        values += [self._losses[step][0] / self._losses[step][1] / world for step in steps]
        values += [self._values[key] for key in sums]
        values += [self._weights[key] for key in sums]
        # A sum is the only reduction: every rank puts its peaks where the others add zeros.
        for other in range(world):
            values += [self._values[key] if other == rank else 0.0 for key in peaks]
        self._clear()
        total = iter(self._reduce(values))
        if next(total) != layout * world:
            raise RunError(
                f"rank {rank}: the ranks recorded different metrics, here {keys} of {steps}"
            )
        losses = [(step, next(total)) for step in steps]
        metrics = self._sums(sums, [next(total) for _ in sums], [next(total) for _ in sums])
        rows = [[next(total) for _ in peaks] for _ in range(world)]
        if peaks:
            metrics |= dict(
                zip([name for _, name in peaks], np.max(rows, axis=0).tolist(), strict=True)
            )
        return MetricsWindow(losses, metrics)

    @staticmethod
    def _sums(
        keys: list[tuple[Kind, str]], totals: list[float], weights: list[float]
    ) -> dict[str, float]:
        return {
            name: total if kind == "sum" else (total / weight if weight else float("nan"))
            for (kind, name), total, weight in zip(keys, totals, weights, strict=True)
        }

    def _reduce(self, values: list[Value]) -> list[float]:
        device = self._topology.device
        numbers = [0.0 if isinstance(value, Tensor) else value for value in values]
        packed = torch.tensor(numbers, dtype=torch.float64, device=device)
        where = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        if where:
            tensors = torch.stack([values[i].reshape(()).to(device) for i in where])  # type: ignore[union-attr]
            packed[torch.tensor(where, device=device)] = tensors
        if self._topology.world_size > 1:
            dist.all_reduce(packed, group=self._topology.device_group)
        return packed.tolist()

    def _clear(self) -> None:
        self._losses: dict[int, tuple[Value, int]] = {}
        self._values: dict[tuple[Kind, str], Value] = {}
        self._weights: dict[tuple[Kind, str], float] = {}


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB: resident now and at its peak, and CUDA's peak on a GPU.

    CUDA's peak is the allocator's, since the last call.
    """
    figures = {
        "rss_gib": psutil.Process().memory_info().rss / GIB,
        # Linux counts ru_maxrss in KiB.
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
    if device.type == "cuda":
        figures["cuda_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
    return figures


def _double(value: Value) -> Value:
    return value.detach().double() if isinstance(value, Tensor) else float(value)


def _larger(first: Value, second: Value) -> Value:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.maximum(first, second)
    return float(np.maximum(first, second))
