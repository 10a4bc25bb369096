"""What is said of a run that was sent to a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import cli
from launcher.verbs import jobs
from mhe_dist.config.write import save_config
from tests.support import tiny

SERVER = "http://mlflow.there:5000"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env", f"MLFLOW_TRACKING_URI={SERVER}"], SERVER),
        ([f"tracking.uri={SERVER}"], SERVER),
        ([], "the one that MLFLOW_TRACKING_URI names on the nodes"),
    ],
)
def test_a_run_in_a_store_is_sent_though_no_server_of_mlflow_is_named_here(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cluster = SimpleNamespace(
        address="http://127.0.0.1:8265",
        refuse_running=lambda config: None,
        start=lambda config, variables: "run-1",
    )
    monkeypatch.setattr(jobs, "Cluster", lambda address: cluster)
    file = tmp_path / "run.yaml"
    run = {"name": "run", "dir": "s3://bucket/runs"}
    shards = "s3://bucket/train"
    save_config(tiny.config(tmp_path, shards, run=run, tracking={"mlflow": True}), str(file))
    assert cli.run(["submit", str(file), "--no-preflight", *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"MLflow: {said} results:" in shown
    assert "mhe logs run-1" in shown
