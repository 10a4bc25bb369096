"""The backbone: a timm model whose classifier is the embedding layer, and an optional neck."""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mhe_dist.backbone.iresnet
from mhe_dist.backbone.compiler import missing_compiler
from mhe_dist.backbone.ema import backbone_weights
from mhe_dist.backbone.hub import prompt_hub
from mhe_dist.backbone.normalization import SYMMETRIC, Normalization, normalization_of
from mhe_dist.backbone.shared_tensors import with_shared_names
from mhe_dist.config.schema import ModelConfig
from mhe_dist.errors import UserError, first_line

logger = logging.getLogger(__name__)

SHORTEST_ROW = 0.02  # of an embedding layer's weights; timm's classifiers have 0.2 and more


class Backbone(nn.Module):
    """Images `[B, 3, H, W]` -> embeddings `[B, D]`.

    Attributes:
        net: the timm model; its classifier has D outputs.
        neck: BatchNorm1d over the embedding, or the identity.
        unsafe_layer: name of a layer that must not see channels last on a CPU; or empty.
        normalization: of the images.
    """

    def __init__(
        self, net: nn.Module, neck: nn.Module, normalization: Normalization = SYMMETRIC
    ) -> None:
        super().__init__()
        self.net = net
        self.neck = neck
        self.unsafe_layer = _unsafe_layer(net)
        self.normalization = normalization

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings in float32, whatever autocast makes of the net."""
        return self.neck(self.net(self.arrange(images)).float())

    def arrange(self, images: Tensor) -> Tensor:
        """The images in a memory layout that all layers can work with."""
        if self.unsafe_layer and images.device.type == "cpu":
            return images.contiguous()
        return images


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
    net = _create(config, image_size)
    _refresh_embedding_layer(net)
    if config.grad_checkpointing:
        try:
            net.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"model.grad_checkpointing=true: {config.name} does not offer it"
            ) from error
    normalization = normalization_of(config)
    if config.neck == "none":
        return Backbone(net, nn.Identity(), normalization)
    if isinstance(net, mhe_dist.backbone.iresnet.IResNet):
        raise UserError(
            f"model.neck=batchnorm: {config.name} ends with a BatchNorm of its own; use "
            f"model.neck=none"
        )
    layer = embedding_layer(net)
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise UserError(
            f"model.neck=batchnorm: the classifier of {config.name} is not one linear layer with "
            f"a bias, which the neck could be folded into; use model.neck=none"
        )
    return Backbone(net, nn.BatchNorm1d(config.embedding_dim), normalization)


def _create(config: ModelConfig, image_size: int) -> nn.Module:
    """The timm model of a config."""
    arguments = timm_arguments(config, image_size)
    if (channels := arguments.get("in_chans", 3)) != 3:
        raise UserError(
            f"model.kwargs={config.kwargs}: in_chans={channels}, but images have 3 channels, grey "
            "ones too; leave it out"
        )
    if (path := arguments.get("checkpoint_path")) and not Path(path).exists():
        raise UserError(
            f"model.kwargs={config.kwargs}: checkpoint_path={path} does not exist; it is a file of "
            "timm's weights on each host (model.init_from takes URLs, too)"
        )
    try:
        with prompt_hub() if arguments.get("pretrained") else nullcontext():
            return timm.create_model(config.name, num_classes=config.embedding_dim, **arguments)
    except OSError as error:
        raise UserError(
            f"model.kwargs={config.kwargs}: the weights of {config.name} cannot be had: "
            f"{first_line(error)}; put them into the cache of this host (HF_HOME) while it is "
            "connected, give a file by checkpoint_path or model.init_from, or leave pretrained out"
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"model.kwargs={config.kwargs}: {config.name} does not accept them for images of "
            f"{image_size} pixels: {error}"
        ) from error


def without_pretrained(config: ModelConfig) -> ModelConfig:
    """The same network with fresh weights, for whoever overwrites or only counts them."""
    kwargs = {k: v for k, v in config.kwargs.items() if k not in ("pretrained", "checkpoint_path")}
    how = normalization_of(config)  # which follows from what is left out
    return config.model_copy(update={"kwargs": kwargs, "mean": how.mean, "std": how.std})


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
    config = without_pretrained(config).model_copy(update={"grad_checkpointing": False})
    with torch.random.fork_rng(devices=[]):
        model = build_backbone(config, image_size)
    try:
        model.load_state_dict(with_shared_names(model, backbone_weights(tensors)))
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
    layer = embedding_layer(net)
    assert isinstance(layer, nn.Linear) and layer.bias is not None
    assert neck.running_mean is not None and neck.running_var is not None
    scale = neck.weight.double() / torch.sqrt(neck.running_var.double() + neck.eps)
    bias = (layer.bias.double() - neck.running_mean.double()) * scale + neck.bias.double()
    layer.weight.copy_(layer.weight.double() * scale[:, None])
    layer.bias.copy_(bias)
    return net


def _unsafe_layer(net: nn.Module) -> str:
    """The first layer whose backward pass writes beyond its memory with channels last on a CPU.

    Seen in torch 2.14 on processors with AVX2: a convolution of 1 x 1 with a stride, of fewer than
    8 channels (the stem of FastViT); the process dies by a signal. Twice that many are taken as
    unsafe, for processors whose vectors are twice as long.
    """
    for name, layer in net.named_modules():
        if (
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (1, 1)
            and layer.stride != (1, 1)
            and layer.in_channels < 16
        ):
            logger.info("on a CPU the images stay channels first, because of the layer %s", name)
            return name
    return ""


@torch.no_grad()
def _refresh_embedding_layer(net: nn.Module) -> None:
    """Draw the embedding layer anew where its weights are zero, or nearly.

    As a classifier it may begin there. But a head looks at the direction of an embedding: that of
    zero has no gradient, and that of a tiny one a huge one. The new rows have length 1.
    """
    found = embedding_layer(net)
    parts = found if isinstance(found, tuple | list) else [found]
    for layer in (layer for part in parts if part is not None for layer in part.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.is_meta:
            rows = layer.weight.flatten(1)
            if rows.norm(dim=1).mean() < SHORTEST_ROW:
                nn.init.normal_(layer.weight, std=rows.shape[1] ** -0.5)


def embedding_layer(net: nn.Module) -> Any:
    """What timm calls the classifier: a layer, or several; None where the network knows none."""
    return net.get_classifier() if hasattr(net, "get_classifier") else None  # type: ignore[operator]


def digest_model(model: nn.Module) -> str:
    """`sha256:...` of the names, types, shapes and values of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
