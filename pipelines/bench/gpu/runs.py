"""A small ResNet on small pictures: every ZeRO stage and precision, compiled, killed."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

import numpy as np
import simplejpeg

from mhe_dist.backbone.compiler import missing_compiler
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.write import save_config
from mhe_dist.tracking.jsonl import read_records
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings
from pipelines.pretrain.main import run_pretraining
from pipelines.shards.writer import Sample, ShardWriter

CLASSES, IMAGES = 64, 16
# What rounding of other kernels, or another order of a sum, makes of a loss within a few steps.
CLOSE: Final = 0.02
SMALL: Final = (
    *("train.global_batch=32", "train.micro_batch=16", "data.streams=8", "data.image_size=16"),
    *("model.kwargs.channels=[8,16,16,32]", "model.embedding_dim=32", "train.max_steps=12"),
)
LARGE: Final = ("train.max_steps=60",)
NETWORK: Final = (
    *("model.name=resnet10t", "model.kwargs={channels: [32, 64, 128, 256]}"),
    "model.neck=batchnorm",
)


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Make the runs one after the other, each from the beginning."""
    shards = _write_shards(settings)
    losses: dict[str, list[float]] = {}
    for precision in ("float32", "bf16"):
        for stage in (0, 1, 2, 3):
            name = f"ZeRO {stage} in {precision}"
            if settings.small and (precision == "bf16" or stage not in (0, 3)):
                found.leave_out(name, "only without --small")
                continue
            with found.attempt(name):
                config = _config(settings, shards, name, precision, stage)
                losses[name] = _losses_of(config, found)
                _judge_losses(found, name, losses[name])
    first = losses.get("ZeRO 0 in float32")
    for name, found_losses in losses.items():
        if first and name.endswith("float32"):
            differ = max(abs(a - b) for a, b in zip(found_losses, first, strict=True))
            found.figure(f"{name}: losses differ from those of ZeRO 0", differ)
    _compile(settings, found, shards)
    with found.attempt("killed and resumed"):
        _kill_and_resume(settings, found, shards, first)


def _config(
    settings: GpuSettings, shards: str, name: str, precision: str, stage: int, *more: str
) -> Config:
    """The quickstart, on our pictures with that network, alone and without MLflow."""
    overrides = (
        *NETWORK,
        *(f"run.dir={settings.folder}", f"run.name={name.replace(' ', '-')}"),
        *(f"data.shards={shards}", "data.glyphs=null", "data.loader_workers=0"),
        *("scale.workers=1", f"scale.gpu={settings.on_gpu}", f"scale.zero_stage={stage}"),
        *(f"train.precision={precision}", "train.log_every=1", "optim.warmup_steps=10"),
        *("evaluate.shards=", "evaluate.every_steps=0", "export.formats=[]"),
        *("tracking.mlflow=false", "checkpoint.every_steps=0"),
    )
    sizes = SMALL if settings.small else LARGE
    return load_config("quickstart", (*overrides, *sizes, *more))


def _losses_of(config: Config, found: GpuFindings) -> list[float]:
    """The losses of a run, whose images/s become a figure."""
    run_pretraining(config)
    records = read_records(f"{config.run.path}/metrics.jsonl")
    rates = sorted(r["images_per_s"] for r in records if "images_per_s" in r)
    found.figure(f"{config.run.name}: the loop", rates[len(rates) // 2], "images/s")
    return [record["loss"] for record in records if "loss" in record]


def _judge_losses(found: GpuFindings, name: str, losses: list[float]) -> None:
    tenth = max(1, len(losses) // 10)
    begin, end = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    finite = all(math.isfinite(loss) for loss in losses)
    found.check(name, finite and end < begin, f"loss {begin:.3f} at first, {end:.3f} at last")


def _compile(settings: GpuSettings, found: GpuFindings, shards: str) -> None:
    name = "compiled network"
    if settings.small:
        found.leave_out(name, "only without --small")
    elif missing := missing_compiler(settings.on_gpu):
        found.leave_out(name, missing)
    else:
        with found.attempt(name):
            config = _config(settings, shards, name, "bf16", 1, "model.compile=true")
            _judge_losses(found, name, _losses_of(config, found))


def _kill_and_resume(
    settings: GpuSettings, found: GpuFindings, shards: str, whole: list[float] | None
) -> None:
    """A process that is killed behind its first checkpoint, and the same run again."""
    config = _config(settings, shards, "killed", "float32", 0, "checkpoint.every_steps=4")
    file = settings.folder / "killed.yaml"
    save_config(config, str(file))
    killed = _run_until_killed(str(file))
    found.check("a run is killed behind its first checkpoint", killed)
    resumed = _losses_of(config, found)
    steps = config.train.max_steps
    found.check("the killed run was finished", len(resumed) == steps, f"{len(resumed)} of {steps}")
    if whole:
        differ = max(abs(a - b) for a, b in zip(resumed, whole, strict=True))
        found.figure("killed and resumed: losses differ from an unbroken run", differ)
        found.check("killed and resumed: the same losses", differ <= CLOSE, f"{differ:.2e}")


def _run_until_killed(file: str) -> bool:
    """Whether the process was killed behind its first checkpoint, and did not end before."""
    command = [sys.executable, "-m", "pipelines.pretrain", file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "'event': 'checkpoint'" in line:
                process.send_signal(signal.SIGKILL)
                break
    return process.returncode == -signal.SIGKILL


def _write_shards(settings: GpuSettings) -> str:
    """Pictures whose classes are coarse patterns with noise."""
    folder, side = settings.folder / "pictures", 16 if settings.small else 32
    with ShardWriter(str(folder), "pictures") as writer:
        for tar in range(4):
            writer.write(_pictures(tar, side))
        writer.finish(CLASSES)
    return str(folder)


def _pictures(tar: int, side: int) -> Iterator[Sample]:
    patterns = np.random.default_rng(0).integers(0, 256, (CLASSES, 4, 4, 3))
    patterns = patterns.repeat(side // 4, 1).repeat(side // 4, 2)
    rng = np.random.default_rng(tar + 1)
    for number in range(CLASSES * IMAGES // 4):
        label = number % CLASSES
        pixels = np.clip(patterns[label] + rng.normal(0, 40, (side, side, 3)), 0, 255)
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels, dtype=np.uint8))
        members = {"jpg": jpeg, "cls": str(label).encode()}
        yield Sample(f"{tar}-{number:06d}", members)
