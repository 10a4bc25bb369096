"""Steps in which the host must not wait for the device.

Torch's own watch names the lines that wait, but sees no copy from pageable memory and nothing that
a driver waits for by itself. So each step is issued to a busy device, too, and the host must be
through before that is.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, cycle, pairwise
from pathlib import Path
from typing import Final

import torch
from torch import nn

from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.topology import Topology, connect
from mhe_dist.engine.engine import Engine, leave_process_group
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.gpu.agreement import (
    BATCH,
    CLASSES,
    HEADS,
    SPECIAL,
    WIDTH,
    head_config,
    labels_of,
    random_labels,
    tf32_of,
)
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings

# The cascade must know its candidates before the second level.
ALLOWED: Final = {"mhc": 1}
# DeepSpeed's own at ZeRO 3: its side streams are waited for, and its norm is looked at.
ENGINE_ALLOWED: Final = {3: 6}
MEMORIES: Final = ("device", "host", "file")
IMAGES: Final = 96  # of a micro-batch: more bytes than the driver takes at once
ATTEMPTS: Final = 4
BUSY_CYCLES: Final = 1 << 29  # a quarter of a second, some ten times what issuing a step takes


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Count the waits of a step of each head and bank memory, and of the engine."""
    for head in (*HEADS, *SPECIAL):
        for memory in MEMORIES if head in HEADS else MEMORIES[:1]:
            name = f"{head}, {memory} memory"
            with found.attempt(name):
                allowed = ALLOWED.get(head, 0)
                judge_waits(settings, found, name, _head_step(settings, head, memory), allowed)
    for stage in (0, 3) if settings.small else (0, 1, 2, 3):
        for precision in ("float32", "bf16")[: 1 if settings.small else 2]:
            name = f"engine at ZeRO {stage} in {precision}"
            with found.attempt(name):
                allowed = ENGINE_ALLOWED.get(stage, 0)
                with _engine_step(settings, stage, precision) as step:
                    judge_waits(settings, found, name, step, allowed)


def judge_waits(
    settings: GpuSettings,
    found: GpuFindings,
    name: str,
    step: Callable[[], object],
    allowed: int,
) -> None:
    """Check that a step waits as often as is allowed, after some that fill the caches."""
    for _ in range(4):
        with watched_waits(settings) as lines:
            step()
    if not settings.on_gpu:
        found.leave_out(name, "ran, but a CPU is never waited for")
        return
    waits = sum(lines.values())
    listed = ", ".join(f"{number} x {line}" for line, number in lines.most_common(5))
    found.check(name, waits <= allowed, f"{waits} waits, {allowed} allowed: {listed}")
    if not allowed:
        what = "the host was through with the step only when the device was"
        found.check(f"{name}, beside a busy device", not waits_for_busy_device(step), what)


def waits_for_busy_device(step: Callable[[], object]) -> bool:
    """Whether the host comes back from a step only when the device has done what was before it.

    In each of some attempts: a single one may have compiled a kernel meanwhile.
    """
    for _ in range(ATTEMPTS):
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        busy = torch.cuda.Event()
        busy.record()
        step()
        if not busy.query():
            return False
    return True


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


def _head_step(settings: GpuSettings, name: str, memory: str) -> Callable[[], None]:
    """A step of a head, the next one each time; rows are fetched ahead."""
    config = head_config(name, "cosface", memory, "float32", "sgd")
    folder = settings.folder / name
    spec = HeadSpec(config, CLASSES, WIDTH, 0, 1, folder=folder, tf32=tf32_of(name))
    head = build_head(spec, Topology(device=settings.torch_device))
    random = torch.Generator().manual_seed(1)
    labels = cycle(random_labels((5, 1, BATCH), labels_of(name), random))
    inputs = torch.randn(BATCH, WIDTH, generator=random).to(settings.torch_device)
    steps = pairwise(enumerate(labels))

    def run() -> None:
        """The next step."""
        (step, now), (following, then) = next(steps)
        head.plan(step, now)
        head.prefetch(following, then)
        embeddings = inputs.clone().requires_grad_()
        head(embeddings, now[0]).loss.backward()
        head.step(0.1)

    return run


@contextmanager
def _engine_step(settings: GpuSettings, stage: int, precision: str) -> Iterator[Callable[[], None]]:
    """A step of a small network, on images as a loader gives them: in pageable memory."""
    topology = connect(device=settings.torch_device)
    try:
        sizes = {"global_batch": 2 * IMAGES, "micro_batch": IMAGES, "precision": precision}
        train = TrainConfig.model_validate(sizes)
        optim = OptimConfig.model_validate({"clip_norm": 1.0})
        engine = Engine(conv_network(16, 8), optim, train, topology, stage)
        images = torch.zeros(IMAGES, 3, 16, 16, dtype=torch.uint8)
        numbers = count()

        def run() -> None:
            """The next step, of two micro-batches."""
            step = next(numbers)
            for part in range(2):
                engine.backward(engine.forward(images, step, part).square().mean())
            engine.step(0.1)

        yield run
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
