"""A run under Ray: a worker is killed, then the command, then it is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from mhe_dist.config.schema import Config
from mhe_dist.config.write import save_config
from mhe_dist.tracking.jsonl import read_records
from tests.conftest import run_ranks
from tests.golden.record import train
from tests.support import tiny
from tests.support.terminal import mhe, until
from tests.support.waiting import ended, stretched

pytestmark = [pytest.mark.chaos, pytest.mark.long]

STEPS = 160


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("ray")
    return tiny.config(
        folder / "runs",
        tiny.write_shards(folder / "train"),
        run={"name": "killed"},
        train={"max_steps": STEPS, "epochs": 1000},
        scale={"workers": 2},
        checkpoint={"every_steps": 20},
        tracking={"mlflow": True},
    )


def mhe_train(config: Config, folder: Path) -> subprocess.Popen[str]:
    path = folder / "config.yaml"
    save_config(config, str(path))
    return mhe("train", str(path))


def a_worker(session: int) -> psutil.Process:
    """A training worker of the session."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and "RayTrainWorker" in " ".join(
                process.cmdline()
            ):
                return process
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    pytest.fail("no worker")


def test_a_killed_worker_a_killed_command_and_sigterm_change_nothing(
    config: Config, tmp_path: Path
) -> None:
    first = mhe_train(config, tmp_path)
    until(first, "checkpoint")
    a_worker(first.pid).kill()
    until(first, "Resumed at step")
    until(first, "checkpoint")
    first.kill()

    second = mhe_train(config, tmp_path)
    output = until(second, "Resumed at step")
    output += until(second, "checkpoint")
    os.kill(second.pid, signal.SIGTERM)
    rest = ended(second)
    assert second.returncode == 75, output + rest
    assert "everything is saved" in rest
    assert "goes on from" in rest

    third = mhe_train(config, tmp_path)
    output = ended(third)
    assert third.returncode == 0, output
    assert "Resumed at step" in output

    uninterrupted = config.model_copy(deep=True)
    uninterrupted.run.name, uninterrupted.tracking.mlflow = "uninterrupted", False
    run_ranks(train, 2, uninterrupted.model_dump())
    assert tiny.per_step(config) == tiny.per_step(uninterrupted)
    records = read_records(f"{config.run.path}/metrics.jsonl")
    restarts = {r["restarts"]: r["restart_lost_steps"] for r in records if "restarts" in r}
    assert restarts.keys() == {1.0, 2.0, 3.0}
    assert restarts[3.0] == 0, "a preempted run does nothing again"
    times = [r for r in records if "restart_seconds" in r]
    assert times[0]["restart_seconds"] < stretched(60)
    assert_one_mlflow_run(config)


def assert_one_mlflow_run(config: Config) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{config.run.dir}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mhe").experiment_id])
    (run,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["restarts"] == 3
    steps = {m.step for m in client.get_metric_history(run.info.run_id, "loss")}
    assert steps == set(range(STEPS))
