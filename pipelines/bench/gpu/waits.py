"""Steps in which the host must not wait for the device, under torch's own watch for that."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import nn

from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.topology import Topology, connect
from mhe_dist.engine.engine import Engine, leave_process_group
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.gpu.agreement import BATCH, CLASSES, HEADS, WIDTH, head_config
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings

# The cascade must know its candidates before the second level.
ALLOWED: Final = {"mhc": 1}
# DeepSpeed's own at ZeRO 3: its side streams are waited for, and its norm is looked at.
ENGINE_ALLOWED: Final = {3: 6}
MEMORIES: Final = ("device", "host", "file")


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Count the waits of a step of each head and bank memory, and of the engine."""
    for head in HEADS:
        for memory in MEMORIES:
            name = f"{head}, {memory} memory"
            with found.attempt(name):
                lines = _head_waits(settings, head, memory)
                _judge_waits(settings, found, name, lines, ALLOWED.get(head, 0))
    for stage in (0, 3) if settings.small else (0, 1, 2, 3):
        for precision in ("float32", "bf16")[: 1 if settings.small else 2]:
            name = f"engine at ZeRO {stage} in {precision}"
            with found.attempt(name):
                lines = _engine_waits(settings, stage, precision)
                _judge_waits(settings, found, name, lines, ENGINE_ALLOWED.get(stage, 0))


def _judge_waits(
    settings: GpuSettings, found: GpuFindings, name: str, lines: Counter[str], allowed: int
) -> None:
    count = sum(lines.values())
    if not settings.on_gpu:
        found.leave_out(name, "ran, but a CPU is never waited for")
        return
    listed = ", ".join(f"{number} x {line}" for line, number in lines.most_common(5))
    found.check(name, count <= allowed, f"{count} waits, {allowed} allowed: {listed}")


@contextmanager
def watched_waits(settings: GpuSettings) -> Iterator[Counter[str]]:
    """Counts the lines in which the host waits for the device, by file and line."""
    lines: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if settings.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            if settings.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            lines[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def _head_waits(settings: GpuSettings, name: str, memory: str) -> Counter[str]:
    """Of the fourth step, when memory is pinned and rows are fetched ahead."""
    config = head_config(name, "cosface", memory, "float32", "sgd")
    spec = HeadSpec(config, CLASSES, WIDTH, 0, 1, folder=settings.folder / name)
    head = build_head(spec, Topology(device=settings.torch_device))
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (5, 1, BATCH), generator=random)
    inputs = torch.randn(BATCH, WIDTH, generator=random).to(settings.torch_device)
    for step in range(4):
        with watched_waits(settings) as lines:
            head.plan(step, labels[step])
            head.prefetch(step + 1, labels[step + 1])
            embeddings = inputs.clone().requires_grad_()
            head(embeddings, labels[step, 0]).loss.backward()
            head.step(0.1)
    return lines


def _engine_waits(settings: GpuSettings, stage: int, precision: str) -> Counter[str]:
    """Of the fourth step of a small network."""
    topology = connect(device=settings.torch_device)
    try:
        sizes = {"global_batch": 16, "micro_batch": 8, "precision": precision}
        train = TrainConfig.model_validate(sizes)
        optim = OptimConfig.model_validate({"clip_norm": 1.0})
        engine = Engine(conv_network(16, 8), optim, train, topology, stage)
        images = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
        images = images.pin_memory() if settings.on_gpu else images
        for step in range(4):
            with watched_waits(settings) as lines:
                for part in range(2):
                    engine.backward(engine.forward(images, step, part).square().mean())
                engine.step(0.1)
        return lines
    finally:
        leave_process_group()


def conv_network(channels: int, dim: int) -> nn.Module:
    """A convolution and a matrix: from images of 16 pixels to `[B, dim]`."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * 7 * 7, dim),
    )
