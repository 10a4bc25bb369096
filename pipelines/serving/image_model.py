"""An exported model that takes images and prepares them itself, as MLflow loads and serves it.

`mlflow_model.py` puts the source of this file and of the decoder into the model's folder, so that
nothing of this project has to be installed where the model is served.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from pipelines.data.decode import ImageDecodeError, decode_image, fit_image

COLUMN: Final = "image"
IMAGE_ROOT: Final = "MHE_IMAGE_ROOT"
_BATCH: Final = 64


class ImageModel(PythonModel):
    """Embeds images or names their classes; they are rows of the column `image` in any form of:

    - bytes of an encoded image (JPEG, PNG, WebP, ...), or base64 of them as text, as in JSON;
    - `pathlib.Path`, or the path as text where the environment variable `MHE_IMAGE_ROOT` names the
      folder that it has to be below: a server must not read any file that a client names;
    - a uint8 array or tensor `[H, W, 3]`, `[3, H, W]` or `[H, W]`, RGB, of any size;
    - a float array or tensor `[3, size, size]`, which is normalised already.
    """

    def load_context(self, context: Any) -> None:
        """Open the ONNX file; its metadata say how images are prepared."""
        self._session = onnxruntime.InferenceSession(
            context.artifacts["backbone"], providers=onnxruntime.get_available_providers()
        )
        self._names = read_names(context.artifacts.get("classes"))
        about = self._session.get_modelmeta().custom_metadata_map
        self._side = int(about["image_size"])
        shape = (3, 1, 1)
        self._mean = np.array(json.loads(about["mean"]), np.float32).reshape(shape)
        self._std = np.array(json.loads(about["std"]), np.float32).reshape(shape)

    # MLflow warns of an input without a hint, and would take most hints for a schema of their own.
    def predict(self, context, model_input: pd.DataFrame, params=None) -> Any:
        """Float32 `[N, D]`, in the order of the images; with a head a table with a row for each.

        The table has the columns `classes`, `names` and `scores`, lists of which the best class is
        the first. A class without a name is called by its number.

        Raises:
            MlflowException: an image cannot be read; its number is named. A server answers 400.
        """
        images = list(_each_image(model_input[COLUMN]))
        parts = [
            self._run(images[start : start + _BATCH], start)
            for start in range(0, len(images), _BATCH)
        ]
        if len(self._session.get_outputs()) == 1:
            return np.concatenate([part[0] for part in parts] or [np.empty((0, 0), np.float32)])
        classes: list[list[int]] = [row for part in parts for row in part[0].tolist()]
        names = [[self._names.get(each, str(each)) for each in row] for row in classes]
        scores = [row for part in parts for row in part[1].tolist()]
        return pd.DataFrame({"classes": classes, "names": names, "scores": scores})

    def _run(self, images: Iterable[Any], start: int) -> list[npt.NDArray[Any]]:
        inputs = []
        for number, image in enumerate(images, start):
            try:
                inputs.append(self._prepare(image))
            except (ImageDecodeError, ValueError, OSError) as error:
                raise MlflowException(
                    f"image {number}: {error}", error_code=INVALID_PARAMETER_VALUE
                ) from error
        (name,) = (each.name for each in self._session.get_inputs())
        found: list[npt.NDArray[Any]] = self._session.run(None, {name: np.stack(inputs)})
        return found

    def _prepare(self, image: Any) -> npt.NDArray[np.float32]:
        """Float32 `[3, size, size]`, normalised."""
        if isinstance(image, str):
            image = _from_text(image)
        if isinstance(image, Path):
            image = image.read_bytes()
        if isinstance(image, (bytes, bytearray, memoryview)):
            pixels = decode_image(bytes(image), self._side)
        else:
            pixels = np.asarray(image.numpy() if hasattr(image, "numpy") else image)
            if np.issubdtype(pixels.dtype, np.floating):
                return self._as_normalised(pixels)
            pixels = fit_image(_as_picture(pixels), self._side)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        return (scaled - self._mean) / self._std

    def _as_normalised(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if pixels.shape != (3, self._side, self._side):
            raise ValueError(
                f"an array of floats is taken for a normalised image and must be "
                f"[3, {self._side}, {self._side}], not {list(pixels.shape)}; give uint8 otherwise"
            )
        return pixels.astype(np.float32)


def read_names(path: str | None) -> dict[int, str]:
    """Names of the classes, of a table of `class` and `name`; empty: there is none."""
    if path is None:
        return {}
    lines = Path(path).read_text(encoding="utf-8").split("\n")[1:]
    rows = (line.split("\t") for line in lines if line)
    plain = {"t": "\t", "n": "\n", "r": "\r"}  # as `shards.tables` writes a row
    return {
        int(row[0]): re.sub(r"\\([\\tnr])", lambda found: plain.get(found[1], found[1]), row[1])
        for row in rows
    }


def _each_image(rows: Iterable[Any]) -> Iterator[Any]:
    """One image after the other; MLflow gives a list of texts as one row."""
    for row in rows:
        if isinstance(row, list) and row and isinstance(row[0], (str, bytes, Path)):
            yield from row
        else:
            yield row


def _as_picture(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Uint8 `[H, W, 3]` or `[H, W]`; whole numbers of JSON are taken for uint8."""
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"an array of {pixels.dtype} is no image; values are 0 to 255, uint8")
    if pixels.ndim == 3 and pixels.shape[2] != 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(f"an array {list(pixels.shape)} is no image; give [H, W, 3] or [H, W]")
    return np.ascontiguousarray(pixels, np.uint8)


def _from_text(text: str) -> bytes | Path:
    """Base64 (also a data URL), or a path below the folder that `MHE_IMAGE_ROOT` names."""
    content = text.partition(";base64,")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        pass
    root = os.environ.get(IMAGE_ROOT)
    if not root:
        raise ValueError(
            f"the text {text[:40]!r} is not base64 of an image; for it to be a path, set the "
            f"environment variable {IMAGE_ROOT} to the folder that paths have to be below"
        )
    path = Path(root, text).resolve()
    if not path.is_relative_to(Path(root).resolve()):
        raise ValueError(f"the path {text[:80]!r} is not below {IMAGE_ROOT}={root}")
    return path


set_model(ImageModel())
