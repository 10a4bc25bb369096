"""The card: what it is, and the ceilings that everything else is measured against."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata

import torch

from mhe_dist.engine.settings import set_float_kernels
from mhe_dist.sizes import GIB
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings, now, seconds_of


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Name the machine and measure its ceilings."""
    _facts(settings, found)
    found.figure("copies on the device", bandwidth(settings) / 1e9, "GB/s read and written")
    if settings.on_gpu:
        _host_copies(settings, found)
        _launches(settings, found)
    for name, flops in product_speeds(settings).items():
        found.figure(f"matrix products in {name}", flops / 1e12, "TFLOP/s")
    set_float_kernels("float32")


def _facts(settings: GpuSettings, found: GpuFindings) -> None:
    found.figure("Python", platform.python_version())
    for package in ("torch", "triton", "deepspeed", "timm"):
        try:
            found.figure(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            found.figure(package, "not installed")
    found.figure("CPU cores", len(os.sched_getaffinity(0)))
    if not settings.on_gpu:
        found.figure("card", "none: this is a self-test on a CPU")
        return
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    found.figure("card", card.name)
    found.figure("compute capability", f"{card.major}.{card.minor}")
    found.figure("multiprocessors", card.multi_processor_count)
    found.figure("memory", total / GIB, "GiB")
    found.figure("memory free", free / GIB, "GiB")
    found.figure("CUDA", str(torch.version.cuda))
    found.figure("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    found.check("bfloat16 is computed", torch.cuda.is_bf16_supported(including_emulation=False))


def bandwidth(settings: GpuSettings) -> float:
    """Bytes per second that a large copy reads and writes."""
    count = 1 << (20 if settings.small else 28)
    source = torch.zeros(count, device=settings.torch_device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(settings, lambda: target.copy_(source))


def product_speeds(settings: GpuSettings) -> dict[str, float]:
    """Operations per second of a large matrix product, by how it is computed."""
    side = 256 if settings.small else 8192
    a = torch.randn(side, side, device=settings.torch_device)
    speeds = {}
    kinds = ("float32", "tf32", "bf16") if settings.on_gpu else ("float32",)
    for kind in kinds:
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        b = a.bfloat16() if kind == "bf16" else a
        seconds = seconds_of(settings, lambda b=b: b @ b, 5)  # type: ignore[misc]
        speeds[kind] = 2 * side**3 / seconds
    torch.backends.cuda.matmul.allow_tf32 = False
    return speeds


def _host_copies(settings: GpuSettings, found: GpuFindings) -> None:
    target = torch.empty(1 << 26, dtype=torch.uint8, device=settings.torch_device)
    pageable = torch.zeros(target.shape, dtype=torch.uint8)
    for name, source in (("pageable", pageable), ("pinned", pageable.pin_memory())):
        seconds = seconds_of(settings, lambda source=source: target.copy_(source))  # type: ignore[misc]
        found.figure(f"copies from {name} memory", target.nbytes / seconds / 1e9, "GB/s")


def _launches(settings: GpuSettings, found: GpuFindings) -> None:
    """How long the host takes to issue a small kernel, and to wait for one."""
    value = torch.zeros(1, device=settings.torch_device)
    now(settings)
    begin = time.perf_counter()
    for _ in range(1000):
        value.add_(1)
    issued = time.perf_counter() - begin
    now(settings)
    found.figure("a launch on the host", issued / 1000 * 1e6, "us")
    found.figure("a wait for a scalar", seconds_of(settings, value.item) * 1e6, "us")
