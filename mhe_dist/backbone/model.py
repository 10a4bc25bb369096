"""The backbone: a timm model whose classifier is the embedding layer, and an optional neck."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mhe_dist.backbone.iresnet
from mhe_dist.backbone.compiler import missing_compiler
from mhe_dist.backbone.ema import backbone_weights
from mhe_dist.config.schema import ModelConfig
from mhe_dist.errors import UserError

SHORTEST_ROW = 0.02  # of an embedding layer's weights; timm's classifiers have 0.2 and more


class Backbone(nn.Module):
    """Images `[B, 3, H, W]` -> embeddings `[B, D]`.

    Attributes:
        net: the timm model; its classifier has D outputs.
        neck: BatchNorm1d over the embedding, or the identity.
    """

    def __init__(self, net: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.neck = neck

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings in float32, whatever autocast makes of the net."""
        return self.neck(self.net(images).float())


def normalize_images(images: Tensor) -> Tensor:
    """What a backbone is fed with: uint8 `[B, 3, H, W]` -> float32 in [-1, 1], channels last.

    Channels last is what convolutions like.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    return images.float().div_(127.5).sub_(1.0)


def compile_in_place(model: nn.Module, device: torch.device) -> None:
    """Compile what a call of `model` does, at its first call; names and copies stay as they are.

    Raises:
        UserError: that needs a compiler, and there is none.
    """
    if missing := missing_compiler(device.type == "cuda"):
        raise UserError(missing)
    model.compile()


def timm_arguments(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` beside name and `num_classes`; they suit JSON.

    Models made for one image size (ViT and kin) are told ours; the others refuse to be told.
    """
    arguments = dict(config.kwargs)
    cfg = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    if cfg is not None and cfg.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    return arguments


def build_backbone(config: ModelConfig, image_size: int) -> Backbone:
    """Make the backbone of a config with fresh weights, drawn from torch's generator.

    Args:
        config: the `model` section.
        image_size: side of the images in pixels.

    Raises:
        UserError: unknown model, arguments that it refuses, or a neck that cannot be folded.
    """
    check_model_name(config.name)
    arguments = timm_arguments(config, image_size)
    try:
        net = timm.create_model(config.name, num_classes=config.embedding_dim, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"model.kwargs={config.kwargs}: {config.name} does not accept them for images of "
            f"{image_size} pixels: {error}"
        ) from error
    _refresh_embedding_layer(net)
    if config.grad_checkpointing:
        try:
            net.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"model.grad_checkpointing=true: {config.name} does not offer it"
            ) from error
    if config.neck == "none":
        return Backbone(net, nn.Identity())
    if isinstance(net, mhe_dist.backbone.iresnet.IResNet):
        raise UserError(
            f"model.neck=batchnorm: {config.name} ends with a BatchNorm of its own; use "
            f"model.neck=none"
        )
    layer = _classifier(net)
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise UserError(
            f"model.neck=batchnorm: the classifier of {config.name} is not one linear layer with "
            f"a bias, which the neck could be folded into; use model.neck=none"
        )
    return Backbone(net, nn.BatchNorm1d(config.embedding_dim))


def check_model_name(name: str) -> None:
    """Refuse a name that timm does not know, with its nearest relatives.

    Raises:
        UserError: unknown name.
    """
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() names all"
    raise UserError(f"model.name={name}: timm has no such model{hint}")


def restore_backbone(config: ModelConfig, image_size: int, tensors: dict[str, Tensor]) -> Backbone:
    """A plain copy of a trained backbone on the CPU, in evaluation mode.

    Args:
        config: the `model` section.
        image_size: side of the images in pixels.
        tensors: `Engine.state()` or the same from a checkpoint; names other than `model.*` and
            `ema.*` are ignored.

    Raises:
        UserError: the tensors are not those of this model.
    """
    # Its fresh weights are overwritten, so they must not advance the run's generator.
    # Nor is there a backward pass to save memory for.
    config = config.model_copy(update={"grad_checkpointing": False})
    with torch.random.fork_rng(devices=[]):
        model = build_backbone(config, image_size)
    try:
        model.load_state_dict(backbone_weights(tensors))
    except RuntimeError as error:
        raise UserError(f"model.name={config.name} does not fit the weights: {error}") from error
    return model.eval()


@torch.no_grad()
def fold_neck(model: Backbone) -> nn.Module:
    """The timm model alone, its classifier changed so that it does what classifier and neck did.

    The running statistics make the BatchNorm an affine map; `model` itself stays as it is.
    """
    net = copy.deepcopy(model.net).eval()
    neck = model.neck
    if not isinstance(neck, nn.BatchNorm1d):
        return net
    layer = _classifier(net)
    assert isinstance(layer, nn.Linear) and layer.bias is not None
    assert neck.running_mean is not None and neck.running_var is not None
    scale = neck.weight.double() / torch.sqrt(neck.running_var.double() + neck.eps)
    bias = (layer.bias.double() - neck.running_mean.double()) * scale + neck.bias.double()
    layer.weight.copy_(layer.weight.double() * scale[:, None])
    layer.bias.copy_(bias)
    return net


@torch.no_grad()
def _refresh_embedding_layer(net: nn.Module) -> None:
    """Draw the embedding layer anew where its weights are zero, or nearly.

    As a classifier it may begin there. But a head looks at the direction of an embedding: that of
    zero has no gradient, and that of a tiny one a huge one. The new rows have length 1.
    """
    found = _classifier(net) if hasattr(net, "get_classifier") else None
    parts = nn.ModuleList(found if isinstance(found, tuple | list) else [found])
    for layer in parts.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            rows = layer.weight.flatten(1)
            if rows.norm(dim=1).mean() < SHORTEST_ROW:
                nn.init.normal_(layer.weight, std=rows.shape[1] ** -0.5)


def _classifier(net: nn.Module) -> nn.Module:
    return net.get_classifier()  # type: ignore[operator]
