"""IResNet, the residual network of InsightFace for faces of 112x112, as timm models.

`iresnet10`, `18`, `34`, `50`, `100` and `200` after "Improved Residual Networks" (Duta et al.,
2020) and ArcFace: BatchNorm before each block, PReLU, no pooling before the embedding layer, a
BatchNorm of fixed scale behind it. Parameters are called as in arcface_torch, so that its released
weights load as they are. Whoever loads an exported folder with timm imports this module first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

_EPS = 1e-5
_WIDTHS = (64, 128, 256, 512)
_STRIDES = (2, 2, 2, 2)  # a face of 112 pixels becomes 7x7
BLOCKS: Final = {  # of the four stages
    "iresnet10": (1, 1, 1, 1),
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}


class IBasicBlock(nn.Module):
    """Norm, convolution, norm, PReLU, convolution of the stride, norm; plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, eps=_EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=_EPS)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps=_EPS)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs, eps=_EPS))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W]` -> `[B, outputs, H / stride, W / stride]`."""
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out = self.bn3(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """Images `[B, C, S, S]` -> embeddings `[B, num_classes]`.

    Args:
        layers: blocks of the four stages.
        num_classes: D, the width of the embedding; 0: the flattened features of the body.
        in_chans: C.
        img_size: S, or height and width, multiples of all strides together; it fixes the size of
            the embedding layer.
        drop_rate: of the dropout before the embedding layer.
        widths: channels of the four stages; the stem has those of the first one.
        strides: of the four stages.
        stem_stride: of the stem's convolution; 2 takes half the time, and loses the finest detail.

    Raises:
        ValueError: `img_size` is no such multiple, or there are not four stages.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 512,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 112,
        drop_rate: float = 0.0,
        widths: Sequence[int] = _WIDTHS,
        strides: Sequence[int] = _STRIDES,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if not len(layers) == len(widths) == len(strides) == len(_WIDTHS):
            raise ValueError(f"layers={layers}, widths={widths}, strides={strides}: give four each")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        stride = stem_stride * math.prod(strides)
        if height % stride or width % stride:
            raise ValueError(f"img_size={img_size} is not a multiple of {stride}")
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = (
            widths[-1] * (height // stride) * (width // stride)
        )
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0], eps=_EPS)
        self.prelu = nn.PReLU(widths[0])
        inputs = (widths[0], *widths)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(inputs[stage], widths[stage], strides[stage], blocks)
            for stage, blocks in enumerate(layers)
        )
        self.bn2 = nn.BatchNorm2d(widths[-1], eps=_EPS)
        self.dropout = nn.Dropout(drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new embedding layer of that width, or none."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        self.features: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes)
            self.features = nn.BatchNorm1d(num_classes, eps=_EPS)
            # The head looks at directions; a scale per dimension would only fight it.
            self.features.weight.requires_grad_(False)

    def get_classifier(self) -> nn.Module:
        """The embedding layer."""
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the stages' inputs and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """The body: `[B, 512, S / 16, S / 16]` with the default widths and strides."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return self.bn2(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The embedding `[B, num_classes]`; with `pre_logits` what goes into its layer."""
        x = self.dropout(torch.flatten(x, 1))
        return x if pre_logits else self.features(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.forward_head(self.forward_features(x))


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    rest = [IBasicBlock(outputs, outputs) for _ in range(blocks - 1)]
    return nn.Sequential(IBasicBlock(inputs, outputs, stride), *rest)


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 512,
        "input_size": (3, 112, 112),
        "fixed_input_size": True,
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "conv1",
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in BLOCKS})


def _create(name: str, pretrained: bool, kwargs: Any) -> IResNet:
    model: IResNet = build_model_with_cfg(IResNet, name, pretrained, layers=BLOCKS[name], **kwargs)
    return model


@register_model
def iresnet10(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """One block in each stage, with `widths=(16, 32, 64, 128)` for small pictures."""
    return _create("iresnet10", pretrained, kwargs)


@register_model
def iresnet18(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """24 M parameters."""
    return _create("iresnet18", pretrained, kwargs)


@register_model
def iresnet34(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """34 M parameters."""
    return _create("iresnet34", pretrained, kwargs)


@register_model
def iresnet50(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """44 M parameters."""
    return _create("iresnet50", pretrained, kwargs)


@register_model
def iresnet100(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """65 M parameters."""
    return _create("iresnet100", pretrained, kwargs)


@register_model
def iresnet200(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """119 M parameters."""
    return _create("iresnet200", pretrained, kwargs)
