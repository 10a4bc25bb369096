"""MLflow: the same run goes on, secrets stay here, an outage stops nothing."""

import getpass
import json
import logging
import os
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from mhe_dist.tracking.append import append_to_mlflow_run
from mhe_dist.tracking.base import TrackedDataset, Tracker
from mhe_dist.tracking.factory import open_tracker, sync_mlflow
from mhe_dist.tracking.mlflow import MlflowTracker, metric_name
from mhe_dist.tracking.mlflow_client import is_permanent
from mhe_dist.tracking.spool import MetricRecord, Spool
from tests.support.waiting import WATCHDOG_S

pytestmark = pytest.mark.usefixtures("hurry")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One database for all tests: making its tables takes longer than a test."""
    folder = tmp_path_factory.mktemp("mlflow")
    made = f"sqlite:///{folder}/mlflow.db", str(folder / "mlartifacts")
    client(made).search_experiments()  # makes the tables: no part of the time to close a run
    return made


def tracker(store, run_id=None):
    return MlflowTracker(store[0], "experiment", "name", run_id, store[1])


def client(store):
    from mlflow.tracking import MlflowClient

    return MlflowClient(store[0])


def test_a_run_with_params_tags_metrics_and_artifacts(store, tmp_path):
    (tmp_path / "curves").mkdir()
    for path in (tmp_path / "plot.txt", tmp_path / "curves" / "loss.txt"):
        path.write_text("picture")
    mlflow = tracker(store)
    assert isinstance(mlflow, Tracker)
    mlflow.start(
        {"optim": {"lr": 0.1}, "list": [1, 2]}, {"git_commit": "abc-dirty", "world_size": "2"}
    )
    for step in range(5):
        mlflow.log(step, {"loss": 1.0 / (step + 1), "tar@far=1e-3": 0.5})
    mlflow.artifact(str(tmp_path / "plot.txt"), "plots")
    mlflow.artifact(str(tmp_path / "curves"))
    mlflow.close()

    run = client(store).get_run(mlflow.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "name"
    assert run.data.params == {"optim.lr": "0.1", "list": "[1, 2]"}
    assert run.data.tags["world_size"] == "2"
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.tags["mlflow.user"] == getpass.getuser()
    assert run.data.metrics == {"loss": 0.2, "tar_at_far_1e-3": 0.5}
    history = client(store).get_metric_history(mlflow.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(s, 1.0 / (s + 1)) for s in range(5)]
    wanted = f"#/experiments/{run.info.experiment_id}/runs/{mlflow.run_id}"
    assert mlflow.page == f"{wanted}?workflowType=machine_learning"
    (plot,) = client(store).list_artifacts(mlflow.run_id, "plots")
    assert plot.path == "plots/plot.txt"
    assert [f.path for f in client(store).list_artifacts(mlflow.run_id)] == ["curves", "plots"]
    assert run.info.artifact_uri.startswith(f"file://{store[1]}")


def test_a_restart_goes_on_under_the_same_run_id(store):
    first = tracker(store)
    first.start({"workers": 2}, {})
    first.log(0, {"loss": 3.0})
    first.close("failed")
    assert client(store).get_run(first.run_id).info.status == "FAILED"

    again = tracker(store, run_id=first.run_id)
    again.start({"workers": 1, "new": "x"}, {}, step=1)
    assert again.run_id == first.run_id
    assert again.page == first.page != ""
    assert client(store).get_run(first.run_id).info.status == "RUNNING"
    again.log(1, {"loss": 2.0})
    again.close("killed")
    run = client(store).get_run(first.run_id)
    assert run.info.status == "KILLED"
    assert run.data.params == {"workers": "2", "new": "x"}
    assert run.data.tags["changed.workers"] == "1"
    assert len(client(store).get_metric_history(first.run_id, "loss")) == 2


def test_a_run_that_is_gone_is_replaced_and_said(store, caplog):
    mlflow = tracker(store, run_id="0" * 32)
    mlflow.start({}, {})
    assert mlflow.run_id not in (None, "0" * 32)
    mlflow.close()
    assert "has no run 000" in caplog.text


def test_more_entries_than_mlflow_takes_at_once(store):
    mlflow = tracker(store)
    mlflow.start({f"p{i}": i for i in range(230)}, {f"t{i}": "x" for i in range(130)})
    for step in range(1500):
        mlflow.log(step, {"loss": float(step)})
    mlflow.close()
    run = client(store).get_run(mlflow.run_id)
    assert len(run.data.params) == 230
    assert run.data.tags["t129"] == "x"
    history = client(store).get_metric_history(mlflow.run_id, "loss")
    assert [m.step for m in history] == list(range(1500))


def test_planted_secrets_never_reach_mlflow(store, monkeypatch, tmp_path):
    monkeypatch.setenv("PLANTED_TOKEN", "plantedvalue1")
    mlflow = tracker(store)
    config = {"uri": "http://u:plantedvalue2@h", "api_key": "plantedvalue3", "x": "plantedvalue1"}
    mlflow.start(config, {"remote": "https://u:plantedvalue2@git"})
    mlflow.close()
    run = client(store).get_run(mlflow.run_id)
    assert run.data.params == {"uri": "http://***@h", "api_key": "***", "x": "***"}
    assert "planted" not in str(run.data.tags)
    with open(store[0].removeprefix("sqlite:///"), "rb") as database:
        assert b"plantedvalue" not in database.read()


def losing(monkeypatch, method):
    """Let the first answer of a method of MLflow's client be lost, after its own second attempt."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    real, lost = getattr(MlflowClient, method), []

    def call(self, *args, **kwargs):
        answer = real(self, *args, **kwargs)
        if not lost:
            lost.append(real(self, *args, **kwargs))
            raise MlflowException("no answer came")
        return answer

    monkeypatch.setattr(MlflowClient, method, call)


def test_a_lost_answer_makes_nothing_twice(store, monkeypatch, tmp_path):
    (tmp_path / "MLmodel").write_text("flavors: {}")
    first = MlflowTracker(store[0], "losses", "once", artifacts=store[1])
    for method in ("create_run", "log_batch", "create_model_version"):
        losing(monkeypatch, method)
    first.start({"a": 1}, {"world_size": "2"})
    first.model(str(tmp_path), "once")
    first.close("failed")
    again = MlflowTracker(store[0], "losses", "once", first.run_id)
    for method in ("create_run", "log_batch"):
        losing(monkeypatch, method)
    again.start({"a": 1}, {"world_size": "1"}, step=1)
    again.close()

    experiment = client(store).get_experiment_by_name("losses")
    runs = client(store).search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["once", "once from step 1"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    run = client(store).get_run(first.run_id)
    assert (run.data.params, run.data.tags["world_size"]) == ({"a": "1"}, "1")
    assert len(client(store).search_model_versions("name = 'once'")) == 1


class Outage:
    """Stands in for the store: fails `failures` times, and not before `begun`, then takes all."""

    uri = "http://user:password@server"
    run_id = None

    def __init__(self, failures):
        self.failures, self.sent, self.begun = failures, [], threading.Event()
        self.begun.set()

    def describe(self, params, tags):
        pass

    def open(self):
        assert self.begun.wait(WATCHDOG_S)
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("no route to http://user:password@server")
        self.run_id = "abc"

    def calls(self, entries):
        return [(partial(self.take, entry), 1) for entry in entries]

    def take(self, entry):
        self.sent.append(entry)


def test_an_outage_holds_up_nothing_and_what_waited_arrives_in_order(store, tmp_path, caplog):
    mlflow = MlflowTracker(store[0], "experiment", "name", spool=Spool(tmp_path))
    mlflow._store = outage = Outage(failures=4)
    outage.begun.clear()
    mlflow.start({}, {})
    for step in range(1000):
        mlflow.log(step, {"loss": 0.0})
    outage.begun.set()  # the server gave no answer until here
    mlflow.close()
    assert [entry.step for entry in mlflow._store.sent[:-1]] == list(range(1000))
    assert mlflow.run_id == "abc"
    assert caplog.text.count("will go on trying") == 1
    assert "password" not in caplog.text


def test_a_server_that_never_answers_ends_with_a_count(store, caplog, monkeypatch):
    monkeypatch.setattr("mhe_dist.tracking.mlflow._CLOSE_S", 0.2)
    mlflow = tracker(store)
    mlflow._store = Outage(failures=10**9)
    mlflow.start({}, {})
    mlflow.log(0, {"loss": 0.0})
    assert mlflow.run_id is None
    mlflow.close("failed")
    assert "2 values did not reach MLflow at http://***@server" in caplog.text
    assert "no route to http://***@server" in mlflow.problem


def test_what_waits_is_said_with_the_command_that_sends_it(tmp_path, monkeypatch):
    monkeypatch.setattr("mhe_dist.tracking.mlflow._CLOSE_S", 0.2)
    monkeypatch.setattr("mhe_dist.tracking.mlflow.MlflowStore", lambda *_: Outage(10**9))
    spool = Spool(tmp_path / "my run" / "mlflow")
    mlflow = MlflowTracker("http://server", "e", "n", spool=spool)
    mlflow.start({}, {})
    mlflow.log(0, {"loss": 0.0})
    mlflow.close()
    assert f"`mhe sync '{tmp_path}/my run'` sends them later" in mlflow.problem


class Slow(Outage):
    """Takes an entry in `seconds` of a clock of its own, so that whoever waits looks at each."""

    def __init__(self, seconds):
        super().__init__(failures=0)
        self.seconds, self.now, self.looked = seconds, 0.0, threading.Event()

    def monotonic(self):
        if threading.current_thread() is threading.main_thread():
            self.looked.set()
        return self.now

    def take(self, entry):
        self.looked.clear()
        self.now += self.seconds
        assert self.looked.wait(WATCHDOG_S)
        super().take(entry)


def test_sync_waits_for_a_slow_server_and_sends_more_than_a_run_keeps(tmp_path, monkeypatch):
    server = Slow(seconds=0.015)
    clock = SimpleNamespace(monotonic=server.monotonic)
    monkeypatch.setattr("mhe_dist.tracking.mlflow.time", clock)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._CLOSE_S", 0.02)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._GRACE_S", 0.0)
    monkeypatch.setattr("mhe_dist.tracking.mlflow._QUEUE_LIMIT", 3)
    monkeypatch.setattr("mhe_dist.tracking.mlflow.MlflowStore", lambda *_: server)
    values = {"run": {"dir": str(tmp_path)}, "data": {"shards": "x"}}
    config = Config.model_validate(values | {"tracking": {"uri": "http://server"}})
    spool = Spool(tmp_path / "run" / "mlflow")
    for step in range(12):
        spool.add(MetricRecord(step, 0, {"loss": 1.0}))
    assert sync_mlflow(config) == 12
    assert [entry.step for entry in server.sent[:-1]] == list(range(12))
    assert len(spool) == 0


def test_a_refused_record_does_not_block_the_next(store, caplog):
    mlflow = tracker(store)
    mlflow.start({}, {})
    mlflow.artifact("/nowhere/plot.png")
    mlflow.log(0, {"loss": 1.0})
    mlflow.close()
    assert client(store).get_run(mlflow.run_id).data.metrics == {"loss": 1.0}
    assert "MLflow refuses" in caplog.text


def test_an_experiment_that_was_deleted_is_a_problem_that_sync_names(store, tmp_path):
    gone = client(store).create_experiment("gone")
    client(store).delete_experiment(gone)
    values = {"run": {"dir": str(tmp_path), "name": "a"}, "data": {"shards": "x"}}
    values["tracking"] = {"uri": store[0], "experiment": "gone"}
    config = Config.model_validate(values)
    both = open_tracker(config, is_first=True)
    assert both.problem == ""
    both.start({}, {})
    both.log(0, {"loss": 1.0})
    both.close()
    assert "refuses values, and is not asked again" in both.problem
    assert "deleted" in both.problem
    with pytest.raises(RunError, match=r"1 of 1 records still wait: .* refuses .*deleted"):
        sync_mlflow(config)


def test_data_sets_a_note_and_constants_are_where_mlflow_shows_them(store, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "hunter2-and-more")
    digest = "sha256:" + "ab" * 32
    held = TrackedDataset("a/held", "evaluation", digest, "s3://k:hunter2-and-more@b/a", 90, 9)
    data = [TrackedDataset("a/train", "training", "xyz", "data/a", 1000, 50), held]
    first = tracker(store)
    first.start({}, {})
    for each in data:
        first.dataset(each)
    first.log(3, {"heldout/rank1": 0.5, "heldout/chance": 0.002, "heldout/gallery": 500.0})
    first.log(9, {"heldout/rank1": 0.7, "heldout/chance": 0.002, "heldout/gallery": 500.0})
    first.note("| rank1 | 70 % |\n\n![a plot](plots/a.png)\n![b](http://host/b.png)")
    first.close()
    again = tracker(store, first.run_id)  # a run that goes on, with another held-out set
    again.start({}, {}, step=10)
    for each in data:
        again.dataset(each)
    again.log(12, {"heldout/gallery": 600.0, "heldout/chance": 0.002})
    again.close()
    run = client(store).get_run(first.run_id)
    assert run.data.metrics == {"heldout/rank1": 0.7}
    assert run.data.params == {"heldout/chance": "0.002", "heldout/gallery": "500"}
    assert run.data.tags["changed.heldout/gallery"] == "600"
    assert run.data.tags["mlflow.note.content"] == (
        f"| rank1 | 70 % |\n\n![a plot](get-artifact?path=plots%2Fa.png&run_uuid={first.run_id})\n"
        "![b](http://host/b.png)"
    )
    inputs = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert len(run.inputs.dataset_inputs) == 2
    assert inputs["training"].name == "a/train" and inputs["training"].digest == "xyz"
    assert inputs["training"].source_type == "local"
    assert json.loads(inputs["training"].profile)["num_rows"] == 1000
    assert json.loads(inputs["evaluation"].profile)["digest"] == digest
    assert inputs["evaluation"].digest == ("ab" * 32)[:36]
    assert "hunter2" not in inputs["evaluation"].source
    columns = json.loads(inputs["training"].schema)["mlflow_colspec"]
    assert [column["name"] for column in columns] == ["image", "class"]


def test_a_schema_of_another_version_is_permanent():
    from mlflow.exceptions import MlflowException

    old = "Detected out-of-date database schema (found version 1, but expected 2)"
    assert is_permanent(MlflowException(old))
    assert not is_permanent(MlflowException("an internal error"))


@pytest.mark.parametrize("uri", ["runs", "file:///tmp/x", "ftp://u:p@h/x"])
def test_a_uri_that_mlflow_cannot_use_is_the_users_mistake(uri):
    with pytest.raises(UserError, match="is no MLflow tracking URI") as caught:
        MlflowTracker(uri, "e", "n")
    assert "u:p@" not in str(caught.value)


def test_names_that_mlflow_takes():
    assert metric_name("eval/tar@far=1e-3") == "eval/tar_at_far_1e-3"
    assert metric_name("accuracy_std") == "accuracy_std"


@pytest.mark.slow
def test_no_noise_and_no_telemetry(tmp_path):
    code = f"""
from mhe_dist.tracking import mlflow
mlflow._CLOSE_S = {WATCHDOG_S}
tracker = mlflow.MlflowTracker("sqlite:///{tmp_path}/mlflow.db", "e", "n")
tracker.start({{}}, {{}})
tracker.log(0, {{"loss": 1.0}})
tracker.close()
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled()
"""
    # MLflow is silent of itself under pytest and in continuous integration.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CI", "MLFLOW"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_thread_ends_with_the_run(store):
    mlflow = tracker(store)
    mlflow.start({}, {})
    mlflow.close()
    assert not mlflow._thread.is_alive()
    mlflow.close()
    logging.getLogger("urllib3").setLevel(logging.NOTSET)


def test_results_are_added_to_a_run_that_stays_as_it_is(store, tmp_path):
    mlflow = tracker(store)
    mlflow.start({}, {})
    mlflow.close("failed")
    (tmp_path / "roc.png").write_bytes(b"picture")
    figures = {"verification/lfw/tar@far=1e-3": 0.75, "verification/lfw/accuracy": 0.9}
    append_to_mlflow_run(
        store[0], mlflow.run_id, 40, figures, [str(tmp_path / "roc.png")], "evaluation"
    )
    run = client(store).get_run(mlflow.run_id)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {metric_name(name): value for name, value in figures.items()}
    kept = client(store).list_artifacts(mlflow.run_id, "evaluation")
    assert [file.path for file in kept] == ["evaluation/roc.png"]
    with pytest.raises(RunError, match="did not take the results"):
        append_to_mlflow_run(store[0], "0" * 32, 40, figures, [], "evaluation")
