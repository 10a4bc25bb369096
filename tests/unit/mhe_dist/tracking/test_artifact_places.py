"""Artifacts of a local MLflow database are found where its folder was copied or moved to."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from launcher import cli
from mhe_dist.tracking.artifact_places import follow_artifacts
from mhe_dist.tracking.mlflow import MlflowTracker

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of runs, and the id of the run in it, which has an artifact and a model."""
    folder = tmp_path_factory.mktemp("old place") / "runs"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "a.png").write_bytes(b"picture")
    uri = f"sqlite:///{folder}/mlflow.db"
    tracker = MlflowTracker(uri, "e", "photos", artifacts=f"{folder}/mlartifacts")
    tracker.start({}, {})
    tracker.artifact(f"{folder}/plots")
    tracker.model(f"{folder}/plots", "photos")
    tracker.close()
    assert tracker.problem == ""
    return folder, str(tracker.run_id)


def places(folder: Path, run_id: str) -> list[str]:
    """Where MLflow looks for the artifacts of experiment, run and model."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.get_run(run_id)
    (version,) = client.search_model_versions("name = 'photos'")
    experiment = client.get_experiment(run.info.experiment_id)
    return [experiment.artifact_location, run.info.artifact_uri, version.source]


def test_a_copy_finds_its_own(made: tuple[Path, str], tmp_path: Path) -> None:
    import mlflow

    old, run_id = made
    new = tmp_path / "new place" / "runs"
    shutil.copytree(old, new)
    before = places(old, run_id)
    assert follow_artifacts(new / "mlflow.db", new / "mlartifacts") == 1
    there = (new / "mlartifacts").as_uri()
    assert places(new, run_id) == [
        there,
        f"{there}/{run_id}/artifacts",
        f"{there}/{run_id}/artifacts/model",
    ]
    (new / "mlartifacts" / run_id / "artifacts" / "plots" / "a.png").write_bytes(b"copied")
    found = mlflow.artifacts.download_artifacts(
        run_id=run_id, artifact_path="plots/a.png", tracking_uri=f"sqlite:///{new}/mlflow.db"
    )
    assert Path(found).read_bytes() == b"copied"
    assert places(old, run_id) == before
    assert follow_artifacts(new / "mlflow.db", new / "mlartifacts") == 0
    assert follow_artifacts(old / "mlflow.db", old / "mlartifacts") == 0


def test_sync_says_so_of_runs_that_were_moved(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Also of a run whose config names the old folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, run_id = made
    new = tmp_path / "runs"
    shutil.copytree(old, new)
    (new / "photos").mkdir()
    config = f"{{run: {{name: photos, dir: {old}}}, data: {{shards: x}}}}"
    (new / "photos" / "config.yaml").write_text(config)
    assert cli.run(["sync", str(new / "photos")]) == 0
    said = capsys.readouterr().out
    assert "MLflow now has the new place of the artifacts of 1 runs." in said
    assert places(new, run_id)[0] == (new / "mlartifacts").as_uri()


def test_places_that_were_never_here_stay(made: tuple[Path, str], tmp_path: Path) -> None:
    """Artifacts of another name, and those of runs that are elsewhere, which still are there."""
    other = tmp_path / "runs"
    shutil.copytree(made[0], other)
    elsewhere = (tmp_path / "elsewhere").as_uri()
    with sqlite3.connect(other / "mlflow.db") as connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", [elsewhere])
    assert follow_artifacts(other / "mlflow.db", other / "mlartifacts") == 0
    assert places(other, made[1])[0] == elsewhere
    shared = tmp_path / "shared"
    shared.mkdir()
    shutil.copy(made[0] / "mlflow.db", shared)
    (shared / "mlartifacts" / "another").mkdir(parents=True)
    assert follow_artifacts(shared / "mlflow.db", shared / "mlartifacts") == 0


def test_what_is_no_database_of_mlflow_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").mkdir()
    file = tmp_path / "mlflow.db"
    assert follow_artifacts(file, tmp_path / "mlartifacts") == 0
    assert not os.path.exists(file)
    for content in (b"", b"no database" * 100):
        file.write_bytes(content)
        assert follow_artifacts(file, tmp_path / "mlartifacts") == 0
        assert file.read_bytes() == content
