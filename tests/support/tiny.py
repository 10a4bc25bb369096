"""A run small enough for a test: a few patterns, a small network with BatchNorm."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from mhe_dist.backbone.model import build_backbone
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.config.schema import Config
from mhe_dist.config.section import applicable_values
from mhe_dist.config.write import save_config
from mhe_dist.distributed.topology import Topology
from mhe_dist.tracking.jsonl import read_records
from pipelines.runs.warm_start import find_checkpoint
from pipelines.shards.writer import Sample, ShardWriter

CLASSES, IMAGES, SIDE = 30, 12, 16


def write_shards(folder: Path, classes: int = CLASSES, first: int = 0) -> str:
    """Shards whose classes are coarse patterns with noise; returns their folder."""
    rng = np.random.default_rng(first)
    patterns = rng.integers(0, 256, (classes, 4, 4, 3)).repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    samples = []
    for number in rng.permutation(classes * IMAGES):
        label = int(number) % classes
        noise = rng.normal(0, 40, (SIDE, SIDE, 3))
        pixels = np.clip(patterns[label] + noise, 0, 255).astype(np.uint8)
        jpeg = simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444")
        members = {"jpg": jpeg, "cls": str(label).encode()}
        samples.append(Sample(f"{first + int(number):07d}", members))
    with ShardWriter(str(folder), "tiny") as writer:
        for start in range(0, len(samples), 100):
            writer.write(samples[start : start + 100])
        writer.finish(classes)
    return str(folder)


def config(folder: Path, shards: str, **changes: dict[str, object]) -> Config:
    """A run of 24 steps, float32, with everything that a real one has but MLflow."""
    values: dict[str, dict[str, object]] = {
        "run": {"dir": str(folder), "seed": 3},
        "data": {
            "shards": shards,
            "image_size": SIDE,
            "streams": 8,
            "shuffle_window": 20,
            "loader_workers": 0,
            "augment": {"flip": 0.5, "crop": 0.2},
        },
        "model": {
            "name": "resnet10t",
            "kwargs": {"channels": [8, 16, 16, 32], "drop_path_rate": 0.1},
            "embedding_dim": 32,
        },
        "head": {
            "margin": {"scale": 16.0, "m": 0.2},
            "groups": 4,
            "mhs": {"length": 4, "extra_heads": 1},
        },
        # Such a small network is chaotic: what rounding changes grows by a factor per step. The
        # warm-up keeps apart what other processors and heads round otherwise.
        "optim": {"lr": 0.02, "warmup_steps": 100},
        "train": {
            "max_steps": 24,
            "global_batch": 64,
            "micro_batch": 16,
            "precision": "float32",
            "log_every": 5,
        },
        "checkpoint": {"every_steps": 10},
        "tracking": {"mlflow": False},
        "export": {"formats": []},
    }
    changed = {section: values.get(section, {}) | keys for section, keys in changes.items()}
    fitting = applicable_values(Config, values, values | changed)  # a change of head.kind
    for section, keys in changes.items():
        fitting[section] = fitting.get(section, {}) | keys
    return Config.model_validate(fitting)


def per_step(config: Config) -> tuple[list[float], list[float]]:
    """Loss and digest of the samples of every step that a run recorded."""
    records = [r for r in read_records(f"{config.run.path}/metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(len(records)))
    return [r["loss"] for r in records], [r["sample_digest"] for r in records]


def differing(run: Config, other: Config) -> list[str]:
    """Names of the tensors whose bits differ between the last checkpoints of two runs."""
    last = [find_checkpoint(config.run.path) for config in (run, other)]
    assert [found.step for found in last] == [run.train.max_steps, other.train.max_steps]
    ours, theirs = (found.load(lambda name: True) for found in last)
    assert ours.keys() == theirs.keys()
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def trained_run(
    folder: Path, shards: str, run_id: str | None = None, **changes: dict[str, object]
) -> Config:
    """A run with one checkpoint of an untrained backbone, made without training.

    Args:
        folder: of the runs.
        shards, changes: see `config`.
        run_id: of the run in MLflow.
    """
    settings = config(folder, shards, **changes)
    torch.manual_seed(1)
    model = build_backbone(settings.model, settings.data.image_size)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    store = CheckpointStore(f"{settings.run.path}/checkpoints", Topology())
    store.save(24, state, {}, {"step": 24, "run_id": run_id})
    store.wait()
    save_config(settings, f"{settings.run.path}/config.yaml")
    return settings


def write_bin(path: Path, pairs: int = 40) -> str:
    """An InsightFace verification set: pairs of patterns, every other one the same with noise."""
    rng = np.random.default_rng(7)
    images, same = [], [pair % 2 == 0 for pair in range(pairs)]
    for flag in same:
        left, other = rng.integers(0, 256, (2, SIDE, SIDE, 3))
        right = left if flag else other
        for image in (left, right + rng.normal(0, 40, right.shape)):
            pixels = np.clip(image, 0, 255).astype(np.uint8)
            images.append(simplejpeg.encode_jpeg(pixels, quality=95))
    path.write_bytes(pickle.dumps((images, same)))
    return str(path)
