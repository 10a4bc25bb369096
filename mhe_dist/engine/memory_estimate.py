"""What one worker needs in memory, counted without allocating it: a forward pass is traced.

The trace runs on meta tensors, which have shapes and no data. What autograd keeps for the backward
pass is what it hands to `saved_tensors_hooks`; a storage that is kept twice counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhe_dist.backbone.model import build_backbone, without_pretrained
from mhe_dist.config.head import HeadConfig
from mhe_dist.config.schema import Config, OptimConfig
from mhe_dist.engine.exact_reduce import sum_dtype
from mhe_dist.engine.settings import deepspeed_settings

FLOAT = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one worker.

    Attributes:
        weights: parameters and buffers of the backbone.
        gradients: of the backbone.
        optimizer: the backbone's moments, and the float32 copy of the weights that ZeRO updates.
        activations: what the forward pass keeps for the backward pass, and the gradients of the
            two largest of those.
        communication: buckets in which gradients are reduced.
        rows: class centres and their state once every class of the partition was met.
        images: micro-batches that wait for their turn.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    rows: int
    images: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.__dict__.values())


def estimate_memory(
    config: Config, num_classes: int, workers: int, precision: str
) -> MemoryEstimate:
    """What a config needs on each of W workers.

    Args:
        config: of the run.
        num_classes: C.
        workers: W.
        precision: "bf16" or "float32", what `train.precision` comes to.

    Raises:
        UserError: the backbone is unknown, or refuses its arguments.
    """
    with torch.device("meta"):
        model = build_backbone(without_pretrained(config.model), config.data.image_size)
    numel = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    stage = int(config.scale.zero_stage)
    settings = deepspeed_settings(config.train.micro_batch, 1, stage, precision, numel)
    bucket = settings["zero_optimization"]["reduce_bucket_size"]
    image = 3 * config.data.image_size**2
    gradient = sum_dtype(precision).itemsize
    return MemoryEstimate(
        weights=numel * FLOAT // (workers if stage == 3 else 1) + buffers,
        gradients=numel * gradient // (workers if stage >= 2 else 1),
        optimizer=_optimizer_bytes(numel, config.optim, stage, workers),
        activations=_activations(model, config, precision),
        communication=bucket * gradient * (workers > 1),
        rows=_row_bytes(config.head, num_classes, config.model.embedding_dim) // workers,
        images=config.train.micro_batch * image * (config.data.prefetch + 1),
    )


def _optimizer_bytes(numel: int, config: OptimConfig, stage: int, workers: int) -> int:
    moments = 2 if config.kind == "adamw" else int(config.momentum > 0)
    copies = moments + (stage > 0)  # ZeRO updates a flat float32 copy of its share
    return numel * FLOAT * copies // (workers if stage > 0 else 1)


def _row_bytes(config: HeadConfig, num_classes: int, width: int) -> int:
    """Bytes of all rows and their state; Product and Cascade hold as many rows as their digits."""
    element = 2 if config.bank.dtype == "bfloat16" else FLOAT
    optim = config.optim
    moments = 2 if optim.kind == "adamw" else int(optim.momentum > 0)
    rows = num_classes
    if config.kind == "mhp":
        rows = sum(config.mhp.lengths) or 2 * round(num_classes**0.5 + 0.5)
    return rows * width * element * (1 + moments) if config.bank.memory != "file" else 0


def _activations(model: torch.nn.Module, config: Config, precision: str) -> int:
    """Bytes that a forward pass of one micro-batch keeps, and its two largest gradients."""
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def _pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The tensor itself is held, so that no other one gets its storage's number.
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    side = config.data.image_size
    images = torch.empty(config.train.micro_batch, 3, side, side, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(_pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(images)
    sizes = sorted(size for size, _ in kept.values())
    return sum(sizes) + sum(sizes[-2:])
