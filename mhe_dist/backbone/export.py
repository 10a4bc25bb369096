"""The trained backbone for others: timm, ONNX, torch.export; each compared with the model.

All hold the timm model alone: the neck is folded into the embedding layer, so nothing needs this
project to be read (but a timm folder of an IResNet, which timm does not know: import
`mhe_dist.backbone.iresnet` first). Images go in as `(x / 255 - mean) / std`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from mhe_dist.backbone.model import (
    Backbone,
    fold_neck,
    timm_arguments,
    without_pretrained,
)
from mhe_dist.backbone.normalization import Normalization, normalize_images
from mhe_dist.backbone.shared_tensors import write_shared_apart
from mhe_dist.backbone.traced import write_onnx, write_program
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError

TIMM_TOLERANCE, ONNX_TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-3, 2e-2


class ExportOptions(NamedTuple):
    """How a file is written.

    Attributes:
        opset: ONNX operator set; 0: the exporter's own choice.
        half: ONNX computes in float16; images and embeddings stay float32.
        normalise: embeddings get length 1; not in the timm folder, which holds a plain timm model.
        pixels: ONNX takes uint8 `[N, H, W, 3]`, as image readers give them, and normalises them.
    """

    opset: int = 0
    half: bool = False
    normalise: bool = False
    pixels: bool = False


DEFAULT_OPTIONS = ExportOptions()


def export_metadata(
    model: Backbone, config: Config, options: ExportOptions, origin: Mapping[str, str]
) -> dict[str, str]:
    """What an ONNX file and a `.pt2` program say of themselves; lists and numbers are JSON.

    Args:
        model, config, options: of the export.
        origin: where it comes from: `step`, `data_digest`.
    """
    return {
        "image_size": str(config.data.image_size),
        "mean": json.dumps(list(model.normalization.mean)),
        "std": json.dumps(list(model.normalization.std)),
        "channel_order": "RGB",
        "layout": "NHWC" if options.pixels else "NCHW",
        "input": "pixels, uint8" if options.pixels else "(pixels / 255 - mean) / std",
        "embedding_dim": str(config.model.embedding_dim),
        "unit_length": json.dumps(options.normalise),
        "architecture": config.model.name,
        "run": config.run.name,
        **origin,
    }


def export_timm(model: Backbone, config: Config, folder: str, images: Tensor) -> float:
    """Write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        model: in evaluation mode, on the CPU.
        config: of the run; `model` and `data.image_size` are looked at.
        folder: gets `model.safetensors` and `config.json`; what is there is overwritten.
        images: uint8 `[N, 3, H, W]` to compare with.

    Returns:
        The largest difference between the folder's embeddings and the model's.

    Raises:
        RunError: an element differs by more than 1e-4 of its scale (`_scales`).
    """
    from timm.models import save_for_hf

    size, dim = config.data.image_size, config.model.embedding_dim
    arguments = timm_arguments(without_pretrained(config.model), size)
    net = fold_neck(model)
    net.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": config.model.name,
        "input_size": (3, size, size),
        "mean": model.normalization.mean,
        "std": model.normalization.std,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "num_classes": dim,
        # timm replaces this layer when asked for another number of classes, or for none.
        "classifier": model.net.pretrained_cfg["classifier"],  # type: ignore[index]
    }
    write_shared_apart(net)
    save_for_hf(
        net,
        folder,
        model_config={"num_classes": dim},
        model_args=arguments,
        safe_serialization=True,
    )
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return _compare(model, loaded, [images], model.normalization, folder, TIMM_TOLERANCE)


def export_onnx(
    model: Backbone,
    config: Config,
    path: str,
    images: Tensor,
    options: ExportOptions = DEFAULT_OPTIONS,
    origin: Mapping[str, str] = MappingProxyType({}),
) -> float:
    """Write an ONNX file with input `images` `[N, 3, H, W]` and output `embeddings` `[N, D]`.

    With `options.pixels` the input is uint8 `[N, H, W, 3]`.

    Args:
        model, config, images: as for `export_timm`.
        path: of the file; its folder is made.
        options: see `ExportOptions`.
        origin: see `export_metadata`.

    Returns:
        The largest difference between ONNX Runtime's embeddings and the model's, over a batch of
        one and a batch of all images.

    Raises:
        RunError: an element differs by more than 1e-3 of its scale (float16: 2e-2).
        UserError: the exporter has no such operator set.
    """
    run = write_onnx(
        ExportedBackbone(fold_neck(model), options, model.normalization),
        example_images(config, options.pixels),
        path,
        ["embeddings"],
        export_metadata(model, config, options, origin),
        options.opset,
    )

    def embed(batch: Tensor) -> Tensor:
        if options.pixels:  # of the same images, which `batch` are one or all of
            batch = images[: len(batch)].permute(0, 2, 3, 1).contiguous()
        return run(batch)[0]

    return compare_batches(model, embed, images, path, options)


def export_torch(
    model: Backbone,
    config: Config,
    path: str,
    images: Tensor,
    options: ExportOptions = DEFAULT_OPTIONS,
    origin: Mapping[str, str] = MappingProxyType({}),
) -> float:
    """Write a program for `torch.export.load(PATH).module()`, which needs torch alone.

    Args:
        model, config, images, path, options, origin: as for `export_onnx`; always float32. The
            metadata are in the file as `metadata.json`, see `torch.export.load(extra_files=...)`.

    Returns:
        The largest difference, as for `export_onnx`.

    Raises:
        RunError: as for `export_onnx`.
    """
    options = options._replace(half=False, pixels=False)
    embed = write_program(
        ExportedBackbone(fold_neck(model), options, model.normalization),
        example_images(config),
        path,
        export_metadata(model, config, options, origin),
    )
    return compare_batches(model, embed, images, path, options)


class ExportedBackbone(nn.Module):
    """The folded model, float32 from outside, with what the options add."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: nn.Module, options: ExportOptions, normalization: Normalization
    ) -> None:
        super().__init__()
        self.net = net.half() if options.half else net
        self.options = options
        for name, values in zip(("mean", "std"), normalization, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, 3, H, W]`, or pixels `[N, H, W, 3]`, -> `[N, D]`."""
        if self.options.pixels:
            images = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        embeddings = self.net(images.half() if self.options.half else images).float()
        return nn.functional.normalize(embeddings) if self.options.normalise else embeddings


def example_images(config: Config, pixels: bool = False) -> Tensor:
    """Two images to trace with."""
    side = config.data.image_size
    if pixels:
        return torch.zeros(2, side, side, 3, dtype=torch.uint8)
    return torch.zeros(2, 3, side, side)


def compare_batches(
    model: Backbone,
    exported: Callable[[Tensor], Tensor],
    images: Tensor,
    path: str,
    options: ExportOptions,
) -> float:
    """The largest difference over a batch of one and a batch of all images.

    Args:
        model: the trained one.
        exported: normalised images, float32 `[N, 3, H, W]`, to embeddings.
        images: uint8 `[N, 3, H, W]`.
        path: of the export, for the message.
        options: of the export.

    Raises:
        RunError: they differ by more than the format's tolerance.
    """
    tolerance = HALF_TOLERANCE if options.half else ONNX_TOLERANCE

    def trained(inputs: Tensor) -> Tensor:
        found: Tensor = model(inputs)
        return nn.functional.normalize(found) if options.normalise else found

    batches = [images, images[:1]]
    return _compare(trained, exported, batches, model.normalization, path, tolerance)


@torch.no_grad()
def _compare(
    model: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    batches: list[Tensor],
    normalization: Normalization,
    path: str,
    tolerance: float,
) -> float:
    """Largest difference of the embeddings of some batches, the first of which has all images.

    Raises:
        RunError: an element differs by more than `tolerance` of its scale; or there is nothing to
            compare, because all embeddings are 0.
    """
    largest, scales = 0.0, None
    for images in batches:
        inputs = normalize_images(images, normalization)
        expected = model(inputs)
        scales = _scales(expected, path) if scales is None else scales
        differences = (exported(inputs) - expected).abs()
        if not (worst := (differences / scales).max().item()) <= tolerance:
            raise RunError(
                f"{path}: embeddings differ from the trained model's by {differences.max():.2e}, "
                f"an element by {worst:.2e} of its own scale ({tolerance:.0e} is allowed)"
            )
        largest = max(largest, differences.max().item())
    return largest


def _scales(embeddings: Tensor, path: str) -> Tensor:
    """What a difference of each element is measured by `[D]`: its largest value in `[N, D]`.

    An element that is next to nothing everywhere is measured by a hundredth of the largest one.

    Raises:
        RunError: there is nothing to compare: an embedding is not finite, or all are 0.
    """
    scales = embeddings.abs().amax(0)
    if not scales.isfinite().all():
        raise RunError(
            f"{path}: the trained model's own embeddings are not finite; its first steps were too "
            "large (optim.lr, optim.clip_norm, optim.warmup_steps)"
        )
    if not scales.any():
        raise RunError(f"{path}: the trained model gives every image the embedding 0")
    return scales.clamp_min(scales.max().item() / 100)
