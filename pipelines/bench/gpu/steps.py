"""A step of the heads at two million classes, with the least that it could cost beside it."""

from __future__ import annotations

from itertools import cycle
from typing import Any, Final, NamedTuple

import torch

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.settings import set_float_kernels
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.routed.mhs import MhsRoute
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.gpu.agreement import head_variants
from pipelines.bench.gpu.card import bandwidth, product_speeds
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings, seconds_of

HEADS: Final = ("route", "gather", "partial_fc", "full")
PASSES: Final = 5  # over a touched row: read for the products, then it and its momentum updated


class Sizes(NamedTuple):
    """C, D and B."""

    classes: int
    width: int
    batch: int


class LeastWork(NamedTuple):
    """What a step cannot do without: bytes of touched rows, operations of the products."""

    bytes: int
    flops: int


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Seconds of each head's step, every row in use, and its floor."""
    sizes = Sizes(20_000, 32, 8) if settings.small else Sizes(2_000_000, 512, 128)
    bytes_per_s, speeds = bandwidth(settings), product_speeds(settings)
    set_float_kernels("float32")
    variants = head_variants(length=128, extra_heads=321)
    for name in HEADS:
        for matmul in ("float32", "tf32")[: 2 if settings.on_gpu else 1]:
            what = f"{name} in {matmul}"
            with found.attempt(what):
                seconds, least = _measure_head(settings, sizes, variants[name], matmul == "tf32")
                floor = max(least.bytes / bytes_per_s, least.flops / speeds[matmul])
                found.figure(f"{what}: a step", seconds * 1e3, "ms")
                found.figure(f"{what}: its floor", floor * 1e3, "ms")
                found.figure(f"{what}: rows of the floor", least.bytes / 1e9, "GB")
                found.figure(f"{what}: products of the floor", least.flops / 1e9, "GFLOP")
                found.check(what, True, f"{seconds / floor:.1f} x its floor")


def _measure_head(
    settings: GpuSettings, sizes: Sizes, values: dict[str, Any], tf32: bool
) -> tuple[float, LeastWork]:
    device, config = settings.torch_device, HeadConfig.model_validate({"groups": 8} | values)
    spec = HeadSpec(config, sizes.classes, sizes.width, 0, 1, tf32=tf32)
    head: Any = build_head(spec, Topology(device=device))
    head.bank.touch(head.bank.units)
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, sizes.classes, (4, 1, sizes.batch), generator=random)
    inputs = torch.randn(sizes.batch, sizes.width, generator=random).to(device)
    numbers = cycle(range(len(labels)))

    def step() -> None:
        """A whole step of the head; its embeddings stand for those of a backbone."""
        number = next(numbers)
        head.plan(number, labels[number])
        embeddings = inputs.clone().requires_grad_()
        head(embeddings, labels[number, 0]).loss.backward()
        head.step(0.1)

    seconds = seconds_of(settings, step, 1 if settings.small else 10)
    head.plan(0, labels[0])
    return seconds, least_work(head, sizes, labels[0])


def least_work(head: Any, sizes: Sizes, labels: torch.Tensor) -> LeastWork:
    """Of a planned step on one rank.

    Products are one forward and two backward: of route each sample with its own head and its
    group's extra ones, of the others each sample with all that are selected.
    """
    length, per_product = head.layout.length, 6 * sizes.width
    if isinstance(head, MhsRoute):
        units = len(head.units_of_step(0, labels))
        flops = per_product * sizes.batch * length * (1 + head.extra_heads)
    else:
        units = len(head.selection.units)
        flops = per_product * sizes.batch * units * length
    return LeastWork(PASSES * units * length * sizes.width * 4, flops)
