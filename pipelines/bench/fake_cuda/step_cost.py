"""What one step asks of the device, in figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.bench.fake_cuda.device import FakeCuda
from pipelines.bench.fake_cuda.ledger import Ledger


@dataclass(frozen=True)
class StepCost:
    """What one step asks of the device.

    Attributes:
        launches: kernels and copies.
        syncs: times that the host waits for the device.
        moved: bytes of device memory that are read and written.
        flops: of matrix products.
        peak: bytes beyond those that are there between two steps.
        ledger: all of it, line by line.
    """

    launches: int
    syncs: int
    moved: int
    flops: int
    peak: int
    ledger: Ledger = field(repr=False, compare=False)


def cost_since(gpu: FakeCuda, resident: int) -> StepCost:
    """Of what happened since `gpu.clear()`, when `resident` bytes were allocated."""
    ledger = gpu.ledger
    return StepCost(
        len(ledger.of("kernel")),
        len(ledger.of("sync")),
        ledger.moved,
        ledger.flops,
        gpu.peak - resident,
        ledger,
    )
