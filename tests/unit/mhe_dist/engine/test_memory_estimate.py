"""The traced forward pass counts what a real one keeps."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from mhe_dist.backbone.model import build_backbone
from mhe_dist.config.schema import Config
from mhe_dist.distributed.collectives import PIECE
from mhe_dist.engine.memory_estimate import estimate_memory


def config(**sections: Any) -> Config:
    model = {"name": "resnet10t", "embedding_dim": 64, "kwargs": {"channels": [8, 16, 16, 32]}}
    head = {"groups": 8, "mhs": {"length": 100, "extra_heads": 8}, **sections.pop("head", {})}
    data = {"shards": "x", "image_size": 32}
    values = {"data": data, "model": model, "head": head, **sections}
    return Config.model_validate(values)


def kept_by_a_real_forward_pass(settings: Config) -> list[int]:
    model = build_backbone(settings.model, 32).train()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    gc.collect()
    assert out.requires_grad
    return sorted(kept.values())


def test_activations_are_those_of_a_real_forward_pass() -> None:
    settings = config(train={"micro_batch": 16, "global_batch": 64})
    real = kept_by_a_real_forward_pass(settings)
    counted = estimate_memory(settings, 100, 1, "float32").activations
    assert counted == pytest.approx(sum(real) + sum(real[-2:]), rel=0.02)


def test_activations_grow_with_the_micro_batch() -> None:
    small = estimate_memory(config(train={"micro_batch": 16}), 100, 1, "float32")
    large = estimate_memory(config(train={"micro_batch": 64}), 100, 1, "float32")
    assert large.activations == pytest.approx(4 * small.activations, rel=0.01)
    assert large.weights == small.weights


def test_rows_are_shared_by_the_workers_and_carry_their_moments() -> None:
    one = estimate_memory(config(), 1000, 1, "float32").rows
    assert one == 1000 * 64 * 4 * 2  # momentum
    assert estimate_memory(config(), 1000, 4, "float32").rows == one // 4
    half = {"bank": {"dtype": "bfloat16"}, "optim": {"kind": "adamw"}}
    assert estimate_memory(config(head=half), 1000, 1, "float32").rows == 1000 * 64 * 2 * 3
    file = {"bank": {"memory": "file"}}
    assert estimate_memory(config(head=file), 1000, 1, "float32").rows == 0


def test_gradients_are_summed_in_float64_at_float32() -> None:
    for stage in (0, 2):
        at = config(scale={"zero_stage": stage})
        exact, fast = (estimate_memory(at, 10, 2, p) for p in ("float32", "bf16"))
        assert exact.gradients == 2 * fast.gradients
        assert exact.communication == 2 * fast.communication


def test_at_zero_1_one_micro_batch_needs_no_float64_but_for_the_share() -> None:
    """And what is exchanged at a time does not grow with the network."""
    numel = estimate_memory(config(), 10, 1, "bf16").weights // 4
    for micro_batches, element in ((2, 4), (4, 8)):
        train = {"micro_batch": 64, "global_batch": 64 * micro_batches}
        at = config(scale={"zero_stage": 1}, train=train)
        exact, fast = (estimate_memory(at, 10, 2, p) for p in ("float32", "bf16"))
        assert exact.gradients == pytest.approx(numel * (element + 4), rel=0.02)
        assert fast.gradients == pytest.approx(numel * (4 + 2), rel=0.02)
        assert exact.communication == fast.communication == 2 * PIECE
        at = config(scale={"zero_stage": 1, "gpu": True}, train=train)
        nccl = estimate_memory(at, 10, 2, "float32")
        assert nccl.gradients == pytest.approx(numel * (8 + 4), rel=0.02)
        assert nccl.communication == 0


def test_zero_shares_the_optimizer() -> None:
    at = {
        stage: estimate_memory(config(scale={"zero_stage": stage}), 10, 4, "bf16")
        for stage in range(4)
    }
    assert at[0].optimizer == pytest.approx(at[0].gradients)
    assert at[1].optimizer == pytest.approx(2 * at[0].gradients / 4, rel=1e-3)
    assert at[1].gradients == pytest.approx(5 / 4 * at[0].gradients, rel=1e-3)
    assert at[2].gradients == pytest.approx(at[0].gradients / 4, rel=1e-3)
    assert at[3].weights < at[2].weights
