"""A backbone that cannot train is refused before the first step, with the reason."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from mhe_dist.backbone.model import Backbone, build_backbone
from mhe_dist.config.schema import Config
from mhe_dist.engine.first_pass import refuse_untrainable
from mhe_dist.errors import UserError
from tests.support import tiny

SIZE = 32
NO_NORM = {"name": "vit_tiny_patch16_224", "neck": "none"}
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


def settings(folder: Path, train: dict[str, Any] | None = None, **model: Any) -> Config:
    changes = {"data": {"image_size": SIZE}, "train": train or {}, "model": model}
    return tiny.config(folder, "unused", **changes)


def try_out(config: Config) -> Backbone:
    """Make the backbone of a config and try it on noise."""
    torch.manual_seed(0)
    model = build_backbone(config.model, config.data.image_size)
    side = config.data.image_size
    refuse_untrainable(model, config, torch.randint(0, 256, (4, 3, side, side)).byte())
    return model


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "features": (
        {"kwargs": {"features_only": True}, "neck": "none"},
        r"gives list instead of embeddings \[2, 32\]; leave out features_only$",
    ),
    "features, to be folded": ({"kwargs": {"features_only": True}}, r"use model\.neck=none"),
    "no pooling": (
        {"kwargs": {"global_pool": ""}, "neck": "none"},
        r"cannot train on images of 3 x 32 x 32 .*; leave out global_pool$",
    ),
    "channels": ({"kwargs": {"in_chans": 1}}, r"in_chans=1, but images have 3 channels"),
    "no such file": (
        {"kwargs": {"checkpoint_path": "missing.pth"}},
        r"checkpoint_path=missing\.pth does not exist",
    ),
    "more than its classifier": (
        {"name": "volo_d1_224", "kwargs": {}},
        r"model\.neck=batchnorm: volo_d1_224 puts out something else.*use model\.neck=none$",
    ),
    "size": (
        {"name": "vit_tiny_patch16_224", "kwargs": {**VIT, "img_size": 48}, "neck": "none"},
        r"vit_tiny_patch16_224 .*cannot train on images of 3 x 32 x 32 \(data\.image_size=32\): "
        r".*32.*48",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_is_refused(case: str, tmp_path: Path) -> None:
    model, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        try_out(settings(tmp_path, **model))


def test_one_image_has_no_deviation(tmp_path: Path) -> None:
    one = {"micro_batch": 1, "global_batch": 8}
    with pytest.raises(UserError, match=r"train\.micro_batch=1: resnet10t .* give at least 2"):
        try_out(settings(tmp_path, train=one))
    try_out(settings(tmp_path, train=one, name="vit_tiny_patch16_224", kwargs=VIT, neck="none"))


def test_a_layer_that_sees_one_pixel_is_refused_in_bf16_alone(tmp_path: Path) -> None:
    """torch 2.14 on CPUs: its gradient comes from memory that nobody wrote."""
    changes = {"data": {"image_size": 16}, "train": {"precision": "bf16"}}
    config = tiny.config(tmp_path, "unused", **changes)
    with pytest.raises(
        UserError, match=r"image_size=16 is too small.*layer4\.0\.conv1 sees a single"
    ):
        try_out(config)
    config.train.precision = "float32"
    try_out(config)


def test_weights_that_say_nothing_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    model = build_backbone(config.model, SIZE)
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE)).byte()
    torch.nn.init.zeros_(model.net.get_classifier().weight)
    torch.nn.init.zeros_(model.net.get_classifier().bias)
    with pytest.raises(UserError, match="gives every image the embedding 0"):
        refuse_untrainable(model, config, images)
    torch.nn.init.constant_(model.net.get_classifier().bias, float("inf"))
    with pytest.raises(UserError, match="embeddings that are not finite"):
        refuse_untrainable(model, config, images)
    frozen = build_backbone(config.model, SIZE).requires_grad_(False)
    with pytest.raises(UserError, match="cannot train"):
        refuse_untrainable(frozen, config, images)


def test_a_network_that_channels_last_would_kill_keeps_channels_first(tmp_path: Path) -> None:
    """torch 2.14 on AVX2: the backward pass of its stem writes beyond its memory."""
    config = settings(tmp_path, name="fastvit_t8", kwargs={})
    model = build_backbone(config.model, SIZE)
    assert model.unsafe_layer == "stem.0.conv_scale.conv"
    images = torch.zeros(2, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    assert model.arrange(images).is_contiguous()
    refuse_untrainable(model, config, torch.randint(0, 256, (2, 3, SIZE, SIZE)).byte())
    usual = build_backbone(settings(tmp_path).model, SIZE)
    assert usual.arrange(images) is images


def test_a_trial_leaves_no_trace(tmp_path: Path) -> None:
    config = settings(tmp_path)
    torch.manual_seed(0)
    model = build_backbone(config.model, SIZE).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE)).byte()
    generator = torch.get_rng_state()
    refuse_untrainable(model, config, images)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_nobody_has_are_missed_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own client would try five times, for 51 s; it does not ask."""
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{filename}}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with silent:
        with pytest.raises(UserError, match=r"pretrained.*weights of resnet10t cannot be had: "):
            try_out(settings(tmp_path, kwargs={"pretrained": True}))
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert not constants.HF_HUB_OFFLINE
