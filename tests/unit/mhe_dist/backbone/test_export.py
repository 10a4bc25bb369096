"""Exported files are the trained model, in processes that never imported this project."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from mhe_dist.backbone import export
from mhe_dist.backbone.export import (
    ExportOptions,
    export_onnx,
    export_timm,
    export_torch,
)
from mhe_dist.backbone.model import Backbone, build_backbone
from mhe_dist.backbone.normalization import SYMMETRIC
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from tests.support import tiny


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Backbone, Config, torch.Tensor]:
    """A model whose BatchNorm statistics are not those of a fresh one."""
    config = tiny.config(tmp_path, "unused")
    torch.manual_seed(0)
    model = build_backbone(config.model, config.data.image_size)
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    for _ in range(3):
        model(images.float().div(127.5).sub(1))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return model.eval(), config, images


def elsewhere(script: str, *arguments: str) -> np.ndarray:
    """Run a script in a fresh process outside this checkout; the array that it saves."""
    out = Path(arguments[0]).parent / "out.npy"
    code = f"import sys, numpy as np\nimages = np.load(sys.argv[2])\n{script}\n"
    code += "assert not any(m.split('.')[0] in ('mhe_dist', 'pipelines') for m in sys.modules)\n"
    code += "np.save(sys.argv[3], out)"
    command = [sys.executable, "-c", code, *arguments, str(out)]
    subprocess.run(command, check=True, cwd="/")
    return np.load(out)


def expected(model: Backbone, images: torch.Tensor, path: Path) -> np.ndarray:
    inputs = images.float().div(127.5).sub(1)
    np.save(path, inputs.numpy())
    with torch.no_grad():
        return model(inputs).numpy()


@pytest.mark.slow
def test_timm_alone_loads_the_folder(trained, tmp_path: Path) -> None:
    model, config, images = trained
    folder = tmp_path / "timm"
    assert export_timm(model, config, str(folder), images) < 1e-5
    wanted = expected(model, images, tmp_path / "images.npy")
    script = (
        "import timm, torch\n"
        "net = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "out = net(torch.from_numpy(images)).detach().numpy()"
    )
    found = elsewhere(script, str(folder), str(tmp_path / "images.npy"))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert not list(folder.glob("*.bin"))


def test_the_folder_is_a_start_for_other_classifiers(trained, tmp_path: Path) -> None:
    """timm keeps the body and makes a new last layer, or none."""
    model, config, images = trained
    export_timm(model, config, str(tmp_path / "timm"), images)
    inputs = images.float().div(127.5).sub(1)
    name = f"local-dir:{tmp_path / 'timm'}"
    features = timm.create_model(name, pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(
        features(inputs),
        model.net.forward_head(model.net.forward_features(inputs), pre_logits=True),
    )
    assert timm.create_model(name, pretrained=True, num_classes=7)(inputs).shape == (9, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
        ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
        # An attention with a mask, which torch's exporter cannot take apart.
        ("beit_base_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}),
        # Blocks that share a layer.
        ("coat_lite_tiny", {"embed_dims": [16, 16, 16, 16], "serial_depths": [1, 2, 1, 1]}),
    ],
)
def test_other_families_of_models(name: str, kwargs: dict, tmp_path: Path) -> None:
    changes: dict[str, object] = {"name": name, "kwargs": kwargs, "neck": "none"}
    config = tiny.config(tmp_path, "unused", model=changes, data={"image_size": 32})
    model = build_backbone(config.model, 32).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert export_timm(model, config, str(tmp_path / "timm"), images) < 1e-5
    assert export_onnx(model, config, str(tmp_path / "b.onnx"), images) < 1e-4


@pytest.mark.slow
def test_onnx_runtime_alone_runs_any_batch(trained, tmp_path: Path) -> None:
    model, config, images = trained
    path = tmp_path / "backbone.onnx"
    assert export_onnx(model, config, str(path), images) < 1e-4
    wanted = expected(model, images, tmp_path / "images.npy")
    script = (
        "import onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "run = lambda x: session.run(None, {'images': x})[0]\n"
        "out = np.concatenate([run(images[:1]), run(images[1:])])"
    )
    found = elsewhere(script, str(path), str(tmp_path / "images.npy"))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_difference_is_refused(trained, tmp_path: Path, monkeypatch) -> None:
    model, config, images = trained
    monkeypatch.setattr(export, "fold_neck", lambda model: model.net)
    with pytest.raises(RunError, match="embeddings differ from the trained model's by"):
        export_timm(model, config, str(tmp_path / "timm"), images)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_a_difference_is_measured_by_its_element(scale: float) -> None:
    """Small elements and small embeddings are compared as strictly as large ones."""
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    table = torch.tensor([[3.0, 0.1], [-1.0, 0.2], [2.0, -0.1], [0.5, 0.0]]) * scale

    def trained(inputs: torch.Tensor) -> torch.Tensor:
        return table[((inputs[:, 0, 0, 0] + 1) * 127.5).round().long()]

    def exported(inputs: torch.Tensor) -> torch.Tensor:
        return trained(inputs) + torch.tensor([0.0, error * scale])

    error = 1e-4
    found = export._compare(trained, exported, [images, images[:1]], SYMMETRIC, "file", 1e-3)
    assert found == pytest.approx(error * scale, rel=0.05)
    error = 1e-3
    with pytest.raises(RunError, match=r"an element by 5\.0\de-03 of its own scale \(1e-03 is"):
        export._compare(trained, exported, [images, images[:1]], SYMMETRIC, "file", 1e-3)


def test_a_model_that_diverged_is_not_exported(trained, tmp_path: Path) -> None:
    model, config, images = trained
    nn.init.constant_(model.neck.weight, float("nan"))
    with pytest.raises(RunError, match=r"own embeddings are not finite.*optim\.clip_norm"):
        export_timm(model, config, str(tmp_path / "timm"), images)


def test_a_model_that_says_nothing_is_not_exported(trained, tmp_path: Path) -> None:
    model, config, images = trained
    for tensor in model.neck.parameters():
        nn.init.zeros_(tensor)
    with pytest.raises(RunError, match="gives every image the embedding 0"):
        export_timm(model, config, str(tmp_path / "timm"), images)


@pytest.mark.slow
def test_torch_alone_runs_the_program(trained, tmp_path: Path) -> None:
    model, config, images = trained
    path = tmp_path / "backbone.pt2"
    options = ExportOptions(normalise=True)
    assert export_torch(model, config, str(path), images, options, {"step": "7"}) < 1e-5
    extra = {"metadata.json": ""}
    torch.export.load(str(path), extra_files=extra)
    about = json.loads(extra["metadata.json"])
    assert (about["step"], about["image_size"], about["unit_length"]) == ("7", "16", "true")
    wanted = expected(model, images.repeat(600, 1, 1, 1), tmp_path / "images.npy")
    script = (
        "import torch\n"
        "out = torch.export.load(sys.argv[1]).module()(torch.from_numpy(images)).detach().numpy()"
    )
    found = elsewhere(script, str(path), str(tmp_path / "images.npy"))
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1)[:, None], atol=1e-5)


@pytest.mark.slow
def test_options_of_onnx(trained, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import onnx

    model, config, images = trained
    options = ExportOptions(opset=18, half=True, normalise=True)
    path = f"{tmp_path}/backbone.onnx"
    assert 0 < export_onnx(model, config, path, images, options) < 5e-3
    written = onnx.load(path)
    assert [o.version for o in written.opset_import if o.domain == ""] == [18]
    kinds = {tensor.data_type for tensor in written.graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    kind = written.graph.output[0].type.tensor_type.elem_type
    assert kind == written.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    with pytest.raises(UserError, match="--opset 3: "):
        export_onnx(model, config, path, images, ExportOptions(opset=3))
    said = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert not said, "the exporter tells of other operator sets, with tracebacks"
