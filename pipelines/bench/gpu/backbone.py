"""Images per second of IResNet-100 in training, as it is and compiled."""

from __future__ import annotations

from typing import Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from mhe_dist.backbone.compiler import missing_compiler
from mhe_dist.backbone.model import build_backbone, compile_in_place
from mhe_dist.config.schema import ModelConfig, OptimConfig, TrainConfig
from mhe_dist.distributed.topology import connect
from mhe_dist.engine.engine import Engine, leave_process_group
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings, seconds_of

MODELS: Final = {
    False: {"name": "iresnet100", "neck": "none", "embedding_dim": 512},
    True: {"name": "resnet10t", "neck": "none", "kwargs": {"channels": [8, 16, 16, 32]}},
}


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Forward pass, backward pass and update at ZeRO 0, in bfloat16 on a GPU."""
    config = ModelConfig.model_validate(MODELS[settings.small])
    side, batch = (32, 4) if settings.small else (112, 128)
    flops = 3 * _forward_flops(config, side) * batch
    for compiled in (False, True):
        what = f"{config.name}, {'compiled' if compiled else 'eager'}"
        if compiled and settings.small:
            found.leave_out(what, "only without --small")
            continue
        if compiled and (missing := missing_compiler(settings.on_gpu)):
            found.leave_out(what, missing)
            continue
        with found.attempt(what):
            seconds = _step_seconds(settings, config, side, batch, compiled)
            found.figure(what, batch / seconds, "images/s")
            found.figure(f"{what}: a step", seconds * 1e3, "ms")
            found.figure(f"{what}: products", flops / seconds / 1e12, "TFLOP/s")
            found.check(what, True, f"{batch} images of {side} pixels")


def _step_seconds(
    settings: GpuSettings, config: ModelConfig, side: int, batch: int, compiled: bool
) -> float:
    topology = connect(device=settings.torch_device)
    try:
        model = build_backbone(config, side)
        if compiled:
            compile_in_place(model, settings.torch_device)
        precision = "bf16" if settings.on_gpu else "float32"
        sizes = {"global_batch": batch, "micro_batch": batch, "precision": precision}
        train = TrainConfig.model_validate(sizes)
        engine = Engine(model, OptimConfig(), train, topology, 0)
        images = torch.zeros(batch, 3, side, side, dtype=torch.uint8)
        images = images.to(settings.torch_device, memory_format=torch.channels_last)

        def step() -> None:
            engine.backward(engine.forward(images, 0, 0).square().mean())
            engine.step(0.01)

        return seconds_of(settings, step, 1 if settings.small else 10)
    finally:
        leave_process_group()


def _forward_flops(config: ModelConfig, side: int) -> int:
    """Floating-point operations of the products of a forward pass of one image."""
    with torch.device("meta"):
        model, image = build_backbone(config, side).eval(), torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()
