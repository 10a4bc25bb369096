"""Writes a trained backbone in any format, each with a model card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor

from mhe_dist.backbone.export import (
    DEFAULT_OPTIONS,
    ExportOptions,
    compare_batches,
    export_onnx,
    export_timm,
    export_torch,
)
from pipelines.serving.mlflow_model import load_mlflow_model, write_mlflow_model
from pipelines.serving.model_card import TrainedModel, write_model_card
from pipelines.serving.output_folder import export_name, staged_export

ExportFormat = Literal["timm", "onnx", "torch-export", "mlflow", "hub-folder"]
MLFLOW_FOLDER: Final = "mlflow"
_WHOLE: Final = ("hub", MLFLOW_FOLDER)  # folders of which nothing of before stays


def write_format(
    name: ExportFormat,
    trained: TrainedModel,
    folder: str,
    images: Tensor,
    options: ExportOptions = DEFAULT_OPTIONS,
) -> tuple[str, float]:
    """Write one format into `folder`, a card and an entry of the record beside it.

    It is made beside its place, compared with the model and then takes the place of the one before;
    what goes to a store is made and compared on this machine.

    Args:
        name: of the format.
        trained: what is exported.
        folder: path or URL; gets it.
        images: uint8 `[N, 3, H, W]` to compare with.
        options: see `ExportOptions`.

    Returns:
        Its path or URL, and the largest difference from the model's embeddings.

    Raises:
        RunError: they differ too much.
        UserError: ONNX has no such operator set.
    """
    if name != "onnx":  # the MLflow model prepares images itself; the Hub's file is the usual one
        options = options._replace(pixels=False)
    path = export_name(name, options)
    called = "onnx-uint8" if options.pixels else name
    with staged_export(folder, path, called, trained, whole=path in _WHOLE) as target:
        difference = _WRITERS[name](trained, target, images, options)
    return f"{folder}/{path}", difference


def _write_timm(trained: TrainedModel, path: str, images: Tensor, options: ExportOptions) -> float:
    difference = export_timm(trained.model, trained.config, path, images)
    write_model_card(path, trained, {"timm": "."})
    return difference


def _write_onnx(trained: TrainedModel, path: str, images: Tensor, options: ExportOptions) -> float:
    return export_onnx(trained.model, trained.config, path, images, options, trained.origin())


def _write_program(
    trained: TrainedModel, path: str, images: Tensor, options: ExportOptions
) -> float:
    return export_torch(trained.model, trained.config, path, images, options, trained.origin())


def _write_mlflow(
    trained: TrainedModel, path: str, images: Tensor, options: ExportOptions
) -> float:
    """The model that takes images; compared with the pixels as it gets them."""
    example = images[0].permute(1, 2, 0).contiguous().numpy()
    onnx = f"{path}.onnx"  # which the model has a copy of
    _write_onnx(trained, onnx, images, options)
    write_mlflow_model(onnx, path, example, trained.config.model.embedding_dim)
    loaded = load_mlflow_model(path)

    def predict(inputs: Tensor) -> Tensor:
        # `images` are a batch of one or all; the model normalises what is uint8 by itself.
        pixels = images[: len(inputs)].permute(0, 2, 3, 1).numpy()
        return torch.from_numpy(loaded.predict({"image": list(pixels)}))

    write_model_card(path, trained, {"mlflow": "."})
    return compare_batches(trained.model, predict, images, path, options)


def _write_hub_folder(
    trained: TrainedModel, path: str, images: Tensor, options: ExportOptions
) -> float:
    """A folder that `huggingface_hub` uploads as it is: timm's files, an ONNX file, a card."""
    onnx = "onnx/model.onnx"
    write_model_card(path, trained, {"timm": ".", "onnx": onnx})
    return max(
        export_timm(trained.model, trained.config, path, images),
        _write_onnx(trained, f"{path}/{onnx}", images, options),
    )


_WRITERS: Final[dict[str, Callable[[TrainedModel, str, Tensor, ExportOptions], float]]] = {
    "timm": _write_timm,
    "onnx": _write_onnx,
    "torch-export": _write_program,
    "mlflow": _write_mlflow,
    "hub-folder": _write_hub_folder,
}
