"""An MLflow server that is killed and comes back: training goes on, and it gets every value."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.tracking.factory import open_tracker, sync_mlflow
from mhe_dist.tracking.spool import MetricRecord, Spool
from tests.support.rank_processes import free_port
from tests.support.servers.mlflow_server import server
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("patient_mlflow")]


def losses(port: int, run_id: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    history = MlflowClient(f"http://127.0.0.1:{port}").get_metric_history(run_id, "loss")
    return sorted((m.step, m.value) for m in history)


def test_a_server_killed_and_restarted_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhe_dist.tracking.mlflow._GATHER_S", 0.05)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._PAUSE_S", 0.2)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._CLOSE_S", 1.0)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    values = {"run": {"dir": str(tmp_path)}, "data": {"shards": "x"}, "tracking": {"uri": uri}}
    config = Config.model_validate(values)
    spool = Spool(tmp_path / "run" / "mlflow")
    with server(tmp_path, port):
        first = open_tracker(config, is_first=True)
        first.start({}, {})
        for step in range(10):
            first.log(step, {"loss": float(step)})
        run_id = first.run_id
        assert run_id is not None
        wait_for(lambda: len(spool) == 0)
    for step in range(10, 20):
        first.log(step, {"loss": float(step)})
    first.close("failed")
    assert len(spool) == 10, "what did not arrive waits on disk"

    second = open_tracker(config, is_first=True)  # the run goes on at step 15 while it is down
    second.start({}, {}, step=15)
    for step in range(15, 25):
        second.log(step, {"loss": float(step)})
    with server(tmp_path, port):
        wait_for(lambda: len(spool) == 0)
        assert second.run_id == run_id
        second.close()
        assert losses(port, run_id) == [(step, float(step)) for step in range(25)]
        # Left by a killed process.
        spool.add(MetricRecord(25, int(time.time() * 1000), {"loss": 25.0}))
        assert sync_mlflow(config) == 1
        assert losses(port, run_id)[-1] == (25, 25.0)
    assert sync_mlflow(config) == 0
