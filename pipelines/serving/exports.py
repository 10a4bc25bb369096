"""Writes a trained backbone in any format, each with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from mhe_dist.backbone.export import (
    DEFAULT_OPTIONS,
    ExportOptions,
    compare_batches,
    export_onnx,
    export_timm,
    write_export,
)
from pipelines.serving.mlflow_model import load_mlflow_model, write_mlflow_model
from pipelines.serving.model_card import TrainedModel, known_exports, write_model_card
from pipelines.storage.urls import staged_folder

ExportFormat = Literal["timm", "onnx", "torch-export", "mlflow", "hub-folder"]
HUB_FOLDER, MLFLOW_FOLDER = "hub", "mlflow"


def write_format(
    name: ExportFormat,
    trained: TrainedModel,
    folder: str,
    images: Tensor,
    options: ExportOptions = DEFAULT_OPTIONS,
) -> tuple[str, float]:
    """Write one format into `folder`, and a card beside it.

    What is compared with the model lies on this machine; to a store those files go afterwards.

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
    with staged_folder(folder, replaced=(MLFLOW_FOLDER, HUB_FOLDER)) as local:
        if name == "timm":  # first: by its card an export that is broken off is known as ours
            write_model_card(f"{local}/timm", trained, {name: "."})
        if name == "mlflow":
            path, difference = _write_mlflow(trained, local, images, options)
        elif name == "hub-folder":
            path, difference = _write_hub_folder(trained, local, images, options)
        else:
            origin = trained.origin()
            path, difference = write_export(
                *(name, trained.model, trained.config, local, images, options, origin)
            )
        if name == "mlflow":
            write_model_card(path, trained, {name: "."})
    write_model_card(folder, trained, known_exports(folder))
    return f"{folder}{path.removeprefix(local)}", difference


def _write_mlflow(
    trained: TrainedModel, folder: str, images: Tensor, options: ExportOptions
) -> tuple[str, float]:
    """The model that takes images; compared with the pixels as it gets them."""
    path, config = f"{folder}/{MLFLOW_FOLDER}", trained.config
    example = images[0].permute(1, 2, 0).contiguous().numpy()
    with TemporaryDirectory() as scratch:
        file = f"{scratch}/backbone.onnx"
        export_onnx(trained.model, config, file, images, options, trained.origin())
        write_mlflow_model(file, path, example, config.model.embedding_dim)
    loaded = load_mlflow_model(path)

    def predict(inputs: Tensor) -> Tensor:
        # `images` are a batch of one or all; the model normalises what is uint8 by itself.
        pixels = images[: len(inputs)].permute(0, 2, 3, 1).numpy()
        return torch.from_numpy(loaded.predict({"image": list(pixels)}))

    return path, compare_batches(trained.model, predict, images, path, options)


def _write_hub_folder(
    trained: TrainedModel, folder: str, images: Tensor, options: ExportOptions
) -> tuple[str, float]:
    """A folder that `huggingface_hub` uploads as it is: timm's files, an ONNX file, a card."""
    path = f"{folder}/{HUB_FOLDER}"
    shutil.rmtree(path, ignore_errors=True)
    Path(path).mkdir(parents=True)
    onnx = "onnx/model.onnx"
    write_model_card(path, trained, {"timm": ".", "onnx": onnx})
    differences = (
        export_timm(trained.model, trained.config, path, images),
        export_onnx(
            *(trained.model, trained.config, f"{path}/{onnx}", images, options, trained.origin())
        ),
    )
    return path, max(differences)
