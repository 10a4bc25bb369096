"""What preflight predicts for a GPU, against the peak of the device that computes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhe_dist.backbone.model import build_backbone
from mhe_dist.backbone.normalization import normalize_images
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.gradient_sums import WholeSum
from mhe_dist.engine.memory_estimate import estimate_memory
from mhe_dist.engine.settings import make_optimizer
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.fake_cuda.autograd import backward
from pipelines.bench.fake_cuda.device import fake_cuda

CLASSES = 60_000
ROUTE = ("head.mhs.length=100", "head.mhs.extra_heads=40")


def config(*overrides: str) -> Config:
    """A network of 128 images of 64 pixels, alone at ZeRO 0."""
    sizes = ("data.image_size=64", "train.micro_batch=128", "train.global_batch=128")
    network = (
        "model.name=resnet10t",
        "model.neck=none",
        "data.shards=none",
        "data.streams=64",
        "head.groups=8",
    )
    return load_config(None, (*network, *sizes, "scale.zero_stage=0", *overrides))


def peak_of_training(settings: Config, precision: str) -> int:
    """Bytes on the device at the peak of two steps, as the engine makes them at ZeRO 0."""
    batch, side = settings.train.micro_batch, settings.data.image_size
    topology = Topology(device=torch.device("cuda", 0))
    with fake_cuda() as gpu:
        model = build_backbone(settings.model, side).to(topology.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        exact = WholeSum(trained, topology) if precision == "float32" else None
        optimizer = make_optimizer(model, settings.optim)
        spec = HeadSpec(settings.head, CLASSES, settings.model.embedding_dim, 0, 1)
        head: Any = build_head(spec, topology)
        head.bank._touched[:] = True
        for step in range(2):
            labels = torch.randint(0, CLASSES, (1, batch))
            head.plan(step, labels)
            images = torch.zeros(batch, 3, side, side, dtype=torch.uint8)
            images = normalize_images(images.to(topology.device, non_blocking=True))
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                embeddings = model(images)
            backward(head(embeddings.float(), labels[0]).loss)
            del images, embeddings
            if exact is not None:
                exact.hand_over()
            optimizer.step()
            optimizer.zero_grad()
            head.step(0.1)
        return gpu.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        ("bf16", ROUTE),
        ("bf16", ("head.mhs.exchange=gather", *ROUTE)),
        ("float32", ("head.kind=full", "head.optim.kind=adamw", "optim.kind=adamw")),
    ],
)
def test_the_prediction_is_within_a_tenth_of_the_peak(
    precision: str, overrides: tuple[str, ...]
) -> None:
    settings = config(*overrides)
    predicted = estimate_memory(settings, CLASSES, 1, precision).on_gpu(settings)
    peak = peak_of_training(settings, precision)
    assert 0.9 < predicted / peak < 1.1, (predicted / 2**20, peak / 2**20)
