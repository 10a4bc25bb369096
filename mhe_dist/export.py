"""The trained backbone for others: a timm folder and an ONNX file, each compared with the model.

Both hold the timm model alone: the neck is folded into the embedding layer, so no file needs this
project to be read. Images go in as `(x / 255 - 0.5) / 0.5`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import Tensor, nn

from mhe_dist.backbone import Backbone, fold_neck, model_arguments, pixels
from mhe_dist.config import Config
from mhe_dist.errors import RunError

Format = Literal["timm", "onnx"]

LARGEST_BATCH = 4096  # an upper bound is needed for a free batch size; nothing is allocated for it
TIMM_TOLERANCE, ONNX_TOLERANCE = 1e-4, 1e-3


def write(
    name: Format, model: Backbone, config: Config, folder: str, images: Tensor
) -> tuple[str, float]:
    """Write one format into `folder`: its path there, and the largest difference; see below."""
    if name == "timm":
        path = f"{folder}/timm"
        return path, export_timm(model, config, path, images)
    path = f"{folder}/backbone.onnx"
    return path, export_onnx(model, config, path, images)


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
        RunError: they differ by more than 1e-4 of the largest embedding value.
    """
    from timm.models import save_for_hf

    size, dim = config.data.image_size, config.model.embedding_dim
    arguments = model_arguments(config.model, size)
    net = fold_neck(model)
    net.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": config.model.name,
        "input_size": (3, size, size),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "num_classes": dim,
        # timm replaces this layer when asked for another number of classes, or for none.
        "classifier": model.net.pretrained_cfg["classifier"],  # type: ignore[index]
    }
    save_for_hf(
        net,
        folder,
        model_config={"num_classes": dim},
        model_args=arguments,
        safe_serialization=True,
    )
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return _compare(model, loaded, images, folder, TIMM_TOLERANCE)


def export_onnx(model: Backbone, config: Config, path: str, images: Tensor) -> float:
    """Write an ONNX file with input `images` `[N, 3, H, W]` and output `embeddings` `[N, D]`.

    Args:
        model, config, images: as for `export_timm`.
        path: of the file; its folder is made.

    Returns:
        The largest difference between ONNX Runtime's embeddings and the model's, over a batch of
        one and a batch of all images.

    Raises:
        RunError: they differ by more than 1e-3 of the largest embedding value.
    """
    import onnxruntime

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.tmp"
    example = torch.zeros(2, 3, config.data.image_size, config.data.image_size)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            fold_neck(model),
            (example,),
            temporary,
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["images"],
            output_names=["embeddings"],
            external_data=False,
            verbose=False,
        )
    os.replace(temporary, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])

    return max(
        _compare(model, run, images[:1], path, ONNX_TOLERANCE),
        _compare(model, run, images, path, ONNX_TOLERANCE),
    )


@torch.no_grad()
def _compare(
    model: nn.Module,
    exported: Callable[[Tensor], Tensor],
    images: Tensor,
    path: str,
    tolerance: float,
) -> float:
    """Largest difference of the embeddings; refuses more than `tolerance` of their size."""
    inputs = pixels(images)
    expected = model(inputs)
    difference = (exported(inputs) - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise RunError(f"{path}: embeddings differ from the trained model's by {difference:.2e}")
    return difference
