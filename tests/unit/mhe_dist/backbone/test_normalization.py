"""Images are normalised as weights expect, by default to [-1, 1] with the bits of before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mhe_dist.backbone.export import export_timm
from mhe_dist.backbone.model import build_backbone, without_pretrained
from mhe_dist.backbone.normalization import (
    SYMMETRIC,
    Normalization,
    normalization_of,
    normalize_images,
)
from mhe_dist.backbone.pretrained import load_pretrained
from mhe_dist.config.schema import Config, ModelConfig
from mhe_dist.config.stored import stored_config
from mhe_dist.config.write import config_to_dict
from mhe_dist.errors import UserError
from pipelines.runs.trained import load_trained_backbone
from tests.support import tiny

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PRETRAINED = {"pretrained": True}
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)


def config(**changes: Any) -> ModelConfig:
    values = {"name": "resnet10t", "kwargs": {"channels": [8, 8, 16, 16]}, "embedding_dim": 12}
    return ModelConfig.model_validate(values | changes)


def test_the_default_keeps_its_bits() -> None:
    before = IMAGES.contiguous(memory_format=torch.channels_last).float().div_(127.5).sub_(1.0)
    assert torch.equal(normalize_images(IMAGES), before)
    assert normalization_of(config()) == SYMMETRIC


def test_other_constants_are_applied_to_their_channels() -> None:
    mean, std = (torch.tensor(each)[:, None, None] for each in IMAGENET)
    expected = (IMAGES.double() / 255 - mean.double()) / std.double()
    found = normalize_images(IMAGES, IMAGENET)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kwargs": PRETRAINED}, IMAGENET),
        ({"kwargs": {"pretrained": False}}, SYMMETRIC),
        ({"init_from": "weights.pth"}, SYMMETRIC),
        ({"mean": IMAGENET.mean}, Normalization(IMAGENET.mean)),
        (
            {"kwargs": PRETRAINED, "std": [1, 1, 1]},
            Normalization(IMAGENET.mean, (1.0, 1.0, 1.0)),
        ),
    ],
)
def test_the_config_counts_then_timms_weights(changes: dict[str, Any], expected: Any) -> None:
    assert normalization_of(config(**changes)) == expected


def test_a_run_of_before_keeps_what_it_was_trained_with() -> None:
    """What it stored has no `model.mean`; what is stored now has, if only null."""
    values = {"data": {"shards": "a"}, "model": {"name": "resnet10t", "kwargs": PRETRAINED}}
    assert normalization_of(stored_config(values).model) == SYMMETRIC
    stored = config_to_dict(Config.model_validate(values))
    assert normalization_of(stored_config(stored).model) == IMAGENET


def test_a_copy_without_the_download_keeps_it() -> None:
    settings = config(kwargs={"channels": [8, 8, 16, 16], **PRETRAINED})
    assert build_backbone(without_pretrained(settings), 16).normalization == IMAGENET


def test_an_export_carries_it_and_weights_of_another_are_refused(tmp_path: Path) -> None:
    run = tiny.trained_run(tmp_path, "unused", model={"mean": IMAGENET.mean, "std": IMAGENET.std})
    trained = load_trained_backbone(run.run.path)
    inputs = normalize_images(IMAGES, IMAGENET)
    with torch.no_grad():
        assert torch.equal(trained.embed(IMAGES), trained.model(inputs))
        assert not torch.allclose(trained.embed(IMAGES), trained.model(normalize_images(IMAGES)))
    folder = str(tmp_path / "timm")
    assert export_timm(trained.model, run, folder, IMAGES) < 1e-5
    written = json.loads(Path(folder, "config.json").read_text())["pretrained_cfg"]
    assert (tuple(written["mean"]), tuple(written["std"])) == IMAGENET
    other = build_backbone(run.model.model_copy(update={"mean": None, "std": None}), 16)
    words = r"trained with model.mean=\[0.485, 0.456, 0.406\].*this run has \[0.5, 0.5, 0.5\]"
    with pytest.raises(UserError, match=words):
        load_pretrained(other, folder)
    plain = run.model.model_copy(update={"neck": "none"})
    load_pretrained(build_backbone(plain, 16), folder)
    load_pretrained(
        build_backbone(plain.model_copy(update={"mean": None, "std": None}), 16),
        f"{folder}/model.safetensors",
    )
