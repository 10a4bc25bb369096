"""What a run at a URL leaves behind: all that a run in a folder does."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from mlflow.tracking import MlflowClient

from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from pipelines.pretrain.main import run_pretraining
from pipelines.report.html import write_run_page
from pipelines.report.plots import load_details
from tests.support import tiny
from tests.support.servers.stores import s3_bucket


@pytest.mark.slow
@pytest.mark.usefixtures("patient_mlflow")
def test_exports_and_pictures_lie_in_the_store_and_in_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shards = tiny.write_shards(tmp_path / "train")
    heldout = tiny.write_shards(tmp_path / "heldout", classes=12, first=1000)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with s3_bucket("runs") as bucket:
        config = tiny.config(
            *(Path("runs"), shards),
            run={"dir": bucket, "name": "stored"},
            train={"max_steps": 3, "log_every": 1},
            evaluate={"shards": heldout},
            export={"formats": ["onnx"]},
            tracking={"mlflow": True, "uri": uri},
        )
        summary = run_pretraining(config)
        assert not list(Path.cwd().glob("*:")), "a URL that was taken for a path"
        _assert_stored(config, summary["exports"]["onnx"]["path"])
        sections = write_run_page(config.run.path, f"{tmp_path}/page.html")
        assert {"Training", "Unseen classes", "Exported backbone"} <= set(sections)
        page = (tmp_path / "page.html").read_text()
        assert "ROC, all gallery-probe pairs" in page and "Training loss" in page
    client, run_id = MlflowClient(uri), summary["mlflow"]["run_id"]
    kept = {found.path for found in client.list_artifacts(run_id)}
    assert {"config.yaml", "evaluation.npz", "plots", "model"} <= kept
    assert {found.path for found in client.list_artifacts(run_id, "plots")} >= {"plots/note.png"}
    (version,) = client.search_model_versions("name='stored'")
    assert version.run_id == run_id


def _assert_stored(config: Config, onnx: str) -> None:
    store, path = fsspec.core.url_to_fs(config.run.path)
    store.invalidate_cache()
    names = {name.removeprefix(f"{path}/") for name in store.find(path)}
    pictures = {f"plots/{name}.png" for name in ("training", "overview", "heldout", "note")}
    cards = {"export/README.md", "export/mlflow/README.md"}
    assert {"summary.json", "evaluation.npz", "export/backbone.onnx", *pictures, *cards} <= names
    assert onnx == f"{config.run.path}/export/backbone.onnx"
    assert json.loads(store.cat(f"{path}/summary.json"))["exports"]["onnx"]["path"] == onnx
    assert "tar" in load_details(f"{config.run.path}/evaluation.npz")


@pytest.mark.parametrize("key", ["run.dir", "head.bank.path"])
def test_a_file_url_is_the_folder_that_it_names(key: str, tmp_path: Path) -> None:
    words = ["data.shards=x", "head.bank.memory=file", f"{key}=file://{tmp_path}/store"]
    config = load_config(None, words)
    found = {"run.dir": config.run.dir, "head.bank.path": config.head.bank.path}
    assert found[key] == f"{tmp_path}/store"
