"""The GPU memory of a run beside what preflight predicts for it."""

from __future__ import annotations

import gc
from typing import Final

import torch

from mhe_dist.backbone.model import build_backbone
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology, connect
from mhe_dist.engine.engine import Engine, leave_process_group
from mhe_dist.engine.memory_estimate import estimate_memory
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from mhe_dist.sizes import MIB
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings

STEPS: Final = 4
CLASSES: Final = {False: 500_000, True: 500}
SMALL: Final = (
    *("model.name=resnet10t", "model.kwargs={channels: [8, 16, 16, 32]}"),
    *("data.image_size=32", "model.embedding_dim=32"),
    *("train.micro_batch=4", "train.global_batch=4", "data.streams=4"),
)
LARGE: Final = (
    *("model.name=iresnet50", "data.image_size=112", "model.embedding_dim=512"),
    *("train.micro_batch=128", "train.global_batch=128", "data.streams=64"),
)


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """IResNet-50 in both precisions at ZeRO 0 and 2, with half a million classes."""
    for precision in ("float32", "bf16")[: 1 if settings.small else 2]:
        for stage in (0, 2):
            name = f"ZeRO {stage} in {precision}"
            with found.attempt(name):
                config = _config(settings, precision, stage)
                estimated = estimate_memory(config, CLASSES[settings.small], 1, precision)
                predicted = estimated.on_gpu(config)
                peak = _measured_peak(config, settings)
                found.figure(f"{name}: predicted", predicted / MIB, "MiB")
                if not settings.on_gpu:
                    found.leave_out(name, "ran, but a CPU has no memory of its own to measure")
                    continue
                found.figure(f"{name}: at its peak", peak / MIB, "MiB")
                ratio = predicted / peak
                found.check(name, 0.9 <= ratio <= 1.1, f"predicted {ratio:.2f} of the peak")


def _config(settings: GpuSettings, precision: str, stage: int) -> Config:
    overrides = (
        *("data.shards=none", "model.neck=none", "head.groups=8"),
        *("head.mhs.length=100", "head.mhs.extra_heads=8"),
        *(f"train.precision={precision}", f"scale.zero_stage={stage}"),
    )
    return load_config(None, (*overrides, *(SMALL if settings.small else LARGE)))


def _measured_peak(config: Config, settings: GpuSettings) -> int:
    """Bytes of tensors at their peak over some steps, every row touched."""
    if settings.on_gpu:
        gc.collect()  # an engine is full of circles: the one before would be there still
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    topology = connect(device=settings.torch_device)
    try:
        _train(config, topology, CLASSES[settings.small])
    finally:
        leave_process_group()
    return torch.cuda.max_memory_allocated() if settings.on_gpu else 0


def _train(config: Config, topology: Topology, classes: int) -> None:
    side, batch = config.data.image_size, config.train.micro_batch
    model = build_backbone(config.model, side)
    engine = Engine(model, config.optim, config.train, topology, int(config.scale.zero_stage))
    head = build_head(HeadSpec(config.head, classes, config.model.embedding_dim, 0, 1), topology)
    random = torch.Generator().manual_seed(1)
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8)
    for step in range(STEPS):
        labels = torch.randint(0, classes, (1, batch), generator=random)
        head.plan(step, labels)
        output = head(engine.forward(images, step, 0), labels[0])
        engine.backward(output.loss)
        engine.step(0.01)
        head.step(0.01)
