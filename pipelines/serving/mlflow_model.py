"""The exported ONNX file as an MLflow model that takes images; it needs nothing of this project."""

from __future__ import annotations

import base64
import io
import re
import shutil
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from mhe_dist.config.data import MAX_PIXELS
from mhe_dist.tracking.mlflow import quiet_mlflow
from pipelines.data import decode

_SCRIPT: Final = "image_model.py"
_NEEDS: Final = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow", "simplejpeg")
_FUTURE: Final = "from __future__ import annotations\n"


def write_mlflow_model(
    onnx_file: str,
    folder: str,
    example: npt.NDArray[np.uint8],
    width: int,
    classes: str | None = None,
) -> str:
    """Write the folder of an MLflow model of the flavour `python_function`.

    Its input is a column `image`, whose forms `image_model.ImageModel` lists.

    Args:
        onnx_file: what `mhe_dist.backbone.export.export_onnx` wrote, with its metadata.
        folder: gets the model; it is made.
        example: uint8 `[H, W, 3]`, an image for the input example.
        width: D, of the embeddings; 0: the file has the head, and names classes.
        classes: table of the classes' names (`class` and `name`), which the model takes with it.

    Returns:
        `folder`.
    """
    quiet_mlflow()
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import AnyType, Array

    output = Schema([TensorSpec(np.dtype(np.float32), (-1, width))])
    if not width:
        columns = {"classes": DataType.long, "names": DataType.string, "scores": DataType.double}
        output = Schema([ColSpec(Array(kind), name) for name, kind in columns.items()])
    signature = ModelSignature(Schema([ColSpec(AnyType(), "image")]), output)
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        script, backbone = Path(scratch, _SCRIPT), Path(scratch, "backbone.onnx")
        script.write_text(standalone_script(), encoding="utf-8")
        shutil.copyfile(onnx_file, backbone)
        artifacts = {"backbone": str(backbone)} | ({"classes": classes} if classes else {})
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(script),
            artifacts=artifacts,
            signature=signature,
            input_example={"image": [_as_base64(example)]},
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in _NEEDS],
        )
    return folder


def load_mlflow_model(folder: str) -> Any:
    """The model in a folder, as `mlflow.pyfunc.load_model` gives it."""
    quiet_mlflow()
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(folder)


def standalone_script() -> str:
    """The source of the decoder and of `image_model`, as one file without imports of ours."""
    decoder = Path(decode.__file__).read_text(encoding="utf-8")
    model = Path(__file__).with_name(_SCRIPT).read_text(encoding="utf-8")
    decoder = decoder.replace(
        "from mhe_dist.config.data import MAX_PIXELS\n", f"MAX_PIXELS = {MAX_PIXELS}\n"
    )
    imports = re.compile(r"^from pipelines\.data\.decode import .*\n", re.MULTILINE)
    model = imports.sub("", model.replace(_FUTURE, ""))
    text = f"{decoder}\n\n# The model.\n{model}"
    if re.search(r"^\s*(from|import) (pipelines|mhe_dist)\b", text, re.MULTILINE):
        raise RuntimeError("the script of the MLflow model would import this project")
    return text


def _as_base64(image: npt.NDArray[np.uint8]) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90)
    return base64.b64encode(stream.getvalue()).decode()
