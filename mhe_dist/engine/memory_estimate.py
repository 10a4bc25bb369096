"""What one worker needs in memory, counted without allocating it: a forward pass is traced.

The trace runs on torch's fake tensors, which have shapes and no data, and which autocast treats as
real ones. What autograd keeps for the backward pass is what it hands to `saved_tensors_hooks`; a
storage that is kept twice counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from mhe_dist.backbone.model import Backbone, build_backbone, without_pretrained
from mhe_dist.config.head import HeadConfig, HeadOptimConfig
from mhe_dist.config.schema import Config, OptimConfig
from mhe_dist.distributed.collectives import PIECE
from mhe_dist.engine.exact_reduce import sum_dtype
from mhe_dist.engine.gradient_sums import kept_dtype
from mhe_dist.engine.settings import deepspeed_settings
from mhe_dist.sizes import DEVICE_CHUNK_BYTES, LOGITS_BYTES

FLOAT = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one worker.

    Attributes:
        weights: parameters and buffers of the backbone.
        gradients: of the backbone.
        optimizer: the backbone's moments, and the float32 copy of the weights that ZeRO updates.
        activations: what the forward pass keeps for the backward pass, and then either what the
            head computes with or the gradients of the two largest of those, which is more.
        communication: buckets in which gradients are reduced.
        rows: class centres and their state once every class of the partition was met.
        head: what the head keeps until its update, beside the rows.
        images: micro-batches that wait for their turn.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    rows: int
    head: int
    images: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.__dict__.values())

    def parts_on_gpu(self, config: Config) -> dict[str, int]:
        """Those that a GPU holds: images wait on the host, and rows where the config says."""
        elsewhere = {"images"} if config.head.bank.memory == "device" else {"images", "rows"}
        return {name: size for name, size in vars(self).items() if name not in elsewhere}

    def on_gpu(self, config: Config) -> int:
        """All that a GPU holds."""
        return sum(self.parts_on_gpu(config).values())


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
    model = unallocated_backbone(config)
    numel = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    stage = int(config.scale.zero_stage)
    settings = deepspeed_settings(config.train.micro_batch, 1, stage, precision, numel)
    bucket = settings["zero_optimization"]["reduce_bucket_size"]
    image = 3 * config.data.image_size**2
    kept, passing = _head_bytes(config, num_classes, workers)
    rows = row_bytes(config.head, num_classes, config.model.embedding_dim)
    return MemoryEstimate(
        weights=numel * FLOAT // (workers if stage == 3 else 1) + buffers,
        gradients=_gradient_bytes(numel, config, precision, workers),
        optimizer=_optimizer_bytes(numel, config.optim, stage, workers),
        activations=_activations(model, config, precision, passing),
        communication=_exchanged_bytes(bucket, config, precision) if workers > 1 else 0,
        rows=rows // workers if config.head.bank.memory != "file" else 0,
        head=kept,
        images=config.train.micro_batch * image * (config.data.prefetch + 1),
    )


def unallocated_backbone(config: Config) -> Backbone:
    """The backbone of a run, with shapes and without memory.

    Raises:
        UserError: it is unknown, or refuses its arguments.
    """
    with torch.device("meta"):
        return build_backbone(without_pretrained(config.model), config.data.image_size)


def count_moments(config: OptimConfig | HeadOptimConfig) -> int:
    """How many values an optimizer keeps for each weight."""
    return 2 if config.kind == "adamw" else int(config.momentum > 0)


def _gradient_bytes(numel: int, config: Config, precision: str, workers: int) -> int:
    """Bytes of the sum of a step's gradients; at ZeRO 1 of a rank's own, and of its share."""
    stage, element = int(config.scale.zero_stage), sum_dtype(precision).itemsize
    if stage != 1:
        return numel * element // (workers if stage >= 2 else 1)
    micro_batches = config.train.micro_batches // workers
    kept = kept_dtype(precision, micro_batches, config.scale.gpu).itemsize
    return numel * kept + numel * element // workers


def _exchanged_bytes(bucket: int, config: Config, precision: str) -> int:
    """Bytes that the reduction of gradients needs: DeepSpeed's bucket; our pieces at ZeRO 1."""
    if int(config.scale.zero_stage) != 1:
        return bucket * sum_dtype(precision).itemsize
    return 0 if config.scale.gpu else 2 * PIECE


def _optimizer_bytes(numel: int, config: OptimConfig, stage: int, workers: int) -> int:
    copies = count_moments(config) + (stage > 0)  # ZeRO updates a flat float32 copy of its share
    return numel * FLOAT * copies // (workers if stage > 0 else 1)


def row_bytes(config: HeadConfig, num_classes: int, width: int) -> int:
    """Bytes of all rows and their state; Product and Cascade hold as many rows as their digits."""
    element = 2 if config.bank.dtype == "bfloat16" else FLOAT
    rows = num_classes
    if config.kind == "mhp":
        rows = sum(config.mhp.lengths) or 2 * round(num_classes**0.5 + 0.5)
    return rows * width * element * (1 + count_moments(config.optim))


def _head_bytes(config: Config, num_classes: int, workers: int) -> tuple[int, int]:
    """Bytes that a head keeps from its forward pass to its update, and that it needs in between.

    Kept are the rows' gradient or what makes it; in between are the rows that are scored, and
    logits. A head of levels scores few rows at a time; that is little beside the rest.
    """
    head, width = config.head, config.model.embedding_dim
    batch, local = config.train.micro_batch * workers, num_classes // workers
    if head.kind in ("mhp", "mhc"):
        return 0, 0
    if head.kind == "mhs" and head.mhs.exchange == "route":
        extra = (
            head.mhs.chosen_extra_heads * -(-head.chosen_groups // workers) * head.mhs.chosen_length
        )
        extra = 0 if head.mhs.negatives == "own" else min(local, extra)
        own = min(local, batch // workers * head.mhs.chosen_length)
        return batch // head.chosen_groups * extra * FLOAT, (extra + own) * width * FLOAT
    rows = local
    if head.kind == "partial_fc":
        rows = max(int(local * head.partial_fc.rate), min(local, batch // workers))
    elif head.kind == "mhs":
        heads = batch + (0 if head.mhs.negatives == "own" else head.mhs.chosen_extra_heads)
        rows = min(local, heads * head.mhs.chosen_length // workers)
    chunk = min(rows * max(width, batch) * FLOAT, DEVICE_CHUNK_BYTES)
    return rows * width * FLOAT, chunk + min(rows * batch * FLOAT, LOGITS_BYTES)


def _activations(model: torch.nn.Module, config: Config, precision: str, passing: int) -> int:
    """Bytes that a forward pass of one micro-batch keeps, and its two largest gradients.

    Instead of these, `passing` bytes of the head, if those are more.
    """
    kept: dict[int, tuple[int, Tensor]] = {}
    own: set[int] = set()

    def _pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The tensor itself is held, so that no other one gets its storage's number.
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    side = config.data.image_size
    model.train()
    with FakeTensorMode():
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        state = {
            name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in tensors.items()
        }
        own |= {tensor.untyped_storage()._cdata for tensor in state.values()}
        images = torch.empty(config.train.micro_batch, 3, side, side)
        images = images.contiguous(memory_format=torch.channels_last)
        with (
            torch.autograd.graph.saved_tensors_hooks(_pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            functional_call(model, state, (images,))
    sizes = sorted(size for size, _ in kept.values())
    return sum(sizes) + max(sum(sizes[-2:]), passing)
