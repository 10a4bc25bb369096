"""A real `mlflow server` process: what a run leaves there, and what it must not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mhe_dist.tracking.mlflow import MlflowTracker
from pipelines.pretrain.main import run_pretraining
from tests.support import tiny
from tests.support.rank_processes import free_port
from tests.support.servers import mlflow_server
from tests.support.servers.lossy_proxy import losing_answers

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("patient_mlflow")]

SECRET = "planted-horse-battery"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    with mlflow_server.server(folder, port):
        yield f"http://127.0.0.1:{port}", folder


def test_what_a_run_leaves_on_a_server(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.tracking import MlflowClient

    uri, folder = server
    monkeypatch.setenv("PLANTED_TOKEN", SECRET)
    address = uri.replace("://", f"://me:{SECRET}@")
    config = tiny.config(
        tmp_path / "runs",
        tiny.write_shards(tmp_path / "train"),
        run={"name": "served"},
        tracking={"mlflow": True, "uri": address, "experiment": "tests"},
        evaluate={"shards": tiny.write_shards(tmp_path / "heldout", 10, 1000), "pairs": 100},
        export={"formats": ["onnx"]},
    )
    summary = run_pretraining(config)
    client = MlflowClient(uri)
    run = client.get_run(summary["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.02"
    assert {
        "git_commit",
        "data_digest",
        "world_size",
        "device",
        "version.torch",
        "checkpoints",
    } <= set(run.data.tags)
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 24
    kept = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "plots", "evaluation.npz", "model"} <= kept

    inputs = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert {context: each.name for context, each in inputs.items()} == {
        "training": f"{tmp_path.name}/train",
        "evaluation": f"{tmp_path.name}/heldout",
    }
    assert run.data.tags["data_digest"].partition(":")[2].startswith(inputs["training"].digest)
    assert "| rank1 | " in run.data.tags["mlflow.note.content"]
    assert "heldout/chance" in run.data.params and "heldout/chance" not in run.data.metrics
    assert "heldout/rank1" in run.data.metrics

    (version,) = client.search_model_versions("name = 'served'")
    assert version.run_id == run.info.run_id
    local = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="model", tracking_uri=uri, dst_path=str(tmp_path)
    )
    info = mlflow.models.get_model_info(local)
    assert [each.name for each in info.signature.inputs.inputs] == ["image"]
    assert info.signature.outputs.inputs[0].shape == (-1, config.model.embedding_dim)
    assert info.saved_input_example_info
    images = [np.zeros((tiny.SIDE, tiny.SIDE, 3), np.uint8)] * 2
    out = mlflow.pyfunc.load_model(local).predict({"image": images})
    assert out.shape == (2, config.model.embedding_dim)

    for path in (p for root in (folder, tmp_path) for p in root.rglob("*") if p.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_restart_is_a_child_and_logging_costs_a_step_nothing(server: tuple[str, Path]) -> None:
    from mlflow.tracking import MlflowClient

    uri, _ = server
    first = MlflowTracker(uri, "tests", "again")
    first.start({"a": 1}, {"world_size": "2"})
    first.log(0, {"loss": 1.0})
    first.close("failed")
    second = MlflowTracker(uri, "tests", "again", first.run_id)
    second.start({"a": 1}, {"world_size": "1"}, step=1)
    assert second.run_id == first.run_id
    metrics = {f"metric_{i}": float(i) for i in range(12)}
    begin = time.thread_time()  # what else the machine does takes none of it
    for step in range(1, 501):
        second.log(step, metrics)
    cost = (time.thread_time() - begin) / 500
    second.close()

    client = MlflowClient(uri)
    parent = client.get_run(str(first.run_id))
    (child,) = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{first.run_id}'"
    )
    assert child.info.run_name == "again from step 1"
    assert (child.data.tags["world_size"], child.data.tags["step"]) == ("1", "1")
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert len(client.get_metric_history(str(first.run_id), "metric_3")) == 500
    assert cost < 0.01 * 0.03, f"{cost * 1e6:.0f} us: more than 1 % of a step of 30 ms"


def test_lost_answers_make_no_second_run(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is lost twice: MLflow's own client tries again once, before the tracker does."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr("mhe_dist.tracking.mlflow._PAUSE_S", 0.1)
    (tmp_path / "MLmodel").write_text("flavors: {}")
    lost = ["/runs/create"] * 2 + ["/runs/log-batch"] * 2
    with losing_answers(int(server[0].rpartition(":")[2]), lost) as uri:
        first = MlflowTracker(uri, "losses", "once")
        first.start({"a": 1}, {"world_size": "2"})
        first.model(str(tmp_path), "once")
        lost += ["/model-versions/create"] * 2
        first.log(0, {"loss": 1.0})
        first.close("failed")
        lost += ["/runs/create"] * 2 + ["/runs/log-batch"] * 2
        second = MlflowTracker(uri, "losses", "once", first.run_id)
        second.start({"a": 1}, {"world_size": "1"}, step=1)
        second.close()
        assert lost == []

    client = MlflowClient(server[0])
    experiment = client.get_experiment_by_name("losses")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["once", "once from step 1"]
    run = client.get_run(str(first.run_id))
    assert (run.data.params, run.data.tags["world_size"]) == ({"a": "1"}, "1")
    assert {each.info.status for each in runs} == {"FINISHED"}
    assert len(client.search_model_versions("name = 'once'")) == 1
