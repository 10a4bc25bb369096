"""How the pixels of an image become what a backbone is fed with."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from mhe_dist.config.schema import ModelConfig

Triple = tuple[float, float, float]
_HALF: Triple = (0.5, 0.5, 0.5)


class Normalization(NamedTuple):
    """Of each channel, red, green, blue, in [0, 1]: what is subtracted, and then divided by."""

    mean: Triple = _HALF
    std: Triple = _HALF

    def to_dict(self) -> dict[str, list[float]]:
        """As JSON holds it."""
        return {"mean": list(self.mean), "std": list(self.std)}


SYMMETRIC = Normalization()
"""Images in [-1, 1]."""


def normalization_of(config: ModelConfig) -> Normalization:
    """What `model.mean` and `model.std` say; else what timm's weights were trained with; else 0.5.

    Only weights that `model.kwargs={pretrained: true}` asks for count. Nothing is downloaded.
    """
    published: Any = None
    if config.kwargs.get("pretrained"):
        published = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    mean = config.mean or (published.mean if published else None)
    std = config.std or (published.std if published else None)
    return Normalization(_triple(mean), _triple(std))


def recorded_normalization(cfg: dict[str, Any]) -> Normalization | None:
    """What the `pretrained_cfg` of a timm folder says; None: nothing."""
    if "mean" not in cfg or "std" not in cfg:
        return None
    return Normalization(_triple(cfg["mean"]), _triple(cfg["std"]))


def _triple(values: Any) -> Triple:
    red, green, blue = map(float, values or _HALF)
    return red, green, blue


def normalize_images(images: Tensor, normalization: Normalization = SYMMETRIC) -> Tensor:
    """What a backbone is fed with: uint8 `[B, 3, H, W]` -> float32 of that shape, channels last.

    Channels last is what convolutions like; `Backbone` takes it back where a layer does not. The
    constants are numbers, not tensors, so that no step waits for a copy to a GPU.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if normalization == SYMMETRIC:
        return images.float().div_(127.5).sub_(1.0)
    pixels = images.float().div_(255.0)
    for channel, (mean, std) in enumerate(zip(*normalization, strict=True)):
        pixels[:, channel].sub_(mean).div_(std)
    return pixels
