"""One forward and backward pass before a run begins: a backbone that cannot train is refused here.

A mistake in a name, an argument or a size shows in the first pass on every machine; found
later it would look like a failure of the machine, and be tried again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhe_dist.backbone.model import Backbone, embedding_layer
from mhe_dist.backbone.normalization import normalize_images
from mhe_dist.config.schema import Config, ModelConfig
from mhe_dist.engine.settings import resolve_precision, set_float_kernels
from mhe_dist.errors import UserError, first_line

TRIAL_IMAGES = 2
_OUTPUT_ARGUMENTS = ("features_only", "global_pool", "num_classes")  # of timm.create_model
_NOT_FOLDABLE = (
    "model.neck=batchnorm: {name} puts out something else than its classifier does, so that the "
    "neck cannot be folded into that at the export; use model.neck=none"
)


def refuse_untrainable(model: Backbone, config: Config, images: Tensor) -> None:
    """Try a pass over at most two images, on the device of the model, in the run's precision.

    Weights, buffers, mode and generators are afterwards what they were before.

    Args:
        model: the backbone that the run begins with.
        config: of the run.
        images: uint8 `[n, 3, H, W]`, the first ones of the data.

    Raises:
        UserError: the backbone cannot train; says why and what to change.
    """
    device = next(model.parameters()).device
    precision = resolve_precision(config.train.precision, device)
    set_float_kernels(precision)
    images = images[: min(TRIAL_IMAGES, config.train.micro_batch)].to(device)
    with _undone(model, device), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        try:
            with _watched(model.net) as (put_out, one_pixel):
                images = model.arrange(normalize_images(images, model.normalization))
                found = model.train().net(images)
            _refuse_other_shape(found, len(images), config.model)
            if isinstance(model.neck, nn.BatchNorm1d) and not _is_last(found, put_out):
                raise UserError(_NOT_FOLDABLE.format(name=config.model.name))
            if one_pixel and precision == "bf16" and device.type == "cpu":
                raise UserError(_too_small(one_pixel[0], config))
            embeddings = found.float()
            # Of a sum of squares BatchNorm would have no gradient.
            noise = torch.rand_like(embeddings)
            ((embeddings + model.neck(embeddings)) * noise).sum().backward()
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what other people's networks raise is not known
            raise UserError(_explain(error, config, len(images))) from error
        _refuse_bad_numbers(model, embeddings, config.model)


@contextmanager
def _undone(model: Backbone, device: torch.device) -> Iterator[None]:
    """Undo what a pass does: statistics, gradients, mode, draws."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    mode = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            yield
        finally:
            model.train(mode)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for parameter in model.parameters():
                parameter.grad = None


@contextmanager
def _watched(net: nn.Module) -> Iterator[tuple[list[Tensor], list[str]]]:
    """What the embedding layer puts out, and the strided convolutions that see a single pixel."""
    put_out: list[Tensor] = []
    one_pixel: list[str] = []

    def note_output(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        put_out.append(output)

    def note_size(layer: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        if inputs[0].shape[2:] == (1, 1):
            one_pixel.append(name)

    hooks = []
    if isinstance(last := embedding_layer(net), nn.Module):
        hooks.append(last.register_forward_hook(note_output))
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and max(layer.kernel_size) > 1:
            hooks.append(layer.register_forward_pre_hook(partial(note_size, name=name)))
    try:
        yield put_out, one_pixel
    finally:
        for hook in hooks:
            hook.remove()


def _is_last(found: Tensor, put_out: list[Tensor]) -> bool:
    return bool(put_out) and torch.equal(found, put_out[-1])


def _too_small(layer: str, config: Config) -> str:
    """torch 2.14 on CPUs takes the gradient of such a layer from memory that nobody wrote."""
    return (
        f"data.image_size={config.data.image_size} is too small for {config.model.name} in bf16: "
        f"its layer {layer} sees a single pixel, and CPUs compute a wrong gradient of it in bf16; "
        "give larger images, or train.precision=float32"
    )


def _refuse_other_shape(found: Any, count: int, config: ModelConfig) -> None:
    if isinstance(found, Tensor) and found.shape == (count, config.embedding_dim):
        return
    shape = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise UserError(
        f"model.name={config.name} with model.kwargs={config.kwargs} gives {shape} instead of "
        f"embeddings [{count}, {config.embedding_dim}]{_cure(config) or '; take another network'}"
    )


def _cure(config: ModelConfig) -> str:
    """Which arguments to leave out, because they change what the network puts out."""
    return "".join(f"; leave out {name}" for name in _OUTPUT_ARGUMENTS if name in config.kwargs)


def _refuse_bad_numbers(model: Backbone, embeddings: Tensor, config: ModelConfig) -> None:
    name = f"model.name={config.name} with model.kwargs={config.kwargs}"
    if not embeddings.isfinite().all():
        raise UserError(f"{name} gives embeddings that are not finite on the first images")
    if not embeddings.any():
        cure = " (see model.init_from)" if config.init_from else ""
        raise UserError(
            f"{name} gives every image the embedding 0: it cannot learn from that{cure}"
        )
    gradients = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    if not gradients:
        raise UserError(f"{name} has no weight that gets a gradient: nothing would be trained")
    for weight, gradient in gradients:
        if not gradient.isfinite().all():
            raise UserError(f"{name}: the first gradient of {weight} is not finite")


def _explain(error: Exception, config: Config, count: int) -> str:
    model, side = config.model, config.data.image_size
    reason = first_line(error)
    if count == 1 and "more than 1 value per channel" in reason:
        return (
            f"train.micro_batch=1: {model.name} normalises over the micro-batch (BatchNorm), and "
            "one image has no deviation; give at least 2, or a network without BatchNorm and "
            "model.neck=none"
        )
    return (
        f"model.name={model.name} with model.kwargs={model.kwargs} cannot train on images of "
        f"3 x {side} x {side} (data.image_size={side}): {type(error).__name__}: {reason}"
        f"{_cure(model)}"
    )
