"""What MLflow refuses for a while waits on disk, and `mhe sync` sends that and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from mhe_dist.config.schema import Config
from mhe_dist.config.write import save_config
from mhe_dist.errors import RunError
from mhe_dist.tracking.factory import count_waiting, sync_mlflow
from mhe_dist.tracking.mlflow import MlflowTracker
from mhe_dist.tracking.mlflow_client import is_permanent
from mhe_dist.tracking.spool import MetricRecord, RunEnd, Spool
from pipelines.runs.lock import FileLock, Holder, is_locked
from tests.support.waiting import wait_for

pytestmark = pytest.mark.usefixtures("hurry")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: making its tables takes longer than a test."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    client(uri).search_experiments()
    return uri


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


class Run:
    """A run whose record is in MLflow's experiment of the same name."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.name, self.folder = uri, folder.name, folder
        self.spool = Spool(folder / "run" / "mlflow")
        values = {"run": {"dir": str(folder)}, "data": {"shards": "x"}}
        tracking = {"uri": uri, "experiment": self.name}
        self.config = Config.model_validate(values | {"tracking": tracking})

    def tracker(self) -> MlflowTracker:
        return MlflowTracker(self.uri, self.name, "run", spool=self.spool)

    def logged(self, run_id: str | None) -> list[float]:
        history = client(self.uri).get_metric_history(run_id, "loss")
        return sorted(metric.value for metric in history)

    def in_mlflow(self) -> list[Any]:
        found = client(self.uri).get_experiment_by_name(self.name)
        return list(client(self.uri).search_runs([found.experiment_id]))


@pytest.fixture
def run(uri: str, tmp_path: Path) -> Run:
    return Run(uri, tmp_path)


def refusing(monkeypatch: pytest.MonkeyPatch, method: str, refusal: Callable[[Any], Any]) -> None:
    """Let MLflow's client raise what `refusal` makes of the arguments, where that is an error."""
    from mlflow.tracking import MlflowClient

    real = getattr(MlflowClient, method)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        error = refusal(kwargs)
        if error is not None:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, method, call)


def answer(code: str) -> Exception:
    from mlflow.exceptions import RestException

    return RestException({"error_code": code, "message": "not now"})


def refuse_metrics(monkeypatch: pytest.MonkeyPatch, code: str, times: float = 1) -> None:
    """Let so many calls that log metrics be answered with that."""
    answered: list[str] = []

    def refusal(given: dict[str, Any]) -> Exception | None:
        if not given.get("metrics") or len(answered) >= times:
            return None
        answered.append(code)
        return answer(code)

    refusing(monkeypatch, "log_batch", refusal)


def opened_in_a_hurry(run: Run, monkeypatch: pytest.MonkeyPatch) -> MlflowTracker:
    """A tracker whose run MLflow has, and which hardly waits for it at its end."""
    monkeypatch.setattr("mhe_dist.tracking.mlflow._CLOSE_S", 0.2)
    mlflow = run.tracker()
    mlflow.start({}, {})
    assert mlflow.run_id is not None
    return mlflow


CODES = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND")


@pytest.mark.parametrize("code", [*CODES, "401", "403", "404"])
def test_metrics_that_are_refused_for_a_while_arrive(
    run: Run, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_metrics(monkeypatch, code, times=3)
    mlflow = run.tracker()
    mlflow.start({}, {})
    mlflow.log(0, {"loss": 0.0})
    wait_for(lambda: len(run.spool) == 0)
    mlflow.log(1, {"loss": 1.0})
    mlflow.close()
    assert mlflow.problem == ""
    assert run.logged(mlflow.run_id) == [0.0, 1.0]


def test_a_token_that_stays_expired_loses_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        mlflow = opened_in_a_hurry(run, patch)
        mlflow.log(0, {"loss": 0.0})
        wait_for(lambda: len(run.spool) == 0 and mlflow.run_id is not None)
        refuse_metrics(patch, "UNAUTHENTICATED", times=10**9)
        for step in range(1, 4):
            mlflow.log(step, {"loss": float(step)})
        mlflow.close("failed")
        assert f"`mhe sync {run.spool.folder.parent}` sends them later" in mlflow.problem
        assert len(run.spool) == 3
        with pytest.raises(RunError, match=r"3 of 3 records still wait: .*UNAUTHENTICATED"):
            sync_mlflow(run.config)
    assert sync_mlflow(run.config) == 3
    assert (sync_mlflow(run.config), len(run.spool)) == (0, 0)
    assert run.logged(mlflow.run_id) == [0.0, 1.0, 2.0, 3.0]


def test_metrics_that_are_refused_for_good_wait_and_sync_asks_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = run.tracker()
    refuse_metrics(monkeypatch, "INVALID_PARAMETER_VALUE")
    mlflow.start({}, {})
    assert mlflow.run_id is not None
    mlflow.log(0, {"loss": 0.0})
    wait_for(lambda: bool(mlflow.problem))
    mlflow.log(1, {"loss": 1.0})
    mlflow.close()
    assert run.logged(mlflow.run_id) == [1.0], "it does not hold up the next"
    assert sync_mlflow(run.config) == 2
    assert run.logged(mlflow.run_id) == [0.0, 1.0]


def test_what_only_a_picture_is_refused_for_holds_up_no_metric(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing(monkeypatch, "log_artifact", lambda _: answer("PERMISSION_DENIED"))
    mlflow = run.tracker()
    mlflow.start({}, {})
    mlflow.artifact("plot.png")
    mlflow.log(0, {"loss": 0.0})
    mlflow.close()
    assert run.logged(mlflow.run_id) == [0.0]
    assert len(run.spool) == 0
    assert "1 values did not reach MLflow" in caplog.text
    assert "mhe sync" not in caplog.text, "nothing waits that it would send"


@pytest.mark.parametrize(("code", "waits"), [("RESOURCE_DOES_NOT_EXIST", False), ("401", True)])
def test_a_run_that_is_gone_is_not_waited_for(code: str, waits: bool) -> None:
    assert is_permanent(answer(code)) != waits


def test_sync_leaves_the_run_as_it_ended(run: Run) -> None:
    first = run.tracker()
    first.start({"lr": 1}, {"world_size": "2"})
    first.log(0, {"loss": 0.0})
    first.close("failed")
    (before,) = run.in_mlflow()
    run.spool.add(MetricRecord(1, 1000, {"loss": 1.0}))
    assert sync_mlflow(run.config) == 1
    (after,) = run.in_mlflow()
    assert run.logged(after.info.run_id) == [0.0, 1.0]
    assert (after.info.status, after.info.end_time) == ("FAILED", before.info.end_time)
    assert (after.data.tags, after.data.params) == (before.data.tags, before.data.params)
    assert not [name for name in after.data.metrics if name.startswith("system/")]


def test_an_end_that_mlflow_was_not_told_is_told_by_sync(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        first = opened_in_a_hurry(run, patch)
        for method in ("log_batch", "set_terminated"):
            refusing(patch, method, lambda _: ConnectionError("no route"))
        first.log(0, {"loss": 0.0})
        first.close("killed")
        end = run.spool.end
        assert end is not None and end.status == "killed"
        with pytest.raises(RunError, match="1 of 1 records still wait"):
            sync_mlflow(run.config)
    assert sync_mlflow(run.config) == 1
    (after,) = run.in_mlflow()
    assert run.logged(after.info.run_id) == [0.0]
    assert (after.info.status, after.info.end_time) == ("KILLED", end.time_ms)
    assert run.spool.end is None


def test_an_end_that_waits_alone_counts_and_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow went down between the last value and the end: it said that nothing waits."""
    with monkeypatch.context() as patch:
        first = opened_in_a_hurry(run, patch)
        refusing(patch, "set_terminated", lambda _: ConnectionError("no route"))
        first.close("finished")
        assert "mhe sync" in first.problem
    assert count_waiting(run.config) == 1
    save_config(run.config, f"{run.config.run.path}/config.yaml")
    assert cli.run(["sync", run.config.run.path]) == 0
    assert "1 records sent." in capsys.readouterr().out
    assert [each.info.status for each in run.in_mlflow()] == ["FINISHED"]
    assert count_waiting(run.config) == 0


def test_a_run_that_sync_makes_has_ended(run: Run) -> None:
    """Of a process that was killed before MLflow knew its run; it would be RUNNING for ever."""
    run.spool.add(MetricRecord(1, 1000, {"loss": 1.0}))
    assert sync_mlflow(run.config) == 1
    assert [each.info.status for each in run.in_mlflow()] == ["KILLED"]


def test_a_run_that_goes_on_has_not_ended(run: Run) -> None:
    run.spool.end = RunEnd("failed", 1000)
    again = run.tracker()
    again.start({}, {})
    assert run.spool.end is None
    again.close()
    assert run.spool.end is None
    assert [each.info.status for each in run.in_mlflow()] == ["FINISHED"]


def test_the_id_is_kept_before_anything_waits(run: Run) -> None:
    """Else sync would make another run of what a killed process left behind."""
    mlflow = run.tracker()
    mlflow.start({}, {})
    assert mlflow.run_id is not None
    wait_for(lambda: run.spool.run_id == mlflow.run_id)
    mlflow.close()


def test_a_run_whose_id_was_not_kept_is_found_again(run: Run) -> None:
    """Of a process that was killed in between; a second run began, and the first ran for ever."""
    first = run.tracker()
    first.start({"workers": 1}, {})
    first.close("killed")
    (run.spool.folder / "run_id").unlink()
    again = run.tracker()
    again.start({"workers": 2}, {})
    again.log(0, {"loss": 0.0})
    again.close()
    assert again.problem == ""
    (found,) = run.in_mlflow()
    assert run.logged(found.info.run_id) == [0.0]
    assert (found.data.params["workers"], found.data.tags["changed.workers"]) == ("1", "2")


def test_sync_holds_the_lock_of_the_run_meanwhile(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at once made two runs; one that began to train lost what the other took for sent."""
    folder = str(run.folder / "run")
    save_config(run.config, f"{folder}/config.yaml")
    codes: list[int] = []

    def sync_both(config: Config) -> int:
        codes.append(cli.run(["sync", folder]))
        return sync_mlflow(config)

    run.spool.add(MetricRecord(1, 1000, {"loss": 1.0}))
    monkeypatch.setattr("launcher.verbs.results.sync_mlflow", sync_both)
    assert cli.run(["sync", folder]) == 0
    assert codes == [2] and len(run.in_mlflow()) == 1
    assert "1 records sent." in capsys.readouterr().out
    assert not is_locked(folder)


def test_sync_refuses_a_run_that_is_being_trained(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.folder / "run"
    (folder / "config.yaml").write_text(
        f"run: {{dir: {run.folder}}}\ndata: {{shards: x}}\ntracking: {{uri: '{run.uri}'}}\n"
    )
    run.spool.add(MetricRecord(1, 1000, {"loss": 1.0}))
    lock = FileLock(str(folder), Holder(host="there", pid=7))
    lock.acquire(lambda: False)
    assert cli.run(["sync", str(folder)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is being trained by process 7 on there" in said
    assert "sends what waits for MLflow by itself" in said
    assert len(run.spool) == 1
    lock.release()
    assert cli.run(["sync", str(folder)]) == 0
    assert len(run.spool) == 0
