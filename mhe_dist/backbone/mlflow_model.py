"""The exported ONNX file as an MLflow model: with a signature and an example of its input."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
from torch import Tensor

from mhe_dist.backbone.model import normalize_images


def write_mlflow_model(onnx_file: str, folder: str, images: Tensor, width: int) -> str:
    """Write the folder of an MLflow model of the flavour `onnx`.

    Args:
        onnx_file: what `export.export_onnx` wrote.
        folder: gets the model; replaced if it is there.
        images: uint8 `[N, 3, H, W]`, the first of which becomes the example.
        width: D, of the embeddings.

    Returns:
        `folder`.
    """
    import mlflow.onnx
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model = onnx.load(onnx_file)
    example = normalize_images(images[:1]).contiguous().numpy()
    number = np.dtype(np.float32)
    signature = ModelSignature(
        Schema([TensorSpec(number, (-1, *example.shape[1:]), model.graph.input[0].name)]),
        Schema([TensorSpec(number, (-1, width), model.graph.output[0].name)]),
    )
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    mlflow.onnx.save_model(
        model,
        folder,
        signature=signature,
        input_example={model.graph.input[0].name: example},
        pip_requirements=[
            f"{name}=={metadata.version(name)}" for name in ("onnx", "onnxruntime", "numpy")
        ],
        save_as_external_data=False,
    )
    return folder
