"""MLflow as a tracker that costs a step nothing and that no outage stops.

`log` puts a record into a queue and on disk (`spool.py`); one thread sends what has gathered there,
in order. While the server cannot be reached the thread keeps trying; what has not arrived when the
process ends, whatever ended it, is sent when the run goes on, or by `mhe sync`.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mhe_dist.errors import UserError
from mhe_dist.mlflow_system import watch_system
from mhe_dist.redact import flat, masked, scrub
from mhe_dist.spool import Record, Spool
from mhe_dist.tracking import Metrics, Status

logger = logging.getLogger(__name__)

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The thread below tries again by itself; MLflow's own retries would hold up `close`.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_GATHER_S = 1.0  # records that arrive within this time travel together
_FIRST_ATTEMPT_S = 60.0  # longest wait for a run id
_CLOSE_S = 30.0  # longest wait for what is still to be sent
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # between two attempts
MESSAGE_LENGTH = 300
_QUEUE_LIMIT = 100_000  # records
METRICS_PER_CALL, _ENTRIES_PER_CALL = 1000, 100  # limits of MLflow's log-batch
_PARAM_LENGTH, _TAG_LENGTH, _NAME_LENGTH = 6000, 5000, 250


@dataclass(frozen=True)
class _Artifact:
    """A file or folder to copy."""

    path: str
    folder: str


@dataclass(frozen=True)
class _Model:
    """A model's folder to copy and to register."""

    path: str
    name: str


@dataclass(frozen=True)
class _End:
    """The last entry of the queue."""

    status: Status


class MlflowTracker:
    """One MLflow run; after a restart the same one goes on."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        artifacts: str = "",
        spool: Spool | None = None,
    ) -> None:
        """Args:
            uri: of the server or database, with its credentials if it needs any.
            experiment: name; made when it is missing.
            run_name: what people call the run.
            run_id: the run to go on with; None: a new one.
            artifacts: local folder for the artifacts of a new experiment in a local database.
            spool: where records wait on disk; it knows the run id better than `run_id`.

        Raises:
            UserError: MLflow has no store for that URI.
        """
        scheme = uri.partition(":")[0].partition("+")[0]
        if scheme not in _SCHEMES:
            raise UserError(
                f"tracking.uri={scrub(uri)!r} is no MLflow tracking URI: give http(s)://host:port "
                "of a server, sqlite:///file.db or another database; or set tracking.mlflow=false"
            )
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self._spool = spool
        run_id = (spool.run_id if spool else None) or run_id
        self._store = _Store(
            uri, experiment, run_name, run_id, artifacts if scheme == "sqlite" else ""
        )
        self._queue: queue.Queue[Record | _Artifact | _Model | _End] = queue.Queue(_QUEUE_LIMIT)
        self._attempted = threading.Event()
        self._closing = threading.Event()
        self._deadline = math.inf
        self._lost = 0
        self._down = False
        self._cut_short = False
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)

    @property
    def run_id(self) -> str | None:
        """MLflow's run id; waits for the first attempt to open the run, None when that failed."""
        if self._thread.is_alive():
            self._attempted.wait(_FIRST_ATTEMPT_S)
        return self._store.run_id

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Begin to open the run. MLflow is imported here, on the caller's thread: about 2 s."""
        import mlflow  # noqa: F401

        logging.getLogger("urllib3").setLevel(logging.ERROR)  # says every retry twice

        params = {key: str(value) for key, value in flat(masked(config)).items()}
        self._store.describe(params, {key: scrub(str(value)) for key, value in tags.items()})
        for record in self._spool.take_up(step) if self._spool else []:
            self._put(record)
        self._store.step = step
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue the values; their names lose the characters that MLflow refuses."""
        named = {metric_name(name): float(value) for name, value in metrics.items()}
        record = Record(step, int(time.time() * 1000), named)
        if self._spool is None:
            self._put(record)
            return
        with self._spool.lock:
            self._spool.add(record)
            self._put(record)

    def artifact(self, path: str, folder: str = "") -> None:
        """Queue the file or folder; it must not change afterwards."""
        self._put(_Artifact(path, folder))

    def model(self, path: str, name: str) -> None:
        """Queue the folder of a model and its registration."""
        self._put(_Model(path, name))

    def close(self, status: Status = "finished") -> None:
        """Send what is queued and mark the run; wait for that half a minute at most."""
        if not self._thread.is_alive():
            return
        self._deadline = time.monotonic() + _CLOSE_S
        self._closing.set()
        self._put(_End(status))
        self._thread.join(_CLOSE_S + 5)
        if self._lost or self._thread.is_alive():
            logger.warning(
                "%s values did not reach MLflow at %s; metrics.jsonl has them%s",
                "some" if self._thread.is_alive() else self._lost,
                scrub(self._store.uri),
                ", and `mhe sync` sends them later" if self._spool else "",
            )

    def _put(self, entry: Record | _Artifact | _Model | _End) -> None:
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._lost += 1
            self._cut_short = True

    def _work(self) -> None:
        """The thread: open the run, then send what comes until the end of the record."""
        opened = self._persist(self._store.open)
        self._cut_short |= not opened
        if self._spool and self._store.run_id:
            self._spool.run_id = self._store.run_id
        self._attempted.set()
        while True:
            entries = self._gather()
            for send, count in self._store.calls(entries):
                if not (opened and self._persist(send)):
                    self._lost += count
            self._settle()
            if any(isinstance(entry, _End) for entry in entries):
                return

    def _settle(self) -> None:
        """Empty the spool if all that was queued has arrived; what MLflow refuses stays refused."""
        if self._spool is None or self._cut_short:
            return
        with self._spool.lock:
            if self._queue.empty():
                self._spool.clear()

    def _gather(self) -> list[Record | _Artifact | _Model | _End]:
        """The next entry and those that follow it closely."""
        entries = [self._queue.get()]
        self._closing.wait(_GATHER_S)
        while len(entries) < _QUEUE_LIMIT:
            try:
                entries.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return entries

    def _persist(self, send: Callable[[], None]) -> bool:
        """Call `send` until it succeeds; False when it never will, or when time is up."""
        pause = _PAUSE_S
        while True:
            try:
                send()
                self._down = False
                return True
            except Exception as error:  # a thread's last defence: nothing here may end the run
                if is_permanent(error):
                    logger.warning("MLflow refuses: %s", scrub(str(error))[:MESSAGE_LENGTH])
                    return False
                if not self._down:
                    message = scrub(str(error))[:MESSAGE_LENGTH]
                    logger.warning("MLflow fails, will go on trying: %s", message)
            self._down = True
            self._attempted.set()
            if time.monotonic() + pause > self._deadline:
                self._cut_short = True
                return False
            pause = self._rest(pause)

    def _rest(self, pause: float) -> float:
        """Wait that long, or until the run is being closed; the length of the next pause."""
        if self._closing.is_set():
            time.sleep(pause)
            return pause
        return _PAUSE_S if self._closing.wait(pause) else min(2 * pause, _LONGEST_PAUSE_S)


class _Store:
    """The calls to MLflow; used by the tracker's thread alone once the run is being opened."""

    def __init__(
        self, uri: str, experiment: str, run_name: str, run_id: str | None, artifacts: str
    ):
        self.uri = uri
        self.run_id = run_id
        self._experiment = experiment
        self._run_name = run_name
        self._artifacts = artifacts
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._client: Any = None
        self.step = 0  # first one that this process records
        self._restart: str | None = None  # id of the child run of a process that goes on
        self._system: Any = None

    def describe(self, params: dict[str, str], tags: dict[str, str]) -> None:
        """Remember what `open` will log; the commit also where MLflow's pages look for it."""
        self._params = params
        self._tags = {"mlflow.source.name": "mhe", "mlflow.source.type": "LOCAL"} | tags
        if "git_commit" in tags:
            self._tags["mlflow.source.git.commit"] = tags["git_commit"].partition("-")[0]

    def open(self) -> None:
        """Find or make the experiment and the run, mark it as running, log params and tags."""
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(self.uri)
        known = self._resumed()
        if known is None:
            run = self._client.create_run(self._experiment_id(), run_name=self._run_name)
            self.run_id, known = run.info.run_id, {}
        else:
            self._client.update_run(self.run_id, status="RUNNING")
            self._restart = self._child()
        changed = {
            k: v for k, v in self._params.items() if k in known and known[k] != v[:_PARAM_LENGTH]
        }
        self._log_params({k: v for k, v in self._params.items() if k not in known})
        self._log_tags(self._tags | {f"changed.{key}": value for key, value in changed.items()})
        self._system = watch_system(self.uri, self.run_id)

    def calls(self, entries: list[Any]) -> list[tuple[Callable[[], None], int]]:
        """What to call for these entries, in order, and how many entries each call carries."""
        calls: list[tuple[Callable[[], None], int]] = []
        records: list[Record] = []
        for entry in entries:
            if isinstance(entry, Record):
                records.append(entry)
                continue
            calls += self._metric_calls(records)
            records = []
            if isinstance(entry, _Artifact):
                calls.append((partial(self._log_artifact, entry), 1))
            elif isinstance(entry, _Model):
                calls.append((partial(self._log_model, entry), 1))
            else:
                calls.append((partial(self._end, entry.status), 1))
        return calls + self._metric_calls(records)

    def _metric_calls(self, records: list[Record]) -> list[tuple[Callable[[], None], int]]:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, record.time_ms, record.step)
            for record in records
            for name, value in record.metrics.items()
        ]
        starts = range(0, len(metrics), METRICS_PER_CALL)
        pieces = [metrics[start : start + METRICS_PER_CALL] for start in starts]
        return [(partial(self._log_metrics, piece), len(piece)) for piece in pieces]

    def _log_metrics(self, metrics: list[Any]) -> None:
        self._client.log_batch(self.run_id, metrics=metrics)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        known = self._client.get_experiment_by_name(self._experiment)
        if known is not None:
            return known.experiment_id
        place = Path(self._artifacts).absolute().as_uri() if self._artifacts else None
        try:
            return self._client.create_experiment(self._experiment, artifact_location=place)
        except MlflowException:
            # Another run may have made it meanwhile.
            known = self._client.get_experiment_by_name(self._experiment)
            if known is None:
                raise
            return known.experiment_id

    def _resumed(self) -> dict[str, str] | None:
        """Params of the run to go on with; None: there is no such run (any more)."""
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active":
                return dict(run.data.params)
        logger.warning("MLflow has no run %s: a new one begins", self.run_id)
        self.run_id = None
        return None

    def _log_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(k[:_NAME_LENGTH], v[:_PARAM_LENGTH]) for k, v in params.items()]
        for i in range(0, len(entries), _ENTRIES_PER_CALL):
            self._client.log_batch(self.run_id, params=entries[i : i + _ENTRIES_PER_CALL])

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(k[:_NAME_LENGTH], v[:_TAG_LENGTH]) for k, v in tags.items()]
        for i in range(0, len(entries), _ENTRIES_PER_CALL):
            self._client.log_batch(self.run_id, tags=entries[i : i + _ENTRIES_PER_CALL])

    def _log_artifact(self, artifact: _Artifact) -> None:
        # A folder goes there under its own name.
        self._client.log_artifact(self.run_id, artifact.path, artifact.folder or None)

    def _log_model(self, model: _Model) -> None:
        """Copy the folder to `model` of the run, and make it the next version of its name."""
        from mlflow.exceptions import MlflowException

        self._client.log_artifacts(self.run_id, model.path, "model")
        try:
            self._client.create_registered_model(model.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        place = f"{self._client.get_run(self.run_id).info.artifact_uri}/model"
        self._client.create_model_version(model.name, place, self.run_id)

    def _child(self) -> str:
        """A run below this one, for what this process does of it."""
        run = self._client.create_run(
            self._client.get_run(self.run_id).info.experiment_id,
            run_name=f"{self._run_name} from step {self.step}",
            tags={"mlflow.parentRunId": self.run_id, "step": str(self.step), **self._tags},
        )
        return str(run.info.run_id)

    def _end(self, status: Status) -> None:
        if self._system:
            self._system.finish()
        for run_id in filter(None, (self._restart, self.run_id)):
            self._client.set_terminated(run_id, status.upper())


def metric_name(name: str) -> str:
    """`name` as MLflow takes it: `tar@far=1e-3` becomes `tar_at_far_1e-3`."""
    return re.sub(r"[^\w .:/-]", "_", name.replace("@", "_at_"))[:_NAME_LENGTH]


def is_permanent(error: Exception) -> bool:
    """Whether trying again cannot help: the request is wrong, not the connection."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return 400 <= status < 500 and status not in (408, 429)
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return True
    import sqlalchemy.exc

    return not isinstance(error, OSError | sqlalchemy.exc.OperationalError)
