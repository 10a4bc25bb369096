"""Exports for others: an MLflow model that takes images, a folder for the Hub, their cards."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import simplejpeg
import timm
import torch
from huggingface_hub import CommitOperationAdd, ModelCard
from mlflow.exceptions import MlflowException
from PIL import Image

from mhe_dist.backbone.export import ExportOptions
from mhe_dist.backbone.model import build_backbone
from mhe_dist.backbone.normalization import normalize_images
from mhe_dist.config.schema import Config
from mhe_dist.tracking.mlflow import QUIET_ENVIRONMENT
from pipelines.data.decode import decode_image
from pipelines.runs.trained import TrainedBackbone
from pipelines.serving import exports
from pipelines.serving.exports import write_format
from pipelines.serving.mlflow_model import standalone_script
from pipelines.serving.model_card import TrainedModel, is_model_card, model_card
from pipelines.serving.output_folder import refuse_overwriting
from tests.support import tiny
from tests.support.data.images import encoded
from tests.support.rank_processes import free_port
from tests.support.waiting import WATCHDOG_S

pytestmark = pytest.mark.slow  # each needs real exports, which take ten seconds

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SIDE = 16
FIGURES = {"rank1": 0.8634, "chance": 0.002, "tar@far=1e-3": 0.83, "gallery": 500.0}
KNOWN = {"data_digest": "sha256:abc", "classes": 4701, "samples": 29812}
IMAGES = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)


def photo(width: int = 200, height: int = 150) -> bytes:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return simplejpeg.encode_jpeg(ramp.astype(np.uint8), quality=90)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A model with constants of its own."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"model": IMAGENET, "run": {"name": "photos"}}
    config: Config = tiny.config(folder, "/home/me/secret", **changes)
    torch.manual_seed(0)
    model = build_backbone(config.model, SIDE).eval()
    return TrainedModel(model, config, 3300, KNOWN, FIGURES, "enrolled: the first image")


@pytest.fixture(scope="module")
def hub(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the Hub."""
    folder = str(tmp_path_factory.mktemp("hub"))
    path, difference = write_format("hub-folder", trained, folder, IMAGES)
    assert difference < 1e-4
    return Path(path)


@pytest.fixture(scope="module")
def exported(
    trained: TrainedModel, hub: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, TrainedBackbone]]:
    """The folder of an MLflow model, and the backbone in it. Its ONNX file is the Hub's."""

    def copy(*arguments: Any) -> float:
        shutil.copyfile(hub / "onnx" / "model.onnx", arguments[2])
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "export_onnx", copy)
        folder = str(tmp_path_factory.mktemp("export"))
        for name in QUIET_ENVIRONMENT:
            patch.delenv(name, raising=False)
        with warnings.catch_warnings(record=True) as said:
            path, difference = write_format("mlflow", trained, folder, IMAGES)
        assert not [each for each in said if issubclass(each.category, UserWarning)]
        assert QUIET_ENVIRONMENT.items() <= os.environ.items(), "no telemetry, no bars"
    assert difference < 1e-4, "its own normalisation is that of the training"
    yield path, TrainedBackbone(trained.config, "", "", 7, None, trained.model)


def test_what_was_exported_may_be_exported_again(hub: Path, exported: Any) -> None:
    assert is_model_card((hub / "README.md").read_text())
    refuse_overwriting(str(hub.parent), ["hub-folder"])
    refuse_overwriting(str(Path(exported[0]).parent), ["mlflow"])


@pytest.fixture(scope="module")
def served(exported: tuple[str, TrainedBackbone]) -> Any:
    return mlflow.pyfunc.load_model(exported[0])


def expected(backbone: TrainedBackbone, data: bytes) -> np.ndarray:
    pixels = np.array(decode_image(data, SIDE)).transpose(2, 0, 1)
    return backbone.embed(torch.from_numpy(pixels.copy())[None]).numpy()


def as_png(data: bytes) -> bytes:
    return encoded(Image.open(io.BytesIO(data)), "png")


@pytest.mark.parametrize("form", ["bytes", "base64", "data URL", "path"])
def test_an_encoded_image_in_any_form(
    exported: Any, served: Any, tmp_path: Path, form: str
) -> None:
    data = photo()
    text = base64.b64encode(data).decode()
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    image = {
        "bytes": data,
        "base64": text,
        "data URL": f"data:image/jpeg;base64,{text}",
        "path": path,
    }[form]
    found = served.predict({"image": [image]})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(exported[1], data), atol=1e-4)


@pytest.mark.parametrize("kind", ["HWC", "CHW", "tensor", "nested lists", "other size"])
def test_pixels_in_any_form(exported: Any, served: Any, kind: str) -> None:
    big = np.asarray(Image.open(io.BytesIO(photo(40, 40))))
    data = as_png(photo(40, 40)) if kind == "other size" else as_png(photo(SIDE, SIDE))
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    image: Any = {
        "HWC": pixels,
        "CHW": pixels.transpose(2, 0, 1),
        "tensor": torch.from_numpy(pixels.copy()),
        "nested lists": pixels.tolist(),
        "other size": big,
    }[kind]
    found = served.predict({"image": [image]})
    np.testing.assert_allclose(found, expected(exported[1], data), atol=1e-4)


def test_grey_images_and_normalised_floats(exported: Any, served: Any) -> None:
    grey = np.full((SIDE, SIDE), 77, np.uint8)
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    found = served.predict({"image": [grey, colour]})
    np.testing.assert_array_equal(found[0], found[1])
    inputs = np.random.default_rng(0).normal(size=(3, SIDE, SIDE)).astype(np.float32)
    with torch.no_grad():
        wanted = exported[1].model(torch.from_numpy(inputs)[None]).numpy()
    np.testing.assert_allclose(served.predict({"image": [inputs]}), wanted, atol=1e-4)


def test_a_large_batch_keeps_its_order(served: Any) -> None:
    images = [np.full((SIDE, SIDE), value, np.uint8) for value in range(130)]
    found = served.predict({"image": images})
    alone = np.concatenate([served.predict({"image": [image]}) for image in images[::43]])
    np.testing.assert_allclose(found[::43], alone, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (photo()[:500], "image 1: (?i:.*truncated)"),
        ("photo.jpg", "image 1: .*set the environment variable MHE_IMAGE_ROOT"),
        (np.zeros((5, 5, 5), np.uint8), r"image 1: an array \[5, 5, 5\] is no image"),
        (np.zeros((3, 5, 5), np.float32), r"image 1: .*must be \[3, 16, 16\], not \[3, 5, 5\]"),
        (np.full((SIDE, SIDE), 300), "image 1: .*values are 0 to 255"),
    ],
)
def test_what_is_no_image_is_named(served: Any, image: Any, words: str) -> None:
    with pytest.raises(MlflowException, match=words) as raised:
        served.predict({"image": [photo(), image]})
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"


def test_paths_as_text_stay_below_the_root(
    served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    for path in ("root/a.jpg", "secret.jpg"):
        (tmp_path / path).write_bytes(photo())
    monkeypatch.setenv("MHE_IMAGE_ROOT", str(tmp_path / "root"))
    assert served.predict({"image": ["a.jpg"]}).shape[0] == 1
    for path in ("../secret.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(MlflowException, match="is not below MHE_IMAGE_ROOT"):
            served.predict({"image": [path]})


def test_the_signature_and_the_example_say_what_goes_in(exported: Any, served: Any) -> None:
    assert [(each.name, str(each.type)) for each in served.metadata.signature.inputs] == [
        ("image", "Any")
    ]
    (output,) = served.metadata.signature.outputs
    assert output.shape == (-1, exported[1].config.model.embedding_dim)
    example = json.loads(Path(exported[0], "serving_input_example.json").read_text())
    (row,) = example["inputs"]["image"]
    assert base64.b64decode(row).startswith(b"\xff\xd8\xff")
    assert "import mhe_dist" not in standalone_script()


def code_of(card: str, name: str) -> str:
    found = re.search(rf"### {name}\n\n```python\n(.*?)```", card, re.DOTALL)
    assert found, card
    return found[1]


def test_the_hub_reads_the_header(trained: TrainedModel) -> None:
    card = ModelCard(model_card(trained, {"timm": "."}))
    about = card.data.to_dict()
    assert (about["license"], about["library_name"]) == ("unknown", "timm")
    (result,) = about["model-index"][0]["results"]
    values = {each["type"]: each["value"] for each in result["metrics"]}
    assert values == {"rank1": 0.8634, "tar@far=1e-3": 0.83}
    for words in ("29,812 images of 4,701 classes", "sha256:abc", "86.34 %", "| gallery | 500 |"):
        assert words in card.text
    assert "enrolled: the first image" in card.text and "3,300" in card.text
    assert "secret" not in card.text, "paths of the user's machines stay with the user"


def test_without_figures_it_says_so(trained: TrainedModel) -> None:
    text = model_card(trained._replace(figures={}, trained_on={}), {"timm": "."})
    assert "No held-out figures" in text and "model-index" not in text
    ModelCard(text)


def test_a_hub_folder_is_complete(
    trained: TrainedModel, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [path for path in hub.rglob("*") if path.is_file()]
    names = {str(path.relative_to(hub)) for path in files}
    assert names == {"README.md", "config.json", "model.safetensors", "onnx/model.onnx"}
    for file in files:  # what an upload begins with
        assert CommitOperationAdd(str(file.relative_to(hub)), str(file)).upload_info.size
    monkeypatch.chdir(hub)
    card = Path("README.md").read_text()
    with torch.no_grad():
        inputs = normalize_images(IMAGES, trained.model.normalization)
        wanted = trained.model(inputs).numpy()
    scope: dict[str, Any] = {"images": inputs.contiguous().numpy()}
    exec(code_of(card, "timm"), scope)
    np.testing.assert_allclose(scope["net"](inputs).detach().numpy(), wanted, atol=1e-4)
    exec(code_of(card, "onnx"), scope)
    np.testing.assert_allclose(scope["embeddings"], wanted, atol=1e-4)
    features = timm.create_model("local-dir:.", pretrained=True, num_classes=0).eval()(inputs)
    assert f"the {features.shape[1]} pooled features" in card


def test_the_onnx_file_says_what_it_is(hub: Path) -> None:
    session = onnxruntime.InferenceSession(str(hub / "onnx" / "model.onnx"))
    about = session.get_modelmeta().custom_metadata_map
    assert about["image_size"] == "16"
    assert {name: json.loads(about[name]) for name in ("mean", "std")} == IMAGENET
    assert (about["channel_order"], about["run"], about["step"]) == ("RGB", "photos", "3300")
    assert about["data_digest"] == "sha256:abc" and about["unit_length"] == "false"


def test_an_onnx_file_for_pixels(trained: TrainedModel, tmp_path: Path) -> None:
    """As an image reader gives them; mean and deviation of the training are inside the file."""
    options = ExportOptions(pixels=True)
    path, difference = write_format("onnx", trained, str(tmp_path), IMAGES, options)
    assert path.endswith("backbone_uint8.onnx") and 0 < difference < 1e-4
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    assert (given.type, given.shape[1:]) == ("tensor(uint8)", [SIDE, SIDE, 3])
    about = session.get_modelmeta().custom_metadata_map
    assert (about["layout"], about["input"]) == ("NHWC", "pixels, uint8")
    Image.fromarray(IMAGES[1].permute(1, 2, 0).numpy()).save(tmp_path / "photo.jpg", "png")
    code = code_of((tmp_path / "README.md").read_text(), "onnx-uint8")
    code = code.replace(json.dumps("backbone_uint8.onnx"), json.dumps(path))
    found: dict[str, Any] = {}
    exec(code.replace("photo.jpg", str(tmp_path / "photo.jpg")), found)
    with torch.no_grad():
        wanted = trained.model(normalize_images(IMAGES[1:2], trained.model.normalization))
    np.testing.assert_allclose(found["embeddings"], wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["mlflow", "hub-folder"])
def test_pixels_are_for_the_onnx_file_alone(
    name: Any, trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MLflow model normalises before its ONNX file, and the Hub's file is the usual one."""
    given: list[ExportOptions] = []

    def write(_: TrainedModel, path: str, __: torch.Tensor, options: ExportOptions) -> float:
        Path(path).mkdir()
        given.append(options)
        return 0.0

    monkeypatch.setitem(exports._WRITERS, name, write)
    write_format(name, trained, str(tmp_path), IMAGES, ExportOptions(half=True, pixels=True))
    assert given == [ExportOptions(half=True)]


def test_each_export_has_a_card(exported: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(exported[0])
    assert "### mlflow" in (path.parent / "README.md").read_text()
    monkeypatch.chdir(path)
    Path("photo.jpg").write_bytes(photo())
    scope: dict[str, Any] = {}
    exec(code_of(Path("README.md").read_text(), "mlflow"), scope)
    np.testing.assert_allclose(scope["embeddings"], expected(exported[1], photo()), atol=1e-4)


def test_mlflow_serves_it_without_this_project(exported: Any, tmp_path: Path) -> None:
    """`mlflow models serve` in another folder answers a JPEG with its embedding, and refuses."""
    data = photo(1000, 750)
    assert 20_000 < len(data) < 50_000
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", exported[0]]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=log, stderr=log, env=environment, start_new_session=True
    )

    def request_embedding(image: str) -> Any:
        body = json.dumps({"dataframe_records": [{"image": image}]}).encode()
        url, header = f"http://127.0.0.1:{port}/invocations", {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(url, body, header), timeout=WATCHDOG_S
        ) as answer:
            return json.loads(answer.read())["predictions"]

    try:
        deadline = time.monotonic() + WATCHDOG_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                answered = request_embedding(base64.b64encode(data).decode())
                break
            except ConnectionError:
                time.sleep(0.3)
            except urllib.error.URLError as error:
                if isinstance(error, urllib.error.HTTPError):
                    raise AssertionError(error.read()) from error
                time.sleep(0.3)
        np.testing.assert_allclose(answered, expected(exported[1], data), atol=1e-4)
        with pytest.raises(urllib.error.HTTPError) as refused:
            request_embedding("/etc/passwd")
        assert refused.value.code == 400
        assert "MHE_IMAGE_ROOT" in refused.value.read().decode()
    finally:
        os.killpg(process.pid, 9)  # its workers too; the session is its own
        process.wait()
