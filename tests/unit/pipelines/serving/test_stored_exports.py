"""Exports into a store: what was compared with the model arrives there, with its card."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import onnxruntime
import pytest
import timm
import torch

from launcher import cli
from launcher.terminal.commands import fetching_code
from mhe_dist.backbone.model import build_backbone
from mhe_dist.backbone.normalization import normalize_images
from mhe_dist.errors import RunError
from pipelines.serving.exports import write_format
from pipelines.serving.model_card import TrainedModel
from tests.support import tiny
from tests.support.servers.stores import s3_bucket
from tests.support.terminal import said

IMAGES = torch.randint(0, 256, (3, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("exports") as url:
        yield url


@pytest.fixture(autouse=True)
def _nothing_beside_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A URL that is taken for a path makes a folder in the working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not list(Path.cwd().glob("*:"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    config = tiny.config(tmp_path_factory.mktemp("run"), "unused")
    torch.manual_seed(0)
    return TrainedModel(build_backbone(config.model, tiny.SIDE).eval(), config, 24, {}, {})


def names_in(url: str) -> set[str]:
    filesystem, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{path}/") for name in filesystem.find(path)}


@pytest.mark.slow
def test_each_format_arrives_and_is_fetched_again(bucket: str, trained: TrainedModel) -> None:
    folder = f"{bucket}/run/export"
    timm_path, difference = write_format("timm", trained, folder, IMAGES)
    assert (timm_path, difference < 1e-4) == (f"{folder}/timm", True)
    onnx_path, difference = write_format("onnx", trained, folder, IMAGES)
    assert (onnx_path, difference < 1e-3) == (f"{folder}/backbone.onnx", True)
    assert names_in(folder) == {
        *("README.md", "backbone.onnx", "exports.json"),
        *("timm/README.md", "timm/config.json", "timm/model.safetensors"),
    }
    card = fsspec.open(f"{folder}/README.md", "r").open().read()
    assert "local-dir:timm" in card and "backbone.onnx" in card
    Path("timm").mkdir()
    Path("timm", "config.json").write_text("of an earlier fetch")
    for path in (timm_path, onnx_path):
        exec(fetching_code(path), {})
    inputs = normalize_images(IMAGES, trained.model.normalization)
    with torch.no_grad():
        wanted = trained.model(inputs)
        loaded = timm.create_model("local-dir:timm", pretrained=True).eval()
        torch.testing.assert_close(loaded(inputs), wanted, rtol=1e-4, atol=1e-4)
    session = onnxruntime.InferenceSession("backbone.onnx")
    (found,) = session.run(None, {"images": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-3)


def test_an_export_that_differs_is_not_sent(
    bucket: str, trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"{bucket}/wrong/export"
    monkeypatch.setattr("mhe_dist.backbone.export.TIMM_TOLERANCE", -1.0)
    with pytest.raises(RunError, match=f"^{folder}/timm: embeddings differ"):
        write_format("timm", trained, folder, IMAGES)
    assert names_in(folder) == set()


@pytest.mark.parametrize("kind", ["store", "file"])
def test_mhe_export_of_a_run_at_a_url_and_to_one(
    kind: str, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bucket if kind == "store" else f"file://{tmp_path}"
    run = tiny.trained_run(tmp_path / "runs", "unused")
    where = f"{root}/{kind}/tiny"
    there, path = fsspec.core.url_to_fs(where)
    there.put(run.run.path, path, recursive=True)
    out = f"{root}/{kind}/out"
    for words, folder in (([], f"{where}/export"), (["--out", f"{out}/"], out)):
        printed = said(["export", where, "--to", "timm", *words], capsys)
        assert f"{folder.removeprefix('file://')}/timm" in printed
        assert ("fetch it (timm)" in printed) == (kind == "store")
        assert {"README.md", "timm/model.safetensors"} <= names_in(folder)


def test_what_takes_no_files_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.trained_run(tmp_path / "runs", "unused").run.path
    monkeypatch.setitem(sys.modules, "pipelines.serving.exports", None)  # what does the work
    for verb, out in (("export", "http://127.0.0.1:1/a"), ("report", "http://127.0.0.1:1/a/b")):
        refusal = said([verb, run, "--out", out], capsys, 2)
        assert "http://127.0.0.1:1/a: cannot be written (a web server takes no files)" in refusal
    assert cli.run(["bench", "head", "--out", "memory://a"]) == 2
    assert "--out memory://a: is made in files of this machine" in capsys.readouterr().err
